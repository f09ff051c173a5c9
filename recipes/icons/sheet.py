"""Shows what autoencoders make of icons that they have not seen: a row of originals, and a row for each of them.

python recipes/icons/sheet.py DATA sheet.png src/calotype/models/icons/vae runs/vae
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from scenes import SIZE, Icons, Scene, read_icons, render, unseen

from calotype.images import to_pil
from calotype.weights.load import load_vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("autoencoders", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=14)
    options = parser.parse_args()
    icons = read_icons(options.data)
    pictures = render(icons, [Scene((i,)) for i in chosen(icons, options.count)])
    rows = [pictures]
    for folder in options.autoencoders:
        net = load_vae(folder)
        with torch.inference_mode():
            rows.append(net.decode(net.encode(pictures)[0]))
        error = (rows[-1].clamp(-1, 1) - pictures).square().mean() / 4
        print(f"{folder}: {-10 * error.log10().item():.2f} dB on these {len(pictures)}")
    sheet = Image.new("RGB", (len(pictures) * SIZE, len(rows) * SIZE))
    for y, row in enumerate(rows):
        for x, picture in enumerate(to_pil(row)):
            sheet.paste(picture, (x * SIZE, y * SIZE))
    sheet.save(options.out)
    print(options.out)


def chosen(icons: Icons, count: int) -> list[int]:
    """Unseen icons evenly out of all styles."""
    judged = [i for i, row in enumerate(icons.rows) if unseen(row)]
    return judged[:: max(1, len(judged) // count)][:count]


if __name__ == "__main__":
    main()
