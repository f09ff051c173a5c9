"""The training loop of latent consistency distillation: a generator, so that the caller draws the progress.

A full U-Net with guidance embedding or a LoRA, in one process. A run can be stopped at any moment and resumed from
its newest checkpoint; on a CPU the resumed run is the uninterrupted one, bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calotype.errors import CalotypeError, CalotypeWarning, CheckpointError, UsageError
from calotype.nn.unet import Conditioning
from calotype.schedule import CONSISTENCY, NoiseSchedule
from calotype.training.data import Dataset, pick, prepare
from calotype.training.export import export_lcm, export_lora
from calotype.training.loss import Batch, consistency_loss
from calotype.training.students import FullStudent, LoraStudent, Student
from calotype.weights.load import load_parts
from calotype.weights.source import resolve


@dataclass(frozen=True)
class Settings:
    """How to train. Names are those of diffusers' LCM scripts where they have one."""

    lora: bool = False  # train a LoRA on the teacher, and no network of its own
    lora_rank: int = 64
    max_train_steps: int = 1000
    train_batch_size: int = 12
    learning_rate: float | None = None  # 1e-5, or 1e-4 of a LoRA
    lr_scheduler: str = "constant"  # or "cosine": falls to zero at the end
    lr_warmup_steps: int = 50
    resolution: int | None = None  # pixels; the teacher's own size if None
    seed: int = 0
    w_min: float = 3.0  # the paper's w: guidance - 1
    w_max: float = 15.0
    num_ddim_timesteps: int = 50  # of the grid that training visits, the one that sampling picks its steps from
    skipping_step: int = 20  # the paper's k: timesteps that the teacher's solver jumps
    solver_substeps: int = 1  # in which it goes there
    timestep_power: float = 1.0  # of the uniform number that picks a timestep: 2 sees half of all below T / 4
    ema_decay: float = 0.95
    huber_c: float = 0.001
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"  # or "bf16"
    checkpointing_steps: int = 500
    sampler: str = "lcm"  # or "tcd": the finished model's default

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 1e-4 if self.lora else 1e-5)
        for name in (
            "lora_rank",
            "max_train_steps",
            "train_batch_size",
            "num_ddim_timesteps",
            "skipping_step",
            "solver_substeps",
            "checkpointing_steps",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: must be at least 1")
        for name in ("learning_rate", "huber_c", "max_grad_norm", "timestep_power"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UsageError(f"{name} is {getattr(self, name)}: must be a positive number")
        if not 0 <= self.w_min <= self.w_max < math.inf:
            raise UsageError(
                f"w_min {self.w_min} and w_max {self.w_max}: must be 0 <= w_min <= w_max",
                hint="w is the paper's guidance scale: diffusers' guidance_scale - 1",
            )
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"ema_decay is {self.ema_decay}: must be in [0, 1)")
        if self.lr_scheduler not in ("constant", "cosine"):
            raise UsageError(f"lr_scheduler is {self.lr_scheduler!r}: must be 'constant' or 'cosine'")
        if self.sampler not in CONSISTENCY:
            raise UsageError(f"sampler is {self.sampler!r}: must be one of {', '.join(CONSISTENCY)}")
        if self.mixed_precision not in ("no", "bf16"):
            raise UsageError(f"mixed_precision is {self.mixed_precision!r}: must be 'no' or 'bf16'")
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise UsageError(f"resolution is {self.resolution}: must be a positive multiple of 8")

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        assert self.learning_rate is not None
        warm = min(1.0, (step + 1) / max(1, self.lr_warmup_steps))
        if self.lr_scheduler == "constant":
            return self.learning_rate * warm
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.max_train_steps))


@dataclass(frozen=True)
class TrainStep:
    """What the loop reports: a stage ("encode", "train" or "done"), how far it is, and in training the figures."""

    stage: str
    step: int  # pictures encoded, or steps trained
    total: int | None
    loss: float = math.nan
    grad_norm: float = math.nan
    learning_rate: float = math.nan
    samples_per_second: float = math.nan


@dataclass
class State:
    """Everything that changes while training."""

    student: Student
    optimizer: torch.optim.AdamW
    history: list[dict[str, Any]]  # the settings, and from which step on they held
    step: int = 0


