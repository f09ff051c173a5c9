"""Teaches a text encoder what the icons' captions mean, before any picture is drawn: contrastively, as CLIP was taught.

    python recipes/icons/train_text.py DATA OUT [--steps 2500]

DATA is what draw.py leaves. OUT becomes a folder with `tokenizer` and `text_encoder` (which train_base.py goes on from)
and the two towers whole (which retrieve.py judges pictures by). The run can be stopped at any moment; the same command
goes on with it.

A diffusion model's loss says little of a text: most of its error is the noise's. To tell pictures apart by their
captions says all, at a twentieth of the cost a caption; and where captions in five languages belong to one picture,
they come to mean the same. Loss: Radford et al. 2021 (arXiv 2103.00020, Figure 3), but with every picture of the batch
that a caption is true of as right as its own: "cat" is true of a flat cat and of one in 3d, "cat, flat style" is not.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from folders import read_part, write_json, write_part
from resumable import Average, Run, add_options, autocast, learn, pick_device, rng
from scenes import (
    STYLES,
    Icons,
    Mix,
    Names,
    Scene,
    caption,
    read_icons,
    read_names,
    render,
    shown_and_held_out,
    told_scene,
    translated,
)
from torch import Tensor, nn
from train_features import add_norms
from words import LENGTH, build_tokenizer, tokens, vocabulary

from calotype.nn.clip import CLIPText, CLIPTextConfig
from calotype.text.tokenizer import Tokenizer
from calotype.training.features import FeatureConfig, FeatureNet

DIM = 256  # in which both towers meet
CHOICES = 100  # captions that a picture's own is picked from
LANGUAGES = ("en", "ar", "es", "fr", "zh")
FOREIGN = 0.4  # share of captions in another language, where there is one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--held-out", type=int, default=200, help="pairs of concept and style that are never shown")
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2500, help="may be another when a run goes on")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--rate", type=float, default=1e-3)
    add_options(parser, save_every=250)
    train(parser.parse_args())


# ---- what is shown ----


@dataclass(frozen=True)
class Told:
    """A scene and its caption, and what of the scene the caption tells."""

    scene: Scene
    text: str
    concepts: tuple[str, ...]
    style: str  # "" where nothing is said of it

    def true_of(self, other: Told, style: str) -> bool:
        """Whether this caption describes the other's picture, which is in a style."""
        scene = self.scene
        return (
            self.concepts == other.concepts
            and self.style in ("", style)
            and scene.ground in ("", other.scene.ground)
            and scene.color in ("", other.scene.color)
        )


