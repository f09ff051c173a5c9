"""How often a picture is what was asked for: a judge picks its caption out of a hundred.

    python recipes/icons/retrieve.py DATA JUDGE MODEL [--steps 4]

DATA is what draw.py leaves. JUDGE is another run of train_text.py than the one the model grew from, with another seed
and `--held-out 400`: 200 pairs of a concept and a style that the model saw and the judge did not, and 200 that neither
saw, though each saw both of each pair elsewhere. Beside the real pictures of these pairs stand the model's, seed 0
onwards. Two things in one picture are cut apart and judged one by one. Concepts are asked for in other languages too,
by name alone, and in English phrases that nothing was trained on; these are judged by their English names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from phrases import NEVER
from scenes import SIZE, Scene, held_out_pairs, read_icons, read_names, render, with_article
from torch import Tensor
from train_base import one_and_two
from train_text import CHOICES, LANGUAGES, name_in, picked, read_towers

from calotype.parts import Parts
from calotype.training.draw import Series
from calotype.weights.load import load_parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("judge", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, help="default: the model's")
    parser.add_argument("--sampler", help="default: the model's")
    parser.add_argument("--count", type=int, default=200, help="pairs of each kind, in hundreds")
    options = parser.parse_args()
    icons, names = read_icons(options.data), read_names(options.data)
    judge, tokenizer = read_towers(options.judge)
    parts = load_parts(str(options.model))
    unseen = held_out_pairs(icons.rows, 200)
    pairs = {"seen": held_out_pairs(icons.rows, 400) - unseen, "unseen": unseen}

    def found(pictures: Tensor, texts: Sequence[str]) -> float:
        """The share of pictures (n, 3, 128, 128) whose own text is the nearest, hundred by hundred."""
        seen = torch.cat([judge.see(some) for some in pictures.split(CHOICES)])
        return picked(judge, tokenizer, seen, texts)

    table: dict[str, dict[str, float]] = {}
    for kind, ids in pairs.items():
        rows = [i for i, row in enumerate(icons.rows) if row["id"] in ids][: options.count]
        texts = [name_in("en", icons.rows[i], names) for i in rows]
        real = found(render(icons, [Scene((i,)) for i in rows]), texts)
        table[f"concept and style, {kind}"] = {"real": real, "drawn": found(drawn(parts, texts, options), texts)}
    rows = [i for i, row in enumerate(icons.rows) if row["id"] in pairs["seen"]]
    many = max(options.count // 2 // CHOICES, 1) * CHOICES
    scenes, asked = (some[:many] for some in one_and_two(icons, rows)["two"])
    real, made = (halves(pictures) for pictures in (render(icons, scenes), drawn(parts, asked, options)))
    for side, name in enumerate(("left", "right")):
        texts = [name_in("en", icons.rows[scene.icons[side]], names) for scene in scenes]
        table[f"the {name} of two"] = {"real": found(real[side], texts), "drawn": found(made[side], texts)}
    rows = rows[: options.count]
    english = [icons.rows[i]["name"].lower() for i in rows]
    for language in LANGUAGES:
        asked = english if language == "en" else [name_in(language, icons.rows[i], names) for i in rows]
        table[f"concept, asked in {language}"] = {"drawn": found(drawn(parts, asked, options), english)}
    asked = [NEVER[i % len(NEVER)].format(with_article(name)) for i, name in enumerate(english)]
    table["concept, asked in other words"] = {"drawn": found(drawn(parts, asked, options), english)}
    for name, figures in table.items():
        print(f"{name}: {', '.join(f'{who} {share:.3f}' for who, share in figures.items())}")
    print(json.dumps(table))


def halves(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The left and the right one of two side by side (n, 3, 128, 128), each as large as one by itself."""
    quarter, half = SIZE // 4, SIZE // 2
    strip = F.interpolate(pictures[:, :, quarter:-quarter], scale_factor=2, mode="bilinear")
    return strip[..., : 2 * half], strip[..., 2 * half :]


def drawn(parts: Parts, prompts: Sequence[str], options: argparse.Namespace) -> Tensor:
    """The model's pictures (n, 3, 128, 128) in [-1, 1], the i-th with seed i."""
    defaults = parts.defaults
    sampler = options.sampler or defaults.sampler
    guidance = defaults.guidance if options.guidance is None else options.guidance
    series = Series(parts, sampler, options.steps, guidance, tuple(prompts), tuple(range(len(prompts))))
    return torch.cat([piece.draw() for piece in series.shards(20)]).float() / 127.5 - 1


if __name__ == "__main__":
    main()
