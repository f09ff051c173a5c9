"""Draws the pictures of docs/tasks.md: `python recipes/icons/tasks.py docs/images`.

The LoRAs' pictures are the base model's, all others the shipped model's. Every picture has seed 0 where no other is
named; none was chosen.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

import calotype
from calotype.images import grid
from calotype.stills import save

HERE = Path(__file__).parent
ADAPTERS = HERE / "adapters"
SIDE = 128
Shape = tuple[str, tuple[int, ...], str]  # what ImageDraw draws, where, in which colour

SKETCHES: dict[str, tuple[Shape, ...]] = {
    "person": (
        ("ellipse", (30, 60, 98, 150), "#d02030"),
        ("ellipse", (40, 20, 88, 74), "#f0b030"),
        ("rectangle", (40, 14, 88, 34), "#603018"),
    ),
    "car": (
        ("rectangle", (12, 44, 116, 88), "#e03020"),
        ("rectangle", (90, 30, 116, 60), "#80c0f0"),
        ("ellipse", (24, 78, 46, 100), "#303030"),
        ("ellipse", (82, 78, 104, 100), "#303030"),
    ),
    "face": (
        ("ellipse", (12, 12, 116, 116), "#ffc020"),
        ("ellipse", (38, 44, 50, 60), "#402010"),
        ("ellipse", (78, 44, 90, 60), "#402010"),
        ("rectangle", (44, 80, 84, 88), "#402010"),
    ),
}
IMAGE_TO_IMAGE = (
    ("person", ("santa claus", "woman firefighter", "vampire", "old man", "man farmer")),
    ("car", ("fire engine", "taxi", "bus", "delivery truck", "racing car")),
    ("face", ("grinning face", "angry face", "face with tears of joy", "crying face", "smiling face with heart-eyes")),
)
STRENGTH, LOOSE = 0.7, 0.9
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
# What is there, what is painted, and the ellipse of the mask.
INPAINTING = (
    ("astronaut", "astronaut", (30, 14, 98, 76)),
    ("santa claus", "old man", (20, 10, 110, 70)),
    ("grinning face", "smiling face with heart-eyes", (10, 20, 118, 72)),
)
LORA_PROMPTS = (
    "astronaut",
    "santa claus",
    "woman firefighter",
    "thumbs up",
    "full moon",
    "fire engine",
    "red heart",
    "crying face",
)
STYLE_SCALES = (0.4, 0.6, 0.8)
MIXED = 0.6
FEW = {"sampler": "tcd", "steps": 4, "guidance": 1.0}  # with the LCM-LoRA


def sketch(shapes: tuple[Shape, ...]) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(picture)
    for kind, box, colour in shapes:
        getattr(draw, kind)(box, fill=colour)
    return picture


def image_to_image(engine: calotype.Engine) -> Image.Image:
    pictures, titles = [], []
    for name, prompts in IMAGE_TO_IMAGE:
        start = sketch(SKETCHES[name])
        pictures += [start, *(engine(prompt, image=start, strength=STRENGTH, seed=0).image for prompt in prompts)]
        titles.append(f"{', '.join(prompts)}; strength {STRENGTH}")
    start = sketch(SKETCHES["person"])
    pictures += [start, *(engine("vampire", image=start, strength=each, seed=0).image for each in STRENGTHS)]
    titles.append(f"vampire; strength {', '.join(map(str, STRENGTHS))}")
    return grid(pictures, columns=1 + len(STRENGTHS), row_titles=titles)


def inpainting(engine: calotype.Engine) -> Image.Image:
    pictures, titles = [], []
    grey = Image.new("RGB", (SIDE, SIDE), (190, 190, 190))
    for before, inside, box in INPAINTING:
        start, mask = engine(before, seed=0).image, Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(mask).ellipse(box, fill=255)
        painted = [engine(inside, seed=s, image=start, mask=mask, mask_feather=4).image for s in range(4)]
        pictures += [start, Image.composite(grey, start, mask), *painted]
        titles.append(f"{inside}; seeds 0 to 3")
    return grid(pictures, columns=6, row_titles=titles)


def loras(engine: calotype.Engine) -> Image.Image:
    """By rows: the base model in 25 steps and in 4, an LCM-LoRA, and a style beside it by weight."""
    rows: list[tuple[str, dict[str, float], dict[str, object]]] = [
        ("base, 25 steps, guidance 5 (50 evaluations)", {}, {"steps": 25, "guidance": 5.0}),
        ("base, 4 steps, guidance 5 (8 evaluations)", {}, {"steps": 4, "guidance": 5.0}),
        ("LCM-LoRA, 4 steps, guidance 1 (4 evaluations)", {"lcm": 1.0}, FEW),
        *((f"LCM-LoRA 1.0 and badge {scale}", {"lcm": 1.0, "badge": scale}, FEW) for scale in STYLE_SCALES),
    ]
    pictures = []
    for _, mix, fields in rows:
        engine.set_loras(mix)
        pictures += [engine(prompt, seed=0, **fields).image for prompt in LORA_PROMPTS]
    return grid(pictures, len(LORA_PROMPTS), column_titles=LORA_PROMPTS, row_titles=[title for title, *_ in rows])


def controls(engine: calotype.Engine) -> Image.Image:
    """The edges of each sketch, and what is drawn along them with a ControlNet."""
    edges = engine.add_control(ADAPTERS / "canny")
    pictures, titles = [], []
    for name, prompts in IMAGE_TO_IMAGE:
        hint = calotype.canny(sketch(SKETCHES[name]))
        steered = [calotype.Control(edges, image=hint)]
        pictures += [hint, *(engine(prompt, controls=steered, seed=0).image for prompt in prompts)]
        titles.append(", ".join(prompts))
    return grid(pictures, columns=6, row_titles=titles)


def together(engine: calotype.Engine) -> Image.Image:
    """All at once, on the base model: edges with an LCM-LoRA, a style besides, and the sketch's colours besides."""
    edges = engine.add_control(ADAPTERS / "canny")
    pictures, titles = [], []
    for name, prompts in IMAGE_TO_IMAGE[1:]:
        start = sketch(SKETCHES[name])
        hint = calotype.canny(start)
        rows: list[tuple[str, dict[str, float], dict[str, object]]] = [
            ("LCM-LoRA and ControlNet", {"lcm": 1.0}, {}),
            (f"and badge {MIXED}", {"lcm": 1.0, "badge": MIXED}, {}),
            (f"and the sketch, strength {LOOSE}", {"lcm": 1.0, "badge": MIXED}, {"image": start, "strength": LOOSE}),
        ]
        for title, mix, fields in rows:
            engine.set_loras(mix)
            steered = [calotype.Control(edges, image=hint)]
            pictures += [start if fields else hint]
            pictures += [engine(prompt, controls=steered, seed=0, **FEW, **fields).image for prompt in prompts]
            titles.append(title)
    return grid(pictures, columns=6, row_titles=titles)


def main() -> None:
    folder = Path(sys.argv[1])
    shipped, base = calotype.load(), calotype.load(HERE / "base")
    base.add_lora(ADAPTERS / "lcm-lora.safetensors", name="lcm")
    base.add_lora(ADAPTERS / "badge.safetensors", name="badge")
    sheets = {
        "image-to-image": image_to_image(shipped),
        "inpainting": inpainting(shipped),
        "loras": loras(base),
        "controls": controls(shipped),
        "together": together(base),
    }
    for name, sheet in sheets.items():
        save(sheet, folder / f"{name}.png")


if __name__ == "__main__":
    main()