def distill(
    teacher: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    student: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    offline: bool = False,
    **settings: object,
) -> Iterator[TrainStep]:
    """Distils a latent consistency model from `teacher` on the captioned pictures in the folder `data`.

    `settings` are the fields of Settings. `output` becomes a model folder in the diffusers layout, written at the end;
    with `lora` it gets `pytorch_lora_weights.safetensors` instead, for the teacher and its kin. Its `checkpoints` and
    `cache` hold what a resumed run needs. `student` is a latent consistency model of that teacher to go on from;
    without one the student starts as the teacher.

    Raises UsageError for bad settings or data and where `output` is not empty, CheckpointError for a teacher that
    cannot be distilled.
    """
    try:
        chosen = Settings(**settings)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(str(error).replace("Settings.__init__() ", "")) from None
    if student is not None and chosen.lora:
        raise UsageError("a LoRA has no student to go on from", hint="leave out student, or lora")
    folder, output = Path(data), Path(output)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    _check_output(output, resume)
    parts = load_parts(str(teacher), offline=offline, device=torch.device(name), dtype=torch.float32)
    if parts.unet.config.guidance_dim is not None:
        raise CheckpointError(f"{teacher} is already a latent consistency model", hint="distil from an ordinary model")
    resolution = parts.defaults.width if chosen.resolution is None else chosen.resolution
    chosen = replace(chosen, resolution=resolution)

    dataset: Dataset | None = None
    for progress in prepare(parts, folder, resolution, output / "cache"):
        if isinstance(progress, Dataset):
            dataset = progress
        else:
            yield TrainStep("encode", progress, None)
    assert dataset is not None

    if chosen.lora:
        learner: Student = LoraStudent(parts, chosen.lora_rank, chosen.seed)
    else:
        first = None if student is None else load_parts(str(student), offline=offline, device=torch.device(name)).unet
        learner = FullStudent(parts.unet, first)
    state = start(learner, chosen)
    checkpoint = newest_checkpoint(output)
    if resume and checkpoint is not None:
        _restore(state, checkpoint, chosen)
    with (output / "log.jsonl").open("a", encoding="utf-8") as log:
        for report in train(state, parts.schedule, dataset, chosen, resolution):
            log.write(json.dumps(asdict(report)) + "\n")
            if report.step % chosen.checkpointing_steps == 0 or report.step == chosen.max_train_steps:
                log.flush()
                _save(state, output)
            yield report
    if isinstance(learner, LoraStudent):
        export_lora(learner.lora, output, state.history)
    elif isinstance(learner, FullStudent):
        export_lcm(resolve(str(teacher), offline=offline), learner.target, parts, output, state.history)
    yield TrainStep("done", state.step, chosen.max_train_steps)


def train(
    state: State, schedule: NoiseSchedule, dataset: Dataset, settings: Settings, resolution: int
) -> Iterator[TrainStep]:
    """The loop itself, from state.step to the end. A step depends on the state, the settings and the data alone."""
    student = state.student
    trained = student.parameters
    device = trained[0].device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16")
    while state.step < settings.max_train_steps:
        started = time.perf_counter()
        batch = make_batch(dataset, schedule, settings, state.step, resolution, device)
        for group in state.optimizer.param_groups:
            group["lr"] = settings.rate(state.step)
        with autocast:
            losses = consistency_loss(
                student.network, student.target, student.teacher, schedule, batch,
                solver_steps=settings.num_ddim_timesteps, skip=settings.skipping_step,
                substeps=settings.solver_substeps, huber_c=settings.huber_c,
            )  # fmt: skip
        loss = losses.mean()
        value = loss.item()
        if not math.isfinite(value):
            worst = int((~torch.isfinite(losses)).int().argmax())
            pictures, _ = pick(dataset, settings.seed, state.step, settings.train_batch_size)
            raise CalotypeError(
                f"the loss is {value} at step {state.step} (picture {int(pictures[worst])} of the data)",
                hint="lower --learning-rate and go on from the last checkpoint with --resume",
            )
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        state.optimizer.step()
        student.follow(settings.ema_decay)
        state.step += 1
        speed = settings.train_batch_size / (time.perf_counter() - started)
        rate = state.optimizer.param_groups[0]["lr"]
        yield TrainStep("train", state.step, settings.max_train_steps, value, float(norm), rate, speed)


