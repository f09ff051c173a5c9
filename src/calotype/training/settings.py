"""How to train: every setting, with diffusers' names where its LCM scripts have one, checked in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calotype.errors import UsageError
from calotype.rules import Choice, Flag, Number, Positive, Whole, listed, option, settle
from calotype.samplers import CONSISTENCY

# What the student learns: latent consistency distillation and fine-tuning (arXiv 2310.04378, 4.3 and 4.4), phased
# consistency (arXiv 2405.18407), trajectory consistency (arXiv 2402.19159).
OBJECTIVES = ("lcd", "lcf", "pcm", "tcd")
LOSSES = ("huber", "l2")
OPTIMIZERS = ("adamw", "adamw8bit")
PRECISIONS = ("no", "bf16")
SCHEDULERS = ("constant", "cosine")


COUNT, COUNT_OR_NONE = Whole(1), Whole(0)
MAX_SEED = 2**24 - 1  # torch's have 64 bits, of which the numbers of a run's batches take 40


@listed
@dataclass(frozen=True)
class Settings:
    """How to train. A batch is `train_batch_size` pictures for each process and each accumulated part.

    Raises UsageError, naming the field and what is allowed. The fields:
    """

    objective: str = option(
        "lcd",
        "lcd: consistency distillation; lcf: tuning on pictures without a teacher; pcm: phased; tcd: trajectories.",
        Choice(OBJECTIVES),
        "NAME",
        "",
    )
    phases: int = option(4, "Of pcm.", COUNT, "N", "How many pieces the path is cut into, each a step in the end.")
    lora: bool = option(False, "Train an LCM-LoRA for the teacher and its kin.", Flag(), more="No network of its own.")
    lora_rank: int = option(64, "Of the LoRA.", COUNT, "R")
    max_train_steps: int = option(1000, "Updates of the network.", COUNT, "N")
    train_batch_size: int = option(12, "Pictures at a time, in each process.", COUNT, "B")
    gradient_accumulation_steps: int = option(1, "So many times that, an update.", COUNT, "N")
    gradient_checkpointing: bool = option(
        False, "Less memory, a third more time.", Flag(), more="Activations are computed anew, not kept."
    )
    learning_rate: float | None = option(None, "Adam's rate [default: 1e-5, LoRA 1e-4].", Positive(), "R")
    lr_scheduler: str = option("constant", "constant, or cosine: falls to zero.", Choice(SCHEDULERS), "NAME", "")
    lr_warmup_steps: int = option(50, "Updates over which the rate rises.", COUNT_OR_NONE, "N")
    resolution: int | None = option(None, "Pixels [default: the teacher's own].", Whole(8, step=8), "P")
    aspect_buckets: bool = option(
        True,
        "Keep the pictures' shapes, or cut out the square in the middle.",
        Flag(),
        more="Kept as far as 1:2 and 2:1.",
    )
    random_flip: bool = option(False, "See every other picture mirrored.", Flag())
    seed: int = option(0, "Of every random choice.", Whole(0, MAX_SEED), "S")
    w_min: float = option(3.0, "Least guidance - 1.", Number(0), "W", "The paper's w.")
    w_max: float = option(15.0, "Greatest guidance - 1.", Number(0), "W", "")
    num_ddim_timesteps: int = option(50, "Timesteps that training visits.", COUNT, "N", "Sampling picks from them.")
    skipping_step: int = option(20, "Timesteps that the teacher jumps.", COUNT, "K", "The paper's k.")
    solver_substeps: int = option(1, "Steps in which it jumps.", COUNT, "N")
    timestep_power: float = option(
        1.0,
        "Above 1: more of the less noisy timesteps.",
        Positive(),
        "P",
        "Of the uniform number that picks one: 2 sees half of all below T / 4.",
    )
    ema_decay: float = option(
        0.95, "Of target and result; 0: none.", Number(0, 1), "D", "They are a moving average of the student."
    )
    loss_type: str = option("huber", "huber, or l2.", Choice(LOSSES), "NAME", "")
    huber_c: float = option(0.001, "Of the pseudo-Huber loss.", Positive(), "C")
    optimizer: str = option("adamw", "adamw, or adamw8bit (bitsandbytes).", Choice(OPTIMIZERS), "NAME", "")
    adam_weight_decay: float = option(0.0, "Of the weights.", Number(0), "D")
    max_grad_norm: float = option(1.0, "Longer gradients are cut.", Positive(), "N")
    mixed_precision: str = option("no", "no, or bf16.", Choice(PRECISIONS), "KIND", "")
    compile: bool = option(False, "torch.compile: slow to begin, then faster.", Flag())
    fsdp: bool = option(
        False, "Cut a full student up over the processes of torchrun.", Flag(), more="And its average, and the teacher."
    )
    checkpointing_steps: int = option(500, "Updates between checkpoints.", COUNT, "N")
    checkpoints_total_limit: int = option(2, "Checkpoints to keep, beside the best.", COUNT, "N")
    validation_steps: int | None = option(
        None, "Updates between validations; 0: none [default: as checkpoints].", COUNT_OR_NONE, "N"
    )
    validation_samples: int = option(32, "Held-out captions to draw.", COUNT_OR_NONE, "N", "At least 3.")
    patience: int = option(
        3,
        "End after so many validations got worse; 0: never.",
        COUNT_OR_NONE,
        "N",
        "In a row, and measurably worse than the best.",
    )
    samples: int | None = option(
        None, "Of prompts: how many pictures the teacher draws [default: one each].", COUNT, "N", ""
    )
    teacher_steps: int = option(25, "In which the teacher draws.", COUNT, "N", "Also in validation.")
    sampler: str | None = option(
        None,
        "The finished model's default: lcm, tcd [default: the objective's].",
        Choice((*CONSISTENCY, "ddim")),
        "S",
        "That of pcm is ddim.",
    )

    def __post_init__(self) -> None:
        settle(self, Settings)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 1e-4 if self.lora else 1e-5)
        if self.validation_steps is None:
            object.__setattr__(self, "validation_steps", self.checkpointing_steps)
        if self.sampler is None:
            object.__setattr__(self, "sampler", {"tcd": "tcd", "pcm": "ddim"}.get(self.objective, "lcm"))
        Choice(("ddim",) if self.objective == "pcm" else CONSISTENCY)("sampler", self.sampler)
        if not self.w_min <= self.w_max < math.inf:
            raise UsageError(
                f"w_min {self.w_min} and w_max {self.w_max}: must be 0 <= w_min <= w_max",
                hint="w is the paper's guidance scale: diffusers' guidance_scale - 1",
            )
        if self.ema_decay == 1:
            raise UsageError("ema_decay is 1.0: must be below 1", hint="the average would never change")
        if self.validation_steps and self.validation_samples < 3:
            raise UsageError(f"validation_samples is {self.validation_samples}: must be at least 3")
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
