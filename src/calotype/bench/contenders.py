"""Who is compared on what: one task for all, from a model and what was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from calotype.bench import random_model
from calotype.bench.compare import OURS, PEERS, Contender, missing
from calotype.bench.task import Task
from calotype.errors import UsageError
from calotype.families import LCM_GUIDANCE, PLAIN_LCM_GUIDANCE
from calotype.optimize import chosen
from calotype.precision import DTYPES, automatic
from calotype.rules import nearest
from calotype.weights import source
from calotype.weights.convert import convert
from calotype.weights.load import TINY, unet_on_meta, vae_on_meta

CPU = torch.device("cpu")


def model_folder(model: str | None, random: str | None, scratch: Path, show: Callable[[str], None]) -> Path:
    """The model in the diffusers layout, which is all that peers read: written to `scratch` where it is another one.

    Raises UsageError, ModelNotFoundError, CheckpointError, OutputError.
    """
    if random is None:
        found = source.resolve(model)
        if found.is_dir():
            return found
        made = scratch / found.stem
        if not made.is_dir():
            show("writing the model as a folder")
            convert(found, made)
        return made
    if random not in random_model.NAMES:
        allowed = ", ".join(random_model.NAMES)
        raise UsageError(f"--random is {random!r}: allowed are {allowed}", nearest(random, random_model.NAMES))
    made = scratch / f"random-{random}"
    if not made.is_dir():
        show("writing random weights")
        random_model.write(random, made)
    return made


def peers(names: Sequence[str], warn: Callable[[str], None]) -> list[str]:
    """Those that are installed; a warning for each other one. Raises UsageError for an unknown one."""
    for name in names:
        if name not in PEERS:
            raise UsageError(f"--against has {name!r}: allowed are {', '.join(PEERS)}", nearest(name, PEERS))
    for name in names:
        if absent := missing(name):
            warn(f"{name} is left out: {', '.join(absent)} is not installed; pip install 'calotype[bench]' brings it")
    return [name for name in dict.fromkeys(names) if not missing(name)]


def contenders(
    folder: Path,
    scratch: Path,
    against: Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    steps: int = 4,
    dtype: str = "auto",
    optimize: Sequence[str] = ("auto",),
    decoder: str = "full",
    tiny_vae: str | None = None,
    variant: str | None = None,
) -> tuple[list[Contender], Task]:
    """calotype with each of `optimize`, then the peers; and the task that draws in float32. UsageError."""
    unet, vae = unet_on_meta(folder / "unet"), vae_on_meta(folder / "vae")
    parameters = sum(each.numel() for each in unet.parameters())
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"--dtype is {dtype!r}: allowed are auto, {', '.join(DTYPES)}")
    taken = automatic(CPU, parameters) if dtype == "auto" else DTYPES[dtype]
    for each in optimize:
        chosen(each, CPU, taken, parameters)
    side = unet.config.sample_size * vae.config.downscale
    width, height = size or (side, side)
    task = Task(
        folder=str(folder),
        scratch="",
        width=width,
        height=height,
        steps=steps,
        guidance=PLAIN_LCM_GUIDANCE if unet.config.guidance_dim is None else LCM_GUIDANCE,
        dtype=str(taken).removeprefix("torch."),
        threads=torch.get_num_threads(),
        tiny_vae=_tiny(folder, decoder, tiny_vae),
        variant=variant,
    )
    ours = ["calotype", *(f"calotype {each}" for each in optimize[1:])]
    found = [
        Contender(name, OURS, replace(task, optimize=each, scratch=str(scratch / name)))
        for name, each in zip(ours, optimize, strict=True)
    ]
    found += [Contender(name, PEERS[name], replace(task, scratch=str(scratch / name))) for name in against]
    return found, replace(task, dtype="float32", count=True, scratch=str(scratch / "float32"))


def _tiny(folder: Path, decoder: str, tiny_vae: str | None) -> str | None:
    if decoder not in ("full", "tiny"):
        raise UsageError(f"--decoder is {decoder!r}: allowed are full, tiny")
    if decoder == "full":
        return None
    if tiny_vae is not None:
        return str(source.resolve(tiny_vae))
    if not (folder / TINY).is_dir():
        raise UsageError("--decoder is tiny, and the model has none", "name one with --tiny-vae")
    return str(folder / TINY)
