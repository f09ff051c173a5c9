"""Teaches a finished model's text encoder other ways of asking: in other languages, and in English as people write.

    python recipes/icons/train_phrases.py DATA BASE OUT [--steps 900]

DATA is what draw.py leaves, BASE what train_base.py leaves. OUT becomes a folder with `text_encoder`, for the base
model and for all that was distilled from it: no other part changes. The run can be stopped at any moment; the same
command goes on with it.

"قطة", "a picture of a cat" and "draw me a cat!" have other tokens than "cat", and other numbers of them, so their
features can't be equal one by one. What they mean to the U-Net can: what each of its cross-attentions reads from them,
whatever it looks for. So the student is asked by queries that the U-Net had while it drew, and has to answer to all of
these what the encoder as it was answers to "cat"; and to a caption what it always answered. No picture is drawn, and
there is no noise in what is to be learnt: a phrase costs a fifth of a caption in train_base.py.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from folders import write_json, write_part
from muon import Muon, groups
from numpy.random import Generator
from phrases import abroad, in_other_words
from resumable import Average, Run, add_options, autocast, learn, pick_device, rng
from scenes import (
    Icons,
    Mix,
    Names,
    Scene,
    caption,
    names_alone,
    read_icons,
    read_names,
    render,
    shown_and_held_out,
    told_scene,
)
from torch import Tensor, nn
from train_base import Steps, chances, latents_of
from train_text import text_content
from words import tokens

from calotype.nn.attention import Attention
from calotype.nn.unet import Conditioning
from calotype.nn.vae import AutoencoderKL
from calotype.parts import Parts
from calotype.text.tokenizer import Tokenizer
from calotype.weights.load import load_parts

KEPT, FOREIGN = 0.2, 0.45  # shares of captions whose meaning is to stay, and of other languages; the rest is English
PICTURES = 128  # that queries are taken from
QUERIES = 32  # of each layer, for each caption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=900, help="may be another when a run goes on")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    add_options(parser, save_every=50)
    train(parser.parse_args())


# ---- what is said ----


class Sayings:
    """Phrases, and the captions that say the same: a pure function of a step's number."""

    def __init__(self, icons: Icons, names: Names, shown: Sequence[int], seed: int) -> None:
        self.icons, self.mix, self.seed = icons, Mix(icons, shown), seed
        found: dict[str, tuple[str, dict[str, list[str]]]] = {}  # by code points
        for i in shown:
            if others := names_alone(icons, names, Scene((i,))):
                found.setdefault(icons.rows[i]["hex"], (icons.rows[i]["name"].lower(), others))
        self.translated = list(found.values())  # the English name, and those in other languages
        if not self.translated:
            raise SystemExit("no icon has a name in another language: names.json of draw.py has them")

    def kinds(self, count: int) -> dict[str, slice]:
        """Where what is kept, other languages and other English stand in a step."""
        kept, foreign = round(KEPT * count), round((KEPT + FOREIGN) * count)
        return {"kept": slice(kept), "foreign": slice(kept, foreign), "english": slice(foreign, count)}

    def __call__(self, step: int, count: int) -> tuple[list[str], list[str]]:
        """What is said, and what it is to mean."""
        dice = rng(self.seed, step)
        kept, foreign, english = (len(range(count)[kind]) for kind in self.kinds(count).values())
        scenes = [told_scene(self.icons, *pair, dice) for pair in self.mix.pairs(kept + english, dice)]
        pairs = [(text, text) for text in (caption(self.icons, scene, dice) for scene in scenes[:kept])]
        chosen = [self.translated[i] for i in dice.integers(len(self.translated), size=foreign)]
        pairs += [(abroad(others, dice), name) for name, others in chosen]
        pairs += [in_other_words(self.icons, scene, dice) for scene in scenes[kept:]]
        return [said for said, _ in pairs], [meant for _, meant in pairs]


# ---- what is asked ----


