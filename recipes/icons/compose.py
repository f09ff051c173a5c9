"""Draws scenes of icons, each with captions, into a folder that `calotype distill` reads.

    python recipes/icons/compose.py DATA OUT [--copies 2]

DATA is what draw.py leaves. The scenes and captions are those that the base model is trained on (scenes.py), so that it
is distilled on what it knows. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from resumable import rng
from scenes import (
    Mix,
    caption,
    names_alone,
    read_icons,
    read_names,
    render,
    shown_and_held_out,
    told_scene,
    translated,
    weight,
)

from calotype.atomic import replacing
from calotype.images import to_pil

CAPTIONS = 4  # of a picture: a visit takes one of them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--copies", type=int, default=1, help="scenes of an icon; where the mix has less of it, fewer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="read that many icons, for a quick try")
    options = parser.parse_args()
    started = time.monotonic()
    icons, names = read_icons(options.data, options.limit), read_names(options.data)
    shown, _ = shown_and_held_out(icons.rows)
    mix = Mix(icons, shown)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for copy in range(options.copies):
        for i in shown:
            row, dice = icons.rows[i], rng(options.seed, copy * len(icons) + i)
            if dice.random() >= weight(row):
                continue
            scene = told_scene(icons, i, mix.mate(i, dice), dice)
            texts = [caption(icons, scene, dice) for _ in range(CAPTIONS)]
            if others := names_alone(icons, names, scene):
                texts.append(translated(others, dice))
            path = options.out / f"{row['id']:05d}-{copy}.webp"
            if not path.is_file():
                with replacing(path) as temporary:
                    to_pil(render(icons, [scene]))[0].save(temporary, "WEBP", lossless=True)
            lines.append(json.dumps({"file_name": path.name, "text": texts}, ensure_ascii=False))
    (options.out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} pictures in {options.out}; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
