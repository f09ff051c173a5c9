"""Trains a style LoRA on the base model: the ordinary denoising loss, on pictures of the style.

    python recipes/icons/train_style.py DATA OUT [--steps 300] [--rank 8]

DATA is a folder of captioned pictures, OUT becomes one with pytorch_lora_weights.safetensors. Its strength is the
user's to choose; beside an LCM-LoRA 0.8 is usual.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from calotype.lora import LowRank
from calotype.lora.formats import DEFAULT_FILE
from calotype.training.dataset import Dataset, prepare
from calotype.training.settings import Settings
from calotype.training.sources import open_source
from calotype.training.students import LoraStudent
from calotype.training.trainer import make_batch
from calotype.weights.load import load_parts
from calotype.weights.write import Pending, write_safetensors

BASE = Path(__file__).parent / "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default=str(BASE))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()

    parts = load_parts(options.base)
    student = LoraStudent(parts, options.rank)
    optimizer = torch.optim.AdamW(student.parameters, lr=options.rate, weight_decay=0)
    # Every timestep is a "solver step" here, and each batch a pure function of the seed and the step.
    settings = Settings(
        train_batch_size=options.batch,
        max_train_steps=options.steps,
        learning_rate=options.rate,
        lr_scheduler="cosine",
        num_ddim_timesteps=parts.schedule.T,
        validation_steps=0,
        validation_samples=0,
    )
    cache = options.out / "cache"
    *_, dataset = prepare(parts, open_source(options.data, cache), settings, cache)
    assert isinstance(dataset, Dataset)
    for step in range(options.steps):
        samples = dataset.samples(settings.seed, step, options.batch)
        batch = make_batch(samples, settings, step * options.batch, student.parameters[0])
        x = parts.schedule.add_noise(batch.x0, batch.noise, batch.index)
        wanted = parts.schedule.to_output(x, batch.x0, batch.index)
        loss = (student.network(x, batch.index, batch.conditioning) - wanted).square().mean()
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 20 == 0:
            print(f"{step + 1} of {options.steps}: loss {loss.item():.4f}", flush=True)
    tensors = {}
    for parameter, delta in student.outcome().deltas["unet"].items():
        assert isinstance(delta, LowRank)
        for name, factor in (("lora_A", delta.down), ("lora_B", delta.up)):
            tensors[f"unet.{parameter.removesuffix('.weight')}.{name}.weight"] = Pending.of(factor.detach(), torch.half)
    write_safetensors(options.out / DEFAULT_FILE, tensors, {})  # without an alpha, which is the rank then
    print(options.out / DEFAULT_FILE)


if __name__ == "__main__":
    main()
