"""What distill.py compares calotype with: the loop of diffusers' train_lcm_distill_lora_sd_wds.py, learnt and re-made.

    python benchmarks/peer_distill.py TEACHER DATA --steps N --batch B --resolution R --rank 64 [--cached]

As there: a teacher and a second U-Net with PEFT's LoRA, pictures and captions encoded in every step, the student's
activations kept while the teacher is asked twice and the target once, AdamW. Left out: WebDataset, accelerate, logging
and validation; and autocast around teacher and target, which on a CPU turns to bfloat16 whatever --mixed_precision says
(--autocast puts it back). With bf16 it is as there, too: weights stay float32 and are cast for each use, the encoders'
apart. With --cached, pictures and captions are encoded once, before the first step.

Prints JSON: the seconds of every step and of the encoding in it, the losses, and the process' peak of memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel

from distill import peak_resident

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
SOLVER_STEPS, W_MIN, W_MAX, HUBER_C = 50, 3.0, 15.0, 0.001
VAE_BATCH = 32  # the script's --vae_encode_batch_size

Encoded = tuple[Tensor, Tensor]  # latents and text of a batch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--autocast", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)

    began = time.perf_counter()
    is_mixed = args.mixed_precision == "bf16"
    loop = Loop.load(args.teacher, args.rank, args.gradient_checkpointing, is_mixed, is_mixed or args.autocast)
    encoders = Encoders(args.teacher, args.resolution, torch.bfloat16 if is_mixed else torch.float32)
    batches = order(args.data, args.batch)
    nothing = encoders.text([""]).expand(args.batch, -1, -1)
    cache: dict[str, Encoded] = {}
    if args.cached:
        cache = {name: encoders.encode([(args.data / name, text)]) for name, text in captions(args.data)}
        del encoders

    record: dict[str, list[float]] = {"steps": [], "processor": [], "encoding": [], "losses": []}
    before = time.perf_counter() - began
    for _ in range(args.steps):
        batch = next(batches)
        start, worked = time.perf_counter(), time.process_time()
        if args.cached:
            latents, text = (torch.cat(each) for each in zip(*(cache[name] for name, _ in batch), strict=True))
        else:
            latents, text = encoders.encode([(args.data / name, text) for name, text in batch])
        record["encoding"].append(time.perf_counter() - start)
        record["losses"].append(loop.step(latents, text, nothing))
        record["steps"].append(time.perf_counter() - start)
        record["processor"].append(time.process_time() - worked)
    with tempfile.TemporaryDirectory() as scratch:
        loop.student.save_pretrained(scratch)
    print(json.dumps({"before": before, "peak": peak_resident(), **record}))


def captions(data: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    return [(row["file_name"], row["text"]) for row in rows]


def order(data: Path, batch: int) -> Iterator[list[tuple[str, str]]]:
    """Batches of pictures and captions without end, every pass in an order of its own."""
    rows, rest = captions(data), []
    while True:
        while len(rest) < batch:
            rest += [rows[i] for i in torch.randperm(len(rows))]
        yield rest[:batch]
        rest = rest[batch:]


class Encoders:
    """Pictures and captions to what the U-Net sees."""

    def __init__(self, teacher: Path, resolution: int, dtype: torch.dtype) -> None:
        self.resolution = resolution
        self.tokenizer = AutoTokenizer.from_pretrained(teacher / "tokenizer", use_fast=False)
        self.text_encoder = CLIPTextModel.from_pretrained(teacher / "text_encoder", dtype=dtype)
        self.vae = AutoencoderKL.from_pretrained(teacher / "vae", torch_dtype=dtype)
        for network in (self.text_encoder, self.vae):
            network.requires_grad_(False)

    @torch.no_grad()
    def encode(self, batch: list[tuple[Path, str]]) -> Encoded:
        pixels = torch.stack([self.picture(path) for path, _ in batch]).to(self.vae.dtype)
        latents = [self.vae.encode(part).latent_dist.sample() for part in pixels.split(VAE_BATCH)]
        scaled = torch.cat(latents) * self.vae.config.scaling_factor
        return scaled.float(), self.text([text for _, text in batch])

    @torch.no_grad()
    def text(self, texts: list[str]) -> Tensor:
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids)[0].float()

    def picture(self, path: Path) -> Tensor:
        """Scaled to the resolution, a random square of it, from -1 to 1."""
        side = self.resolution
        with Image.open(path) as file:
            scale = side / min(file.size)
            size = [max(side, round(edge * scale)) for edge in file.size]
            picture = file.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        left, top = (int(torch.randint(edge - side + 1, ())) for edge in picture.size)
        array = np.asarray(picture.crop((left, top, left + side, top + side)))
        return torch.from_numpy(array.copy()).permute(2, 0, 1) / 127.5 - 1


@dataclass
class Loop:
    """The networks, and one step of their training."""

    teacher: UNet2DConditionModel
    student: nn.Module
    scheduler: DDPMScheduler
    optimizer: torch.optim.Optimizer
    student_autocast: bool
    other_autocast: bool

    @staticmethod
    def load(folder: Path, rank: int, checkpointing: bool, student_autocast: bool, other_autocast: bool) -> Loop:
        teacher, student = (
            UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32) for _ in range(2)
        )
        teacher.requires_grad_(False)
        student.train()
        adapted = get_peft_model(student, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)))
        if checkpointing:
            adapted.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-4, weight_decay=1e-2)
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        return Loop(teacher, adapted, scheduler, optimizer, student_autocast, other_autocast)

    def step(self, latents: Tensor, text: Tensor, nothing: Tensor) -> float:
        bars, size = self.scheduler.alphas_cumprod, len(latents)
        jump = len(bars) // SOLVER_STEPS
        index = torch.randint(SOLVER_STEPS, (size,))
        t = (index + 1) * jump - 1
        t_next = (t - jump).clamp(min=0)
        w = (W_MIN + (W_MAX - W_MIN) * torch.rand(size)).view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        x = self.scheduler.add_noise(latents, noise, t)

        with torch.autocast("cpu", torch.bfloat16, enabled=self.student_autocast):
            predicted = self.consistent(self.student, x, t, text)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.other_autocast):
            out = self.teacher(x, t, encoder_hidden_states=text).sample.float()
            out_nothing = self.teacher(x, t, encoder_hidden_states=nothing).sample.float()
            x0, x0_nothing = self.clean(out, x, t), self.clean(out_nothing, x, t)
            eps, eps_nothing = self.noise(out, x, t), self.noise(out_nothing, x, t)
            bar = bars[t_next].view(-1, 1, 1, 1)
            x_next = bar.sqrt() * (x0 + w * (x0 - x0_nothing)) + (1 - bar).sqrt() * (eps + w * (eps - eps_nothing))
            wanted = self.consistent(self.student, x_next, t_next, text)
        loss = (((predicted - wanted) ** 2 + HUBER_C**2).sqrt() - HUBER_C).mean()

        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def consistent(self, network: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """f(x, t) of the consistency model that a network is."""
        scaled = 10.0 * t.view(-1, 1, 1, 1)
        total = scaled**2 + 0.25
        out = network(x, t, encoder_hidden_states=text).sample.float()
        return 0.25 / total * x + scaled / total**0.5 * self.clean(out, x, t)

    def clean(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.levels(t)
        return alpha * x - sigma * out if self.is_velocity else (x - sigma * out) / alpha

    def noise(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.levels(t)
        return alpha * out + sigma * x if self.is_velocity else out

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        bar = self.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        return bar.sqrt(), (1 - bar).sqrt()

    @property
    def is_velocity(self) -> bool:
        return self.scheduler.config.prediction_type == "v_prediction"


if __name__ == "__main__":
    main()
