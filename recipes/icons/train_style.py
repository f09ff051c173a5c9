"""Trains a style LoRA on the base model: the ordinary denoising loss, on pictures of the style.

    python recipes/icons/train_style.py DATA OUT [--steps 300] [--rank 8]

DATA is a folder of captioned pictures, OUT becomes one with pytorch_lora_weights.safetensors. Its strength is the
user's to choose; beside an LCM-LoRA 0.8 is usual.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from calotype.training.data import Dataset, prepare
from calotype.training.export import export_lora
from calotype.training.students import LoraStudent
from calotype.training.trainer import Settings, make_batch
from calotype.weights.load import load_parts

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
    size = parts.defaults.width
    *_, dataset = prepare(parts, options.data, size, options.out / "cache")
    assert isinstance(dataset, Dataset)
    student = LoraStudent(parts, options.rank)
    optimizer = torch.optim.AdamW(student.parameters, lr=options.rate, weight_decay=0)
    # Every timestep is a "solver step" here, and each batch a pure function of the seed and the step.
    settings = Settings(
        train_batch_size=options.batch,
        max_train_steps=options.steps,
        learning_rate=options.rate,
        lr_scheduler="cosine",
        num_ddim_timesteps=parts.schedule.T,
    )
    for step in range(options.steps):
        batch = make_batch(dataset, parts.schedule, settings, step, size, torch.device("cpu"))
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
    told = {name: getattr(options, name) for name in ("steps", "batch", "rank", "rate")}
    print(export_lora(student.lora, options.out, [{"data": options.data.name, **told}]))


if __name__ == "__main__":
    main()
