"""Unpacks the captioned icons of one style into a folder that `calotype distill` reads.

    python recipes/icons/prepare.py ICONS OUT [--style flat] [--cyanotype]

ICONS holds pictures-128.tar and manifest.jsonl. A picture's captions are its name, mostly bare and sometimes in a
phrase, as the base model has learnt them. --cyanotype prints them in blue: a style that the base model has not seen.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from pathlib import Path

from PIL import Image, ImageOps

from calotype.images import on_white


def captions(name: str) -> list[str]:
    """Six times out of ten the bare name, else in a phrase; a list is drawn from evenly."""
    return [name] * 6 + [f"a {name}", f"an emoji of {name}", f"{name} emoji", f"{name} icon"]


def cyanotype(picture: Image.Image) -> Image.Image:
    """As that process prints it: Prussian blue for what is dark, on pale paper."""
    grey = ImageOps.grayscale(on_white(picture))
    return ImageOps.colorize(grey, (10, 30, 110), (225, 240, 255), mid=(60, 120, 220))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("icons", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--style", default="flat")
    parser.add_argument("--cyanotype", action="store_true")
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
                if options.cyanotype:
                    with Image.open(file) as picture:
                        cyanotype(picture).save(options.out / name, lossless=True)
                else:
                    (options.out / name).write_bytes(file.read())
    lines = [json.dumps({"file_name": name, "text": captions(text)}) for name, text in sorted(chosen.items())]
    (options.out / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} pictures in {options.out}")


if __name__ == "__main__":
    main()
