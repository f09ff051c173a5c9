"""What every training here shares: seeds, rates, steps, averages, and a run that can be stopped at any moment."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from calotype.atomic import replacing
from calotype.precision import multiplies_bfloat16


def add_options(parser: argparse.ArgumentParser, save_every: int) -> None:
    """What every training's command line has, beside its own."""
    parser.add_argument("--save-every", type=int, default=save_every)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="read that many icons, for a quick try")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 where there is some")


def pick_device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


@contextlib.contextmanager
def autocast(device: torch.device, float32: bool = False) -> Iterator[None]:
    """bfloat16 where the device multiplies it, unless float32 is asked for.

    On a CPU then with plain attention: there the fused one takes up to six times as long on the way back.
    """
    half = not float32 and multiplies_bfloat16(device)
    plain = half and device.type == "cpu"
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=half),
        sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext(),
    ):
        yield


def rng(seed: int, step: int) -> np.random.Generator:
    """The dice of a step: a resumed run sees what an unbroken one would have seen."""
    return np.random.default_rng((seed, step))


def rate(step: int, steps: int, peak: float, fall: float, warm: int = 100) -> float:
    """Rises to the peak, stays there, and falls to nothing in the last share: how long it stays can be changed late."""
    return peak * min(1.0, (step + 1) / warm, (steps - step) / (fall * steps))


class Average(nn.Module):
    """An exponential moving average of a network, a fast one as long as there is little to average."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for old, new in zip(self.network.state_dict().values(), network.state_dict().values(), strict=True):
            if old.is_floating_point():
                old.lerp_(new, 1 - decay)


class Run:
    """A folder with a log and the last state; `state` names all that changes and has state_dict()."""

    def __init__(self, folder: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
        self.folder, self.settings, self.state = folder, settings, state
        self.step, self.seconds, self.began = 0, 0.0, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            saved = torch.load(self.file, map_location="cpu", weights_only=True)
            changed = [name for name, value in settings.items() if saved["settings"].get(name) != value]
            if changed:
                raise SystemExit(
                    f"{folder} has a run with other settings ({', '.join(changed)}): give the same, or another folder"
                )
            for name, part in state.items():
                part.load_state_dict(saved[name])
            self.step, self.seconds = saved["step"], saved["seconds"]
            print(f"goes on from step {self.step}", flush=True)

    @property
    def file(self) -> Path:
        return self.folder / "state.pt"

    @property
    def elapsed(self) -> float:
        """Seconds of training, those of earlier sittings included."""
        return self.seconds + time.monotonic() - self.began

    def save(self) -> None:
        parts = {name: part.state_dict() for name, part in self.state.items()}
        told = {"settings": self.settings, "step": self.step, "seconds": self.elapsed}
        with replacing(self.file) as temporary:
            torch.save({**parts, **told}, temporary)

    def log(self, **figures: float) -> None:
        row = {"step": self.step, "seconds": round(self.elapsed), **{k: round(v, 5) for k, v in figures.items()}}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(" ".join(f"{name} {value:g}" for name, value in row.items()), flush=True)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """One step of the optimizer, its gradient at most 1 long."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([each for group in optimizer.param_groups for each in group["params"]], 1.0)
    optimizer.step()


def learn(
    run: Run,
    options: argparse.Namespace,
    network: nn.Module,
    average: Average,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int], Tensor],
    *,
    fall: float,
    figures: Callable[[], dict[str, float]] = dict,
) -> None:
    """Goes on to step `options.steps`, each with the loss of its number; saves and logs every `options.save_every`."""
    loss_sum, since = 0.0, run.step
    while run.step < options.steps:
        value = loss(run.step)
        loss_sum += finite(value, run.step)
        descend(optimizer, value, rate(run.step, options.steps, options.rate, fall))
        average.update(network, run.step)
        run.step += 1
        if run.step % options.save_every == 0 or run.step == options.steps:
            run.save()
            run.log(loss=loss_sum / (run.step - since), **figures())
            loss_sum, since = 0.0, run.step


def finite(loss: Tensor, step: int) -> float:
    """The loss as a number; a run that has gone astray stops here, before its state is saved."""
    value = loss.item()
    if not math.isfinite(value):
        raise SystemExit(f"the loss is {value} at step {step}: start the same command again with a lower --rate")
    return value
