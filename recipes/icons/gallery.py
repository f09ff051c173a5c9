"""Draws the pictures of docs/gallery.md and the README's grid: `python recipes/icons/gallery.py docs/images`.

Every picture has seed 0 where no other is named; prompts were fixed before the model was trained, and none was chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

import calotype
from calotype.images import grid
from calotype.stills import save

HERE = Path(__file__).parent
PROMPTS = (
    "astronaut",
    "a red apple, 3d style",
    "grinning cat",
    "thumbs up, flat style",
    "taxi",
    "fire engine, 3d style",
    "santa claus",
    "mushroom, flat style",
    "full moon",
    "basketball",
    "a blue car",
    "vampire, blob style",
    "a slice of pizza",
    "panda",
    "crying face, 3d style",
    "a cat and a rocket, flat",
)
THINGS = ("cat", "red apple", "rocket", "robot")
STYLES = ("flat", "3d", "shaded", "blob", "simple", "vivid", "muted", "outline", "clip art", "line art")
LANGUAGES = {
    "English": ("cat", "rose", "car", "fire", "crown", "pizza"),
    "Arabic": ("قطة", "وردة", "سيارة", "نار", "تاج", "بيتزا"),
    "Chinese": ("猫", "玫瑰", "汽车", "火焰", "皇冠", "披萨"),
    "French": ("chat", "rose", "voiture", "feu", "couronne", "pizza"),
    "Spanish": ("gato", "rosa", "coche", "fuego", "corona", "pizza"),
}
# The last one nothing was trained on.
PHRASES = (
    "a {}",
    "a picture of a {}",
    "draw me a {}!",
    "the {}, please",
    "could you paint a {}",
)
COLORED = (
    "a blue apple",
    "a green car",
    "a purple bird",
    "a cat, on a yellow background",
    "a dog and a ball",
    "a tree left of a house",
)
STEPS = (1, 2, 4, 8)
GUIDANCES = (1, 2, 4, 6, 8, 10)


def draw(engine: calotype.Engine, prompts: Sequence[str], **fields: object) -> list[Image.Image]:
    return [engine(prompt, **{"seed": 0, **fields}).image for prompt in prompts]


def teacher_of(base: calotype.Engine) -> calotype.Engine:
    """The base model on timesteps that begin at the last one, as an LCM's do."""
    trailing = dataclasses.replace(base.parts.schedule, spacing="trailing")
    return calotype.Engine(dataclasses.replace(base.parts, schedule=trailing), {})


def readme(student: calotype.Engine, base: calotype.Engine) -> Image.Image:
    guidance = student.parts.defaults.guidance
    pictures, titles = [], []
    for n in STEPS:
        pictures += draw(student, PROMPTS, steps=n)
        titles.append(f"{n} step{'s' if n > 1 else ''}")
    pictures += draw(teacher_of(base), PROMPTS, steps=50, guidance=guidance)
    small = [picture.resize((96, 96)) for picture in pictures]
    return grid(small, len(PROMPTS), column_titles=PROMPTS, row_titles=[*titles, "teacher, 50"])


def styles(student: calotype.Engine, _: calotype.Engine) -> Image.Image:
    prompts = [f"{thing}, {style} style" for thing in THINGS for style in STYLES]
    return grid(draw(student, prompts), len(STYLES), column_titles=STYLES, row_titles=THINGS)


def languages(student: calotype.Engine, _: calotype.Engine) -> Image.Image:
    pictures = [picture for words in LANGUAGES.values() for picture in draw(student, words)]
    return grid(pictures, len(LANGUAGES["English"]), column_titles=LANGUAGES["English"], row_titles=list(LANGUAGES))


def phrases(student: calotype.Engine, _: calotype.Engine) -> Image.Image:
    things = LANGUAGES["English"]
    prompts = [phrase.format(thing) for phrase in PHRASES for thing in things]
    return grid(draw(student, prompts), len(things), column_titles=things, row_titles=PHRASES)


def colors(student: calotype.Engine, _: calotype.Engine) -> Image.Image:
    return grid(draw(student, COLORED), len(COLORED), column_titles=COLORED)


def guidances(student: calotype.Engine, _: calotype.Engine) -> Image.Image:
    pictures = [picture for thing in THINGS for picture in (draw(student, [thing], guidance=w)[0] for w in GUIDANCES)]
    return grid(pictures, len(GUIDANCES), column_titles=[f"guidance {w}" for w in GUIDANCES], row_titles=THINGS)


def seeds(student: calotype.Engine, _: calotype.Engine) -> Image.Image:
    pictures = [picture for thing in THINGS for picture in (draw(student, [thing], seed=s)[0] for s in range(8))]
    return grid(pictures, 8, column_titles=[f"seed {s}" for s in range(8)], row_titles=THINGS)


SHEETS: dict[str, Callable[[calotype.Engine, calotype.Engine], Image.Image]] = {
    "grid": readme,
    "styles": styles,
    "languages": languages,
    "phrases": phrases,
    "colors": colors,
    "guidance": guidances,
    "seeds": seeds,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, help="default: the shipped model")
    parser.add_argument("--base", type=Path, default=HERE / "base")
    parser.add_argument("--only", choices=tuple(SHEETS), action="append", help="may be given several times")
    options = parser.parse_args()
    student = calotype.load() if options.model is None else calotype.load(options.model)
    base = calotype.load(options.base)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or SHEETS:
        save(SHEETS[name](student, base), options.out / f"{name}.png")
        print(options.out / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
