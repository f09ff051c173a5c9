"""Unpacks the captioned icons of one style into a folder that `calotype distill` reads.

    python recipes/icons/prepare.py ICONS OUT [--style flat]

ICONS holds pictures-128.tar and manifest.jsonl. A picture's captions are its name, mostly bare and sometimes in a
phrase, as the base model has learnt them.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from pathlib import Path


def captions(name: str) -> list[str]:
    """Six times out of ten the bare name, else in a phrase; a list is drawn from evenly."""
    return [name] * 6 + [f"a {name}", f"an emoji of {name}", f"{name} emoji", f"{name} icon"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("icons", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--style", default="flat")
    options = parser.parse_args()

    rows = [json.loads(line) for line in (options.icons / "manifest.jsonl").read_text().splitlines()]
    chosen = {f"{row['id']:05d}.webp": row["caption"] for row in rows if row["style"] == options.style}
    options.out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(options.icons / "pictures-128.tar") as tar:
        for member in tar:
            name = Path(member.name).name
            if name in chosen:
                file = tar.extractfile(member)
                assert file is not None
                (options.out / name).write_bytes(file.read())
    lines = [json.dumps({"file_name": name, "text": captions(text)}) for name, text in sorted(chosen.items())]
    (options.out / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} pictures in {options.out}")


if __name__ == "__main__":
    main()