class Reader(nn.Module):
    """The cross-attentions of a U-Net, with queries that they had; a text is what they read from it."""

    def __init__(self, layers: Sequence[Attention], asked: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers).requires_grad_(False)
        self.asked = asked  # of each layer (n, C): its inputs, at places of pictures

    def forward(self, context: Tensor, chosen: Sequence[Tensor]) -> list[Tensor]:
        """What each layer reads (B, QUERIES, C) from texts' features (B, L, D); `chosen` are rows of `asked`."""
        questions = zip(self.layers, self.asked, chosen, strict=True)
        return [layer(asked[rows], context) for layer, asked, rows in questions]

    def choose(self, count: int, dice: Generator) -> list[Tensor]:
        """Rows (B, QUERIES) of each layer's inputs."""
        return [torch.from_numpy(dice.integers(len(asked), size=(count, QUERIES))) for asked in self.asked]


@torch.no_grad()
def reader_of(parts: Parts, icons: Icons, steps: Steps, seed: int) -> Reader:
    """What the U-Net's layers look for at all noise levels, in pictures that its captions describe."""
    (text,), vae, schedule = parts.text.models, parts.vae, parts.schedule
    assert isinstance(vae, AutoencoderKL)
    layers = [each for name, each in parts.unet.named_modules() if name.endswith(".attn2")]
    asked: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    hooks = [layer.register_forward_hook(lambda one, inputs, _: asked[one].append(inputs[0])) for layer in layers]
    device = next(text.parameters()).device
    for step in range(PICTURES // steps.batch):
        scenes, ids = steps[step]
        x0 = latents_of(vae, render(icons, scenes, device))
        noise, t = chances(x0, seed, step, schedule.T)
        parts.unet(schedule.add_noise(x0, noise, t), t, Conditioning(text(ids.to(device)).last))
    for hook in hooks:
        hook.remove()
    return Reader(layers, [torch.cat(asked[layer]).flatten(0, 1) for layer in layers])


def loss_of(read: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The error of what each layer reads, as a share of what texts differ by there; the layers' mean."""
    shares = []
    for one, other in zip(read, wanted, strict=True):
        spread = (other - other.mean(dim=0)).square().mean()
        shares.append((one - other).square().mean() / spread)
    return torch.stack(shares).mean()


# ---- training ----


def train(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    torch.manual_seed(options.seed)
    icons, names = read_icons(options.data, options.limit), read_names(options.data)
    shown, _ = shown_and_held_out(icons.rows)
    sayings = Sayings(icons, names, shown, options.seed)
    parts = load_parts(str(options.base), device=device)
    (before,) = parts.text.models
    tokenizer = Tokenizer.load(options.base / "tokenizer")
    reader = reader_of(parts, icons, Steps(icons, shown, tokenizer, names, 32, options.seed), options.seed)
    print(f"{len(sayings.translated)} names in other languages; {len(reader.layers)} layers read them", flush=True)

    model = copy.deepcopy(before).requires_grad_(True)
    average = Average(model, decay=0.99)
    optimizer = Muon(groups(model, model.text_model.embeddings.parameters()), lr=options.rate)
    settings = {name: getattr(options, name) for name in ("batch", "rate", "seed")}
    run = Run(options.out, settings, {"model": model, "average": average, "optimizer": optimizer})

    def asked(network: nn.Module, step: int) -> tuple[list[Tensor], list[Tensor]]:
        said, meant = (tokens(tokenizer, each).to(device) for each in sayings(step, options.batch))
        chosen = reader.choose(options.batch, rng(options.seed + 1, step))
        with torch.no_grad():
            wanted = reader(before(meant).last, chosen)
        return reader(network(said).last, chosen), wanted

    def loss(step: int) -> Tensor:
        with autocast(device, options.float32):
            read, wanted = asked(model, step)
        return loss_of([each.float() for each in read], [each.float() for each in wanted])

    @torch.no_grad()
    def figures() -> dict[str, float]:
        read, wanted = asked(average.network, options.steps)  # captions of a step that is never learnt from
        return {
            kind: loss_of([each[some] for each in read], [each[some] for each in wanted]).item()
            for kind, some in sayings.kinds(options.batch).items()
        }

    learn(run, options, model, average, optimizer, loss, fall=0.5, figures=figures)
    text: Any = average.network
    write_json(options.out / "training.json", {**settings, "steps": run.step, "seconds": round(run.elapsed)})
    write_part(options.out / "text_encoder", "model", text.state_dict(), text_content(text.config))
    print(f"{options.out}: {run.step} steps of {options.batch}; {run.elapsed:.0f} s")


if __name__ == "__main__":
    main()
