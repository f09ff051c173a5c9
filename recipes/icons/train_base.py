"""Trains the base model: a U-Net, and with it the text encoder, that draw icons from their captions.

    python recipes/icons/train_base.py DATA AUTOENCODER TEXT OUT [--steps 20000] [--batch 64] [--start FOLDER]

DATA is what draw.py leaves, AUTOENCODER what train_autoencoder.py leaves, TEXT what train_text.py leaves. OUT becomes
the base model in the diffusers layout. The run can be stopped at any moment; the same command goes on with it.

Icons on white are encoded once, before the first step; what is changed (in another hue, on a colour, in pairs) as it is
drawn. 200 pairs of a concept and a style are never shown, though each of both is: the held-out loss, and the place to
look whether the two were learnt apart.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folders import write_json, write_part
from muon import Muon, groups
from phrases import abroad, in_other_words
from resumable import Average, Run, add_options, autocast, descend, finite, pick_device, rate, rng
from safetensors.torch import load_file
from scenes import (
    PAIRS,
    SIZE,
    STYLES,
    Icons,
    Mix,
    Names,
    Scene,
    caption,
    names_alone,
    plain,
    read_icons,
    read_names,
    render,
    short,
    shown_and_held_out,
    told_scene,
    with_article,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from train_text import name_in, text_content
from words import tokens

from calotype.nn.clip import CLIPText
from calotype.nn.unet import Conditioning, UNet
from calotype.nn.vae import AutoencoderKL
from calotype.schedule import NoiseSchedule
from calotype.text.tokenizer import Tokenizer
from calotype.weights.configs import unet_config
from calotype.weights.load import load_text_encoder, load_unet, load_vae
from calotype.weights.write import Pending, write_safetensors

BASE = Path(__file__).parent / "base"  # whose configs are taken: the U-Net's shape and the noise levels
# An error in the clean latent counts as much as its signal-to-noise ratio, within these bounds. The upper one is
# min-SNR's (Hang et al. 2023, arXiv 2303.09556, Equation 8), the lower one of Salimans and Ho 2022 (arXiv 2202.00512,
# section 4): where there is little but noise, the text decides, and a few-step sampler begins.
LEAST, MOST = 1.0, 5.0
FOREIGN = 0.35  # share of captions in another language, where there is one and a name alone means the picture
PHRASED = 0.1  # share of the English ones that are as people write it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("autoencoder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, help="the folder of a U-Net of this shape to go on from")
    parser.add_argument("--unet", type=Path, default=BASE / "unet" / "config.json", help="a U-Net's config.json")
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="v_prediction")
    parser.add_argument("--steps", type=int, default=20000, help="may be another when a run goes on")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.999, help="of the moving average")
    parser.add_argument("--fall", type=float, default=0.3, help="the rate falls in the last share of the steps")
    parser.add_argument("--warm", type=int, default=100, help="the rate rises in so many steps")
    parser.add_argument(
        "--pairs", type=float, default=PAIRS, help="share of pictures with two icons, in the styles that need no word"
    )
    add_options(parser, save_every=250)
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that choose scenes and captions: 8 beside a GPU"
    )
    parser.add_argument("--compile", action="store_true", help="worth it on a GPU")
    options = parser.parse_args()
    train(options)


# ---- what is shown ----


class Steps(Dataset[tuple[list[Scene], Tensor]]):
    """The scenes and the token ids (B, L) of a step: a pure function of its number, so that a run can be resumed."""

    def __init__(
        self, icons: Icons, shown: Sequence[int], tokenizer: Tokenizer, names: Names, batch: int, seed: int,
        pairs: float = PAIRS,
    ) -> None:  # fmt: skip
        self.icons, self.mix, self.tokenizer, self.names = icons, Mix(icons, shown), tokenizer, names
        self.batch, self.seed, self.pairs = batch, seed, pairs

    def __getitem__(self, step: int) -> tuple[list[Scene], Tensor]:
        dice = rng(self.seed, step)
        drawn = self.mix.pairs(self.batch, dice)
        scenes = [told_scene(self.icons, first, second, dice, self.pairs) for first, second in drawn]
        texts = [self.text(scene, dice) for scene in scenes]
        return scenes, tokens(self.tokenizer, texts)

    def text(self, scene: Scene, dice: np.random.Generator) -> str:
        names = names_alone(self.icons, self.names, scene)
        if names and dice.random() < FOREIGN:
            return abroad(names, dice)
        if dice.random() < PHRASED:
            return in_other_words(self.icons, scene, dice)[0]
        return caption(self.icons, scene, dice)


def latents_of(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The latents (B, 4, H/8, W/8) in float32, as the U-Net takes them."""
    mean, _ = vae.encode(pictures)
    return (mean.float() - vae.config.shift_factor) * vae.config.scaling_factor