def make_batch(
    dataset: Dataset, schedule: NoiseSchedule, settings: Settings, step: int, resolution: int, device: torch.device
) -> Batch:
    """The batch of a step: a pure function of seed and step, so a resumed run sees what the first would have seen."""
    pictures, captions = pick(dataset, settings.seed, step, settings.train_batch_size)
    generator = torch.Generator().manual_seed((settings.seed << 32) + step)
    x0 = dataset.latents[pictures].float()
    noise = torch.randn(x0.shape, generator=generator)
    index = torch.randint(0, settings.num_ddim_timesteps, (len(x0),), generator=generator)
    if settings.timestep_power != 1:
        share = torch.rand(len(x0), generator=generator) ** settings.timestep_power
        index = (share * settings.num_ddim_timesteps).long()
    w = settings.w_min + (settings.w_max - settings.w_min) * torch.rand(len(x0), generator=generator)
    return Batch(
        x0.to(device),
        noise.to(device),
        index.to(device),
        w.to(device),
        _conditioning(dataset, captions, resolution, device),
        _conditioning(dataset, torch.full_like(captions, dataset.null), resolution, device),
    )


def _conditioning(dataset: Dataset, rows: Tensor, resolution: int, device: torch.device) -> Conditioning:
    context = dataset.context[rows].to(device, torch.float32)
    if dataset.pooled is None:
        return Conditioning(context)
    sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32, device=device)
    return Conditioning(context, dataset.pooled[rows].to(device, torch.float32), sizes.expand(len(rows), 6))


def start(student: Student, settings: Settings) -> State:
    """Before the first step."""
    optimizer = torch.optim.AdamW(student.parameters, lr=settings.rate(0), weight_decay=settings.adam_weight_decay)
    return State(student, optimizer, [{"from_step": 0, **asdict(settings)}])


# ---- checkpoints: written beside, synced, renamed; the old one goes only after the new one stands ----


def newest_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = sorted((output / "checkpoints").glob("step-*[0-9]"))
    return found[-1] if found else None


def _save(state: State, output: Path) -> None:
    folder = output / "checkpoints" / f"step-{state.step:08d}"
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    moments = {
        f"{i}.{name}": tensor
        for i, entry in state.optimizer.state_dict()["state"].items()
        for name, tensor in entry.items()
    }
    for name, tensors in {**state.student.files(), "optimizer": moments}.items():
        save_file(tensors, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": state.step, "history": state.history}, indent=2))
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for old in sorted(folder.parent.glob("step-*[0-9]"))[:-1]:
        shutil.rmtree(old)


def _restore(state: State, folder: Path, settings: Settings) -> None:
    saved = json.loads((folder / "state.json").read_text())
    state.step, state.history = saved["step"], saved["history"]
    now, before = asdict(settings), asdict(Settings()) | state.history[-1]  # an older run knows fewer settings
    for name in ("lora", "lora_rank"):
        if now[name] != before[name]:
            raise UsageError(f"{name} is {now[name]}, and the run in this folder has {before[name]}: they must agree")
    # These may change in silence: they say how long it runs, not what a step is.
    changed = [
        name
        for name in now
        if now[name] != before[name] and name not in ("max_train_steps", "checkpointing_steps", "sampler")
    ]
    if changed:
        what = ", ".join(f"{name} {before[name]} -> {now[name]}" for name in changed)
        message = f"from step {state.step} on the settings differ from the run's so far: {what}"
        warnings.warn(message, CalotypeWarning, stacklevel=3)
    if now != {name: before[name] for name in now}:
        state.history.append({"from_step": state.step, **now})
    files = {file.stem: load_file(file) for file in folder.glob("*.safetensors")}
    state.student.restore(files)
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in files["optimizer"].items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = tensor
    state.optimizer.load_state_dict({"state": moments, "param_groups": state.optimizer.state_dict()["param_groups"]})


def _check_output(output: Path, resume: bool) -> None:
    if output.is_dir() and any(output.iterdir()) and not resume:
        raise UsageError(f"{output} is not empty", hint="--resume goes on with the run in it; or choose another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output} cannot be made: {error.strerror}") from error
