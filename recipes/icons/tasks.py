"""Image to image and inpainting with the shipped model, as a sheet of pictures: tasks.py SHEET.png"""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw

import calotype
from calotype.images import grid, save_png

STRENGTHS = (0.3, 0.5, 0.7, 0.9)
CHANGES = (("cat face", "dog face"), ("red heart", "green heart"), ("grinning face", "angry face"))
HOLES = (("astronaut", "cat face", (40, 18, 92, 66)), ("mushroom", "green heart", (20, 8, 108, 70)))


def with_hole(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with what the mask repaints in grey."""
    return Image.composite(Image.new("RGB", picture.size, (190, 190, 190)), picture, mask)


def main() -> None:
    engine = calotype.load()
    pictures, titles = [], []
    for before, after in CHANGES:
        start = engine(before, seed=0).image
        pictures += [start, *(engine(after, seed=0, image=start, strength=s).image for s in STRENGTHS)]
        titles.append(f"{before}, then {after} at strength {', '.join(map(str, STRENGTHS))}")
    for before, inside, box in HOLES:
        start = engine(before, seed=0).image
        mask = Image.new("L", start.size)
        ImageDraw.Draw(mask).ellipse(box, fill=255)
        painted = [engine(inside, seed=s, image=start, mask=mask, mask_feather=4).image for s in range(3)]
        pictures += [start, with_hole(start, mask), *painted]
        titles.append(f"{before}, its mask, then {inside} with seeds 0, 1, 2")
    save_png(grid(pictures, columns=1 + len(STRENGTHS), row_titles=titles), sys.argv[1])


if __name__ == "__main__":
    main()
