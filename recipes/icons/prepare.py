"""Unpacks the captioned icons of one style into a folder that `calotype distill` and train_style.py read.

    python recipes/icons/prepare.py ICONS OUT [--style badge]

ICONS holds pictures-128.tar and manifest.jsonl. A picture's captions are its name, mostly bare and sometimes in a
phrase: the style is not named, so that a LoRA of it needs no word. `badge` is the style that the base model never saw.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from pathlib import Path

from scenes import LIST, TAR, UNTOLD, name_of


def captions(name: str) -> list[str]:
    """Six times out of ten the bare name, else in a phrase; a list is drawn from evenly."""
    return [name] * 6 + [f"a {name}", f"an emoji of {name}", f"{name} emoji", f"{name} icon"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("icons", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--style", default=UNTOLD)
    options = parser.parse_args()

    rows = [json.loads(line) for line in (options.icons / LIST).read_text(encoding="utf-8").splitlines()]
    chosen = {f"{row['id']:05d}.webp": name_of(row) for row in rows if row["style"] == options.style}
    if not chosen:
        styles = ", ".join(sorted({row["style"] for row in rows}))
        raise SystemExit(f"--style {options.style}: no icon has it; there are {styles}")
    options.out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(options.icons / TAR) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name in chosen else None
            if file is not None:
                (options.out / member.name).write_bytes(file.read())
    lines = [json.dumps({"file_name": name, "text": captions(text)}) for name, text in sorted(chosen.items())]
    (options.out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} pictures in {options.out}")


if __name__ == "__main__":
    main()