class Batches:
    """The captioned scenes of each step, half of them the other half's concepts in other styles."""

    def __init__(self, icons: Icons, names: Names, shown: Sequence[int], seed: int) -> None:
        self.icons, self.names, self.mix, self.seed = icons, names, Mix(icons, shown), seed
        self.kin: dict[str, list[int]] = defaultdict(list)
        for i in shown:
            self.kin[concept(icons.rows[i])].append(i)

    def __call__(self, step: int, count: int) -> list[Told]:
        dice = rng(self.seed, step)
        drawn = self.mix.pairs(count, dice)
        for i in range(count // 2, count):
            kin = self.kin[concept(self.icons.rows[drawn[i - count // 2][0]])]
            first = kin[int(dice.integers(len(kin)))]
            drawn[i] = first, self.mix.mate(first, dice)
        return [self.tell(told_scene(self.icons, first, second, dice), dice) for first, second in drawn]

    def tell(self, scene: Scene, dice: np.random.Generator) -> Told:
        rows = [self.icons.rows[i] for i in scene.icons]
        concepts = tuple(concept(row) for row in rows)
        names = self.names.get(rows[0]["hex"] or "")
        if names and scene.plain and dice.random() < FOREIGN:
            return Told(scene, translated(names, dice), concepts, "")
        text = ""
        while not text:
            text = caption(self.icons, scene, dice)
        style = rows[0]["style"] if len(rows) == 1 and any(word in text for word in STYLES[rows[0]["style"]]) else ""
        return Told(scene, text, concepts, style)


def concept(row: dict[str, Any]) -> str:
    return str(row["hex"] or row["caption"])


def truths(told: Sequence[Told], icons: Icons) -> Tensor:
    """(B, B): 1 where the caption of the row is true of the column's picture."""
    styles = [icons.rows[one.scene.icons[0]]["style"] for one in told]
    return torch.tensor(
        [[float(one.true_of(other, style)) for other, style in zip(told, styles, strict=True)] for one in told]
    )


# ---- what is trained ----


class Towers(nn.Module):
    """A text encoder and a picture network whose outputs meet in one space."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.text = CLIPText(config)
        embeddings = self.text.text_model.embeddings
        for table in (embeddings.token_embedding, embeddings.position_embedding):
            nn.init.normal_(table.weight, std=0.02)
        features = FeatureConfig(channels=(32, 64, 128, 256))
        self.picture = FeatureNet(features)
        add_norms(self.picture)
        self.norm = nn.BatchNorm1d(features.dim, affine=False)
        self.from_picture = nn.Linear(features.dim, DIM)
        self.from_text = nn.Linear(config.width, DIM, bias=False)
        self.scale = nn.Parameter(torch.tensor(14.0).log())

    def see(self, x: Tensor) -> Tensor:
        """Directions (B, DIM) of pictures (B, 3, 128, 128) in [-1, 1]."""
        pooled = self.picture.pooled(x.contiguous(memory_format=torch.channels_last))
        return F.normalize(self.from_picture(self.norm(pooled.float())).float(), dim=-1)

    def read(self, ids: Tensor) -> Tensor:
        """Directions (B, DIM) of token ids (B, L)."""
        longest = int(self.text.end_of_text(ids).max()) + 1  # a token sees those before it alone
        return F.normalize(self.from_text(self.text(ids[:, :longest]).pooled).float(), dim=-1)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Logits (B, B), of captions against pictures."""
        return self.read(ids) @ self.see(x).T * self.scale.clamp(max=4.6).exp()  # at most 100, as CLIP's


def loss_of(logits: Tensor, truth: Tensor) -> Tensor:
    """To find the pictures of a caption, and the captions of a picture."""
    rows, columns = truth / truth.sum(1, keepdim=True), truth / truth.sum(0, keepdim=True)
    return -(rows * logits.log_softmax(1)).sum(1).mean() / 2 - (columns * logits.log_softmax(0)).sum(0).mean() / 2


def text_config(tokenizer: Tokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=tokenizer.size, width=width, intermediate=4 * width, layers=layers, heads=width // 64,
        positions=LENGTH, eos_token_id=tokenizer.eos,
    )  # fmt: skip


def train(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    torch.manual_seed(options.seed)
    icons, names = read_icons(options.data, options.limit), read_names(options.data)
    shown, judged = shown_and_held_out(icons.rows, options.held_out)
    tokenizer = tokenizer_of(options.out / "tokenizer", options.vocabulary, vocabulary(icons, names))
    print(f"{len(shown)} icons, {len(judged)} held out, {tokenizer.size} tokens, {len(names)} emoji in other languages")

    model = Towers(text_config(tokenizer, options.width, options.layers)).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = Average(model, decay=0.998)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.05, betas=(0.9, 0.98))
    kept = ("held_out", "vocabulary", "width", "layers", "batch", "rate", "seed")
    settings = {name: getattr(options, name) for name in kept}
    run = Run(options.out, settings, {"model": model, "average": average, "optimizer": optimizer})
    batches = Batches(icons, names, shown, options.seed)

    def loss(step: int) -> Tensor:
        told = batches(step, options.batch)
        x = render(icons, [one.scene for one in told], device)
        ids, truth = tokens(tokenizer, [one.text for one in told]).to(device), truths(told, icons).to(device)
        with autocast(device, options.float32):
            logits = model(x, ids)
        return loss_of(logits, truth)

    def figures() -> dict[str, float]:
        return retrieval(average, tokenizer, icons, names, judged)

    learn(run, options, model, average, optimizer, loss, fall=0.5, figures=figures)
    export(average, tokenizer, options.out, {**settings, "steps": run.step, "seconds": round(run.elapsed)})
    print(f"{options.out}: {run.step} steps of {options.batch}; {run.elapsed:.0f} s")


@torch.no_grad()
def retrieval(
    average: Average, tokenizer: Tokenizer, icons: Icons, names: Names, judged: Sequence[int]
) -> dict[str, float]:
    """How often a picture's own caption is the nearest of a hundred, for held-out pictures; by language."""
    towers: Any = average.network
    device = next(towers.parameters()).device
    some = judged[: len(judged) - len(judged) % CHOICES]
    if not some:
        return {}
    seen = torch.cat(
        [
            towers.see(render(icons, [Scene((i,)) for i in some[at : at + CHOICES]], device))
            for at in range(0, len(some), CHOICES)
        ]
    )
    return {
        language: picked(towers, tokenizer, seen, [name_in(language, icons.rows[i], names) for i in some])
        for language in LANGUAGES
    }


@torch.no_grad()
def picked(towers: Towers, tokenizer: Tokenizer, seen: Tensor, texts: Sequence[str]) -> float:
    """The share of pictures, by their directions (n, DIM), whose own text is the nearest, hundred by hundred."""
    right = []
    for at in range(0, len(texts), CHOICES):
        read = towers.read(tokens(tokenizer, texts[at : at + CHOICES]).to(seen.device))
        nearest = (seen[at : at + CHOICES] @ read.T).argmax(1).cpu()
        right.append((nearest == torch.arange(CHOICES)).float())
    return torch.cat(right).mean().item()


def name_in(language: str, row: dict[str, Any], names: Names) -> str:
    """What a picture shows, with its style where the language is English."""
    if language == "en":
        return f"{row['name']}, {STYLES[row['style']][0]} style".lower()
    return names.get(row["hex"] or "", {}).get(language, [row["name"]])[0].lower()


def tokenizer_of(folder: Path, size: int, texts: Iterable[str]) -> Tokenizer:
    """The run's own, or a new one where it begins."""
    if (folder / "tokenizer_config.json").is_file():
        return Tokenizer.load(folder)
    return build_tokenizer(texts, size, folder)


# ---- what is written, and read again ----


def text_content(config: CLIPTextConfig) -> dict[str, Any]:
    """A text encoder's config.json."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.positions,
        "hidden_act": config.activation,
        "layer_norm_eps": config.eps,
        "projection_dim": config.width,
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.eos_token_id,
    }


def export(average: Average, tokenizer: Tokenizer, folder: Path, told: dict[str, Any]) -> None:
    towers: Any = average.network
    config = towers.text.config
    write_part(folder / "text_encoder", "model", towers.text.state_dict(), text_content(config))
    write_part(folder / "towers", "model", towers.state_dict(), {"width": config.width, "layers": config.layers})
    write_json(folder / "training.json", told)


def read_towers(folder: Path) -> tuple[Towers, Tokenizer]:
    """What export left, to judge by."""
    if not (folder / "towers" / "config.json").is_file():
        raise SystemExit(f"{folder} has no towers: train them with recipes/icons/train_text.py")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    config = json.loads((folder / "towers" / "config.json").read_text(encoding="utf-8"))
    towers = Towers(text_config(tokenizer, config["width"], config["layers"]))
    weights = read_part(folder / "towers")
    towers.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return towers.eval().requires_grad_(False), tokenizer


if __name__ == "__main__":
    main()
