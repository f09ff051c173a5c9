"""Draws the README's grid: 16 prompts x 1, 2, 4, 8 steps of the shipped model, above its teacher's 50.

    python recipes/icons/gallery.py docs/images/grid.png

Every picture has seed 0; none was chosen.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import calotype
from calotype.images import grid, save_png

PROMPTS = (
    "astronaut",
    "red heart",
    "grinning cat",
    "thumbs up",
    "taxi",
    "fire engine",
    "santa claus",
    "mushroom",
    "full moon",
    "basketball",
    "baby",
    "vampire",
    "clapping hands",
    "panda",
    "crying face",
    "old man",
)


def main() -> None:
    output = Path(sys.argv[1])
    student = calotype.load()
    base = calotype.load(Path(__file__).parent / "base")
    trailing = dataclasses.replace(base.parts.schedule, spacing="trailing")  # begins at the last timestep, as LCMs do
    teacher = calotype.Engine(dataclasses.replace(base.parts, schedule=trailing), base.describe())
    rows = {f"{n} step{'s' if n > 1 else ''}": (student, n) for n in (1, 2, 4, 8)} | {"teacher, 50": (teacher, 50)}
    pictures = [
        engine(prompt, steps=steps, guidance=student.parts.defaults.guidance, seed=0).image
        for engine, steps in rows.values()
        for prompt in PROMPTS
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet = grid(
        [picture.resize((96, 96)) for picture in pictures], len(PROMPTS), column_titles=PROMPTS, row_titles=list(rows)
    )
    save_png(sheet, output)


if __name__ == "__main__":
    main()