class Latents:
    """The latents of scenes: of icons on white from a table, of all others by the encoder."""

    def __init__(self, vae: AutoencoderKL, icons: Icons, shown: Sequence[int], file: Path, float32: bool) -> None:
        self.vae, self.icons, self.float32 = vae, icons, float32
        self.device = next(vae.parameters()).device
        self.rows = {Scene((i,)): row for row, i in enumerate(shown)}
        if file.is_file():
            table = load_file(file)["latents"]
        else:
            scenes = list(self.rows)
            table = torch.cat([self.encode(scenes[at : at + 32]).half().cpu() for at in range(0, len(scenes), 32)])
            write_safetensors(file, {"latents": Pending.of(table, torch.half)}, {})
        if len(table) != len(self.rows):
            raise SystemExit(f"{file} has {len(table)} latents: {len(self.rows)} are needed: remove the file")
        self.table = table.to(self.device)

    @torch.no_grad()
    def encode(self, scenes: Sequence[Scene]) -> Tensor:
        with autocast(self.device, self.float32):
            return latents_of(self.vae, render(self.icons, scenes, self.device))

    def __call__(self, scenes: Sequence[Scene]) -> Tensor:
        rows = torch.tensor([self.rows.get(scene, -1) for scene in scenes], device=self.device)
        found = self.table[rows].float()  # the last one where there is none
        changed = (rows < 0).nonzero().flatten().tolist()
        if changed:
            found[changed] = self.encode([scenes[i] for i in changed])
        return found


# ---- what is trained ----


class Model(nn.Module):
    """Both networks: what is averaged, saved and, in one call, run."""

    def __init__(self, text: CLIPText, unet: UNet) -> None:
        super().__init__()
        self.text, self.unet = text, unet

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, t, Conditioning(self.text(ids).last))


def new_model(options: argparse.Namespace) -> Model:
    config = unet_config(json.loads(options.unet.read_text()), str(options.unet))
    text = load_text_encoder(options.text / "text_encoder")
    if config.context_dim != text.config.width:
        raise SystemExit(
            f"{options.unet} reads text features of {config.context_dim}, and {options.text} has {text.config.width}"
        )
    if options.start is not None:
        unet = load_unet(options.start)
        if unet.config != config:
            raise SystemExit(f"{options.start} is a U-Net of another shape than {options.unet}: leave out --start")
    else:
        unet = UNet(config)
        nn.init.zeros_(unet.conv_out.weight)  # it begins with the best guess that looks at nothing
    return Model(text, unet).requires_grad_(True)


def loss_of(model: nn.Module, schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor, ids: Tensor) -> Tensor:
    """The weighted error (B,) of each picture."""
    x = schedule.add_noise(x0, noise, t)
    return weighted(schedule, model(x, t, ids).float(), x, x0, t)


