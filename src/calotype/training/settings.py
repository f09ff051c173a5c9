"""How to train: every setting, with diffusers' names where its LCM scripts have one, checked in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calotype.errors import UsageError
from calotype.samplers import CONSISTENCY

# What the student learns: latent consistency distillation and fine-tuning (arXiv 2310.04378, 4.3 and 4.4), phased
# consistency (arXiv 2405.18407), trajectory consistency (arXiv 2402.19159).
OBJECTIVES = ("lcd", "lcf", "pcm", "tcd")
LOSSES = ("huber", "l2")
OPTIMIZERS = ("adamw", "adamw8bit")
PRECISIONS = ("no", "bf16")
SCHEDULERS = ("constant", "cosine")


@dataclass(frozen=True)
class Settings:
    """How to train. A batch is `train_batch_size` pictures for each process and each accumulated part."""

    objective: str = "lcd"
    phases: int = 4  # of pcm: how many pieces the path is cut into, each a step in the end
    lora: bool = False  # train a LoRA on the teacher, and no network of its own
    lora_rank: int = 64
    max_train_steps: int = 1000
    train_batch_size: int = 12
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False  # compute activations anew for the gradients instead of keeping them
    learning_rate: float | None = None  # 1e-5, or 1e-4 of a LoRA
    lr_scheduler: str = "constant"  # or "cosine": falls to zero at the end
    lr_warmup_steps: int = 50
    resolution: int | None = None  # pixels; the teacher's own size if None
    aspect_buckets: bool = True  # pictures keep their shape, as far as 1:2 and 2:1; False: the square in their middle
    random_flip: bool = False  # every other time, a picture is seen mirrored
    seed: int = 0
    w_min: float = 3.0  # the paper's w: guidance - 1
    w_max: float = 15.0
    num_ddim_timesteps: int = 50  # of the grid that training visits, the one that sampling picks its steps from
    skipping_step: int = 20  # the paper's k: timesteps that the teacher's solver jumps
    solver_substeps: int = 1  # in which it goes there
    timestep_power: float = 1.0  # of the uniform number that picks a timestep: 2 sees half of all below T / 4
    ema_decay: float = 0.95  # of the average that is target and result; 0: they are the student as it is
    loss_type: str = "huber"
    huber_c: float = 0.001
    optimizer: str = "adamw"  # or "adamw8bit", of bitsandbytes
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"  # or "bf16"
    compile: bool = False  # torch.compile
    fsdp: bool = False  # cut a full student, its average and the teacher into pieces over the processes
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2  # besides the one that validation chose
    validation_steps: int | None = None  # as checkpointing_steps; 0: never
    validation_samples: int = 32  # captions that are held out, and drawn at each validation
    patience: int = 3  # validations in a row that are measurably worse than the best, until the run ends; 0: never
    samples: int | None = None  # of prompts without pictures: how many the teacher draws; one for each prompt if None
    teacher_steps: int = 25  # in which the teacher draws those, and the pictures of the validation
    sampler: str | None = None  # the finished model's default: "lcm" or "tcd"; pcm has its own

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 1e-4 if self.lora else 1e-5)
        if self.validation_steps is None:
            object.__setattr__(self, "validation_steps", self.checkpointing_steps)
        for name, choices in (
            ("objective", OBJECTIVES),
            ("loss_type", LOSSES),
            ("optimizer", OPTIMIZERS),
            ("mixed_precision", PRECISIONS),
            ("lr_scheduler", SCHEDULERS),
            ("sampler", (None, "ddim") if self.objective == "pcm" else (None, *CONSISTENCY)),
        ):
            if getattr(self, name) not in choices:
                allowed = ", ".join(choice for choice in choices if choice is not None)
                raise UsageError(f"{name} is {getattr(self, name)!r}: must be one of {allowed}")
        if self.sampler is None:
            object.__setattr__(self, "sampler", {"tcd": "tcd", "pcm": "ddim"}.get(self.objective, "lcm"))
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in (
            "phases",
            "lora_rank",
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_ddim_timesteps",
            "skipping_step",
            "solver_substeps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "teacher_steps",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: must be at least 1")
        for name in ("validation_steps", "patience", "lr_warmup_steps"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}: must be at least 0")
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
        if self.validation_steps and self.validation_samples < 3:
            raise UsageError(f"validation_samples is {self.validation_samples}: must be at least 3")
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"samples is {self.samples}: must be at least 1")
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise UsageError(f"resolution is {self.resolution}: must be a positive multiple of 8")
        if self.objective == "pcm" and self.num_ddim_timesteps % self.phases:
            raise UsageError(
                f"phases is {self.phases}, which does not divide num_ddim_timesteps, {self.num_ddim_timesteps}",
                hint="for 4 or 8 phases: num_ddim_timesteps 40, skipping_step 25",
            )
        if self.fsdp and self.lora:
            raise UsageError("fsdp cuts up full students: a LoRA is small enough for each process", hint="leave it out")

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        assert self.learning_rate is not None
        warm = min(1.0, (step + 1) / max(1, self.lr_warmup_steps))
        if self.lr_scheduler == "constant":
            return self.learning_rate * warm
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.max_train_steps))


@dataclass(frozen=True)
class TrainStep:
    """What the loop reports: a stage, how far it is, and the figures.

    Stages: "encode" (pictures and captions), "train", "validate" (pictures drawn; with a `distance` when done), "save",
    "stopped" (by a signal, saved) or "done".
    """

    stage: str
    step: int  # pictures encoded or drawn; or steps trained
    total: int | None
    loss: float = math.nan
    grad_norm: float = math.nan
    learning_rate: float = math.nan
    samples_per_second: float = math.nan
    distance: float = math.nan  # of held-out pictures to the teacher's: the kernel distance of calotype eval
    distance_error: float = math.nan  # its standard error
