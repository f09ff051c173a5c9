"""A few steps of training in as many processes as torchrun started: `test_ranks.py` runs it and compares.

run_ranks.py MODEL OUT.json [--lora] [--fsdp] [--float32] [--batch B] [--accumulate A] [--steps N]
             [--save FOLDER] [--load FOLDER] [--die RANK]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path

import torch
from safetensors.torch import save_file

from calotype.nn.unet import Conditioning
from calotype.training import checkpoint
from calotype.training.dataset import Samples
from calotype.training.ranks import Ranks, process_group
from calotype.training.settings import Settings
from calotype.training.students import whole
from calotype.training.trainer import State, _fill_moments, make_student, start, train
from calotype.weights.load import load_parts


class Random:
    """A data set of random latents: a batch is a function of the step alone, and `part` cuts it."""

    def samples(self, seed: int, step: int, batch: int, part: slice) -> Samples:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        latents = torch.randn(batch, 4, 8, 8, generator=generator)[part]
        context = torch.randn(batch, 77, 32, generator=generator)[part]
        null = torch.zeros_like(context)
        return Samples(latents, Conditioning(context), Conditioning(null), None, tuple(map(str, range(len(latents)))))


def tensors(state: State) -> dict[str, torch.Tensor]:
    return {name: whole(tensor).clone() for name, tensor in state.tensors().items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--die", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(
        lora=options.lora,
        fsdp=options.fsdp,
        lora_rank=4,
        train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        max_train_steps=options.steps,
        # In float32 the rounding of a first step would soon be the loss of another, at a rate that moves much.
        learning_rate=1e-5 if options.float32 else 1e-3,
        lr_warmup_steps=1,
    )
    with process_group("cpu") as ranks:
        run(options, settings, ranks)


def run(options: argparse.Namespace, settings: Settings, ranks: Ranks) -> None:
    parts = load_parts(options.model)
    if not options.float32:
        parts.unet.double()
    state = start(make_student(parts, settings), settings, ranks)
    if options.load is not None:
        path = checkpoint.newest(options.load)
        assert path is not None
        _fill_moments(state.optimizer)
        checkpoint.read(path, state.tensors(), ranks)
        state.step = checkpoint.step_of(path)
    losses = []
    for step in train(state, parts.schedule, Random(), settings, ranks):  # type: ignore[arg-type]
        losses.append(step.loss)
        if options.die == ranks.rank and step.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    if options.save is not None:
        checkpoint.write(options.save, state.step, state.tensors(), {}, ranks)
    found = tensors(state)
    if ranks.first:
        contiguous = {name: tensor.contiguous() for name, tensor in found.items()}
        save_file(contiguous, options.out.with_suffix(".safetensors"))
        options.out.write_text(json.dumps({"losses": losses, "world": ranks.world}))


if __name__ == "__main__":
    main()