def weighted(schedule: NoiseSchedule, output: Tensor, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """The weighted error (B,) of a network's output for noisy latents x of x0."""
    error = (output - schedule.to_output(x, x0, t)).square().flatten(1).mean(dim=1)
    alpha, sigma = schedule.at(t, t)
    snr = (alpha / sigma).square()
    return error * snr.clamp(LEAST, MOST) / (snr if schedule.prediction == "epsilon" else snr + 1)


def ends(model: Model) -> Iterator[nn.Parameter]:
    """What Muon does not treat as matrices: embeddings, and the convolutions to and from the latents."""
    for part in (model.unet.conv_in, model.unet.conv_out, model.text.text_model.embeddings):
        yield from part.parameters()


def train(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    torch.manual_seed(options.seed)
    started = time.monotonic()
    icons, names = read_icons(options.data, options.limit), read_names(options.data)
    vae = load_vae(options.autoencoder, device=device).requires_grad_(False).eval()
    assert isinstance(vae, AutoencoderKL)
    tokenizer = Tokenizer.load(options.text / "tokenizer")
    shown, judged = shown_and_held_out(icons.rows)
    scheduler = json.loads((BASE / "scheduler" / "scheduler_config.json").read_text())
    scheduler |= {"prediction_type": options.prediction}
    schedule = NoiseSchedule.from_config(scheduler).to(device)
    found = (
        f"{len(shown)} icons, {len(judged)} held out, {tokenizer.size} tokens, {len(names)} emoji in other languages"
    )
    print(f"{found}; read in {time.monotonic() - started:.0f} s", flush=True)

    model = new_model(options).to(device)
    average = Average(model, options.decay)
    optimizer = Muon(groups(model, ends(model)), lr=options.rate)
    kept = ("prediction", "batch", "rate", "decay", "fall", "warm", "pairs", "seed")
    settings = {name: getattr(options, name) for name in kept} | {"autoencoder": fingerprint(vae)}
    run = Run(options.out, settings, {"model": model, "average": average, "optimizer": optimizer})
    forward: nn.Module = torch.compile(model) if options.compile else model  # type: ignore[assignment]
    latents = Latents(vae, icons, shown, options.out / "latents.safetensors", options.float32)
    steps = Steps(icons, shown, tokenizer, names, options.batch, options.seed, options.pairs)
    numbers = range(run.step, options.steps)
    loader = DataLoader(steps, sampler=numbers, batch_size=None, num_workers=options.workers)
    tests = {name: test for name, test in one_and_two(icons, judged).items() if test[0]}
    loss_sum = torch.zeros((), device=device)
    since, began = run.step, time.monotonic()
    for scenes, ids in loader:
        x0 = latents(scenes)
        noise, t = chances(x0, options.seed, run.step, schedule.T)
        with autocast(device, options.float32):
            loss = loss_of(forward, schedule, x0, noise, t, ids.to(device)).mean()
        descend(optimizer, loss, rate(run.step, options.steps, options.rate, options.fall, options.warm))
        average.update(model, run.step)
        run.step += 1
        loss_sum += loss.detach()  # not .item(): a GPU need not wait at every step
        if run.step % options.save_every == 0 or run.step == options.steps:
            mean_loss = finite(loss_sum / (run.step - since), run.step)
            speed = options.batch * (run.step - since) / (time.monotonic() - began)
            run.save()
            found = {
                f"held_out_{name}": judge(average, vae, schedule, icons, scenes, texts, tokenizer)
                for name, (scenes, texts) in tests.items()
            }
            run.log(loss=mean_loss, **found, per_second=speed)
            loss_sum, since, began = torch.zeros((), device=device), run.step, time.monotonic()
    network: Any = average.network
    told = {**settings, "steps": run.step, "seconds": round(run.elapsed), **before(options.start)}
    export(network, scheduler, options, told)
    write_json(options.out / "held_out.json", [icons.rows[i] for i in judged])
    print(f"{options.out}: {run.step} steps of {options.batch}; {run.elapsed:.0f} s")


def before(start: Path | None) -> dict[str, Any]:
    """How the U-Net that a run went on from was made, where its model's folder says so."""
    record = None if start is None else start.parent / "training.json"
    return {"before": json.loads(record.read_text())} if record is not None and record.is_file() else {}


def fingerprint(network: nn.Module) -> str:
    """Of its weights: latents of one autoencoder are no other's."""
    return f"{zlib.crc32(b''.join(each.cpu().numpy().tobytes() for each in network.state_dict().values())):08x}"


def chances(x0: Tensor, seed: int, step: int, T: int) -> tuple[Tensor, Tensor]:
    """Noise like x0 and timesteps (B,). These are spread evenly over the batch: the loss of a step varies less."""
    generator = torch.Generator().manual_seed((seed << 32) + step)
    noise = torch.randn(x0.shape, generator=generator)
    places = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)
    return noise.to(x0.device), (places * T).long().clamp(max=T - 1).to(x0.device)


def early(t: Tensor, T: int) -> Tensor:
    """Uniform timesteps moved to where there is much noise, and where things are to be is still open.

    For adapters that say where: cubic sampling, Mou et al. 2023, arXiv 2302.08453, section 3.4.
    """
    return ((1 - (t / T) ** 3) * T).long().clamp(max=T - 1)


def one_and_two(icons: Icons, chosen: Sequence[int]) -> dict[str, tuple[list[Scene], list[str]]]:
    """Icons by caption and style, one by one and two of a style side by side; such as were never shown."""
    one = [Scene((i,)) for i in chosen], [name_in("en", icons.rows[i], {}) for i in chosen]
    brief: dict[str, list[int]] = defaultdict(list)
    for i in chosen:
        if short(icons.rows[i]):
            brief[icons.rows[i]["style"]].append(i)
    two = [pair for some in brief.values() for pair in pairwise(some)]
    return {"one": one, "two": ([Scene(pair) for pair in two], [both(icons, pair) for pair in two])}


def both(icons: Icons, pair: Sequence[int]) -> str:
    left, right = (with_article(icons.rows[i]["name"]) for i in pair)
    return plain(f"{left} and {right}, {STYLES[icons.rows[pair[0]]['style']][0]}")


@torch.no_grad()
def judge(
    average: Average,
    vae: AutoencoderKL,
    schedule: NoiseSchedule,
    icons: Icons,
    scenes: Sequence[Scene],
    texts: Sequence[str],
    tokenizer: Tokenizer,
) -> float:
    """The average's loss on scenes by their captions; always under the same noise."""
    device = next(average.parameters()).device
    losses = []
    for number, start in enumerate(range(0, len(scenes), 50)):
        some = slice(start, start + 50)
        x0 = latents_of(vae, render(icons, scenes[some], device))
        noise, t = chances(x0, 1, number, schedule.T)
        losses.append(loss_of(average.network, schedule, x0, noise, t, tokens(tokenizer, texts[some]).to(device)))
    return torch.cat(losses).mean().item()


# ---- what is written ----


def export(model: Model, scheduler: dict[str, Any], options: argparse.Namespace, told: dict[str, Any]) -> None:
    """A model folder; model_index.json comes last, so that one that has it is complete."""
    out, text = options.out, model.text.config
    write_part(out / "unet", "diffusion_pytorch_model", model.unet.state_dict(), json.loads(options.unet.read_text()))
    write_part(out / "text_encoder", "model", model.text.state_dict(), text_content(text))
    shutil.copytree(options.text / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    if options.autoencoder.resolve() != (out / "vae").resolve():
        (out / "vae").mkdir(exist_ok=True)
        for file in (*options.autoencoder.glob("*.safetensors*"), *options.autoencoder.glob("*.json")):
            shutil.copyfile(file, out / "vae" / file.name)
    (out / "scheduler").mkdir(exist_ok=True)
    write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    write_json(out / "calotype.json", {"steps": 25, "guidance": 5.0, "width": SIZE, "height": SIZE})
    write_json(out / "training.json", told)  # how it was made
    shutil.copyfile(BASE / "model_index.json", out / "model_index.json")


if __name__ == "__main__":
    main()
