"""calotype distill: a latent consistency model or LCM-LoRA out of an ordinary model."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calotype.cli import parse
from calotype.cli.progress import Show, progress
from calotype.errors import UsageError

if TYPE_CHECKING:
    from calotype.training.settings import TrainStep

MODEL, BATCHES, RATE, GUIDANCE, RUN, SPEED = (
    "What is trained",
    "Pictures and batches",
    "Learning rate",
    "The teacher's path",
    "Checkpoints and validation",
    "Speed and memory",
)


def distill(
    teacher: Annotated[
        str | None, typer.Argument(help="The model to distil: a folder, file or Hub id.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Captioned pictures: a folder or WebDataset tars; or a file of prompts, a line each, whose pictures "
            "the teacher draws.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="The folder to make.", show_default=False)
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(metavar="DATA", help="Only say what is in DATA, and what is wrong with it.", show_default=False),
    ] = None,
    lora: Annotated[
        bool,
        typer.Option("--lora", help="Train an LCM-LoRA for the teacher and its kin.", rich_help_panel=MODEL),
    ] = False,
    lora_rank: Annotated[int, typer.Option(metavar="R", help="Of the LoRA.", rich_help_panel=MODEL)] = 64,
    objective: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="lcd: consistency distillation; lcf: tuning on pictures without a teacher; pcm: phased; tcd: "
            "trajectories.",
            rich_help_panel=MODEL,
        ),
    ] = "lcd",
    phases: Annotated[int, typer.Option(metavar="N", help="Of pcm.", rich_help_panel=MODEL)] = 4,
    student: Annotated[
        str | None,
        typer.Option(
            metavar="M", help="An LCM of that teacher to go on from.", show_default=False, rich_help_panel=MODEL
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(metavar="T", help="Of the files: float16, bfloat16, float32.", rich_help_panel=MODEL),
    ] = "float16",
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help="The finished model's default: lcm, tcd [default: the objective's].",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    max_train_steps: Annotated[
        int, typer.Option(metavar="N", help="Updates of the network.", rich_help_panel=BATCHES)
    ] = 1000,
    train_batch_size: Annotated[
        int, typer.Option(metavar="B", help="Pictures at a time, in each process.", rich_help_panel=BATCHES)
    ] = 12,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(metavar="N", help="So many times that, an update.", rich_help_panel=BATCHES)
    ] = 1,
    resolution: Annotated[
        int | None,
        typer.Option(
            metavar="P", help="Pixels [default: the teacher's own].", show_default=False, rich_help_panel=BATCHES
        ),
    ] = None,
    aspect_buckets: Annotated[
        bool,
        typer.Option(
            "--aspect-buckets/--center-crop",
            help="Keep the pictures' shapes, or cut out the square in the middle.",
            rich_help_panel=BATCHES,
        ),
    ] = True,
    random_flip: Annotated[
        bool, typer.Option("--random-flip", help="See every other picture mirrored.", rich_help_panel=BATCHES)
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of prompts: how many pictures the teacher draws [default: one each].",
            show_default=False,
            rich_help_panel=BATCHES,
        ),
    ] = None,
    teacher_steps: Annotated[
        int, typer.Option(metavar="N", help="In which the teacher draws.", rich_help_panel=BATCHES)
    ] = 25,
    seed: Annotated[int, typer.Option(metavar="S", help="Of every random choice.", rich_help_panel=BATCHES)] = 0,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            parser=parse.number, metavar="R", help="Adam's rate [default: 1e-5, LoRA 1e-4].", rich_help_panel=RATE
        ),
    ] = None,
    lr_scheduler: Annotated[
        str, typer.Option(metavar="NAME", help="constant, or cosine: falls to zero.", rich_help_panel=RATE)
    ] = "constant",
    lr_warmup_steps: Annotated[
        int, typer.Option(metavar="N", help="Updates over which the rate rises.", rich_help_panel=RATE)
    ] = 50,
    optimizer: Annotated[
        str, typer.Option(metavar="NAME", help="adamw, or adamw8bit (bitsandbytes).", rich_help_panel=RATE)
    ] = "adamw",
    adam_weight_decay: Annotated[
        float, typer.Option(parser=parse.number, metavar="D", help="Of the weights.", rich_help_panel=RATE)
    ] = 0.0,
    max_grad_norm: Annotated[
        float, typer.Option(parser=parse.number, metavar="N", help="Longer gradients are cut.", rich_help_panel=RATE)
    ] = 1.0,
    ema_decay: Annotated[
        float,
        typer.Option(parser=parse.number, metavar="D", help="Of target and result; 0: none.", rich_help_panel=RATE),
    ] = 0.95,
    w_min: Annotated[
        float, typer.Option(parser=parse.number, metavar="W", help="Least guidance - 1.", rich_help_panel=GUIDANCE)
    ] = 3.0,
    w_max: Annotated[
        float, typer.Option(parser=parse.number, metavar="W", help="Greatest guidance - 1.", rich_help_panel=GUIDANCE)
    ] = 15.0,
    num_ddim_timesteps: Annotated[
        int, typer.Option(metavar="N", help="Timesteps that training visits.", rich_help_panel=GUIDANCE)
    ] = 50,
    skipping_step: Annotated[
        int, typer.Option(metavar="K", help="Timesteps that the teacher jumps.", rich_help_panel=GUIDANCE)
    ] = 20,
    solver_substeps: Annotated[
        int, typer.Option(metavar="N", help="Steps in which it jumps.", rich_help_panel=GUIDANCE)
    ] = 1,
    timestep_power: Annotated[
        float,
        typer.Option(
            parser=parse.number,
            metavar="P",
            help="Above 1: more of the less noisy timesteps.",
            rich_help_panel=GUIDANCE,
        ),
    ] = 1.0,
    loss_type: Annotated[str, typer.Option(metavar="NAME", help="huber, or l2.", rich_help_panel=GUIDANCE)] = "huber",
    huber_c: Annotated[
        float,
        typer.Option(parser=parse.number, metavar="C", help="Of the pseudo-Huber loss.", rich_help_panel=GUIDANCE),
    ] = 0.001,
    checkpointing_steps: Annotated[
        int, typer.Option(metavar="N", help="Updates between checkpoints.", rich_help_panel=RUN)
    ] = 500,
    checkpoints_total_limit: Annotated[
        int, typer.Option(metavar="N", help="Checkpoints to keep, beside the best.", rich_help_panel=RUN)
    ] = 2,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest checkpoint in OUT, or start.", rich_help_panel=RUN),
    ] = False,
    validation_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Updates between validations; 0: none [default: as checkpoints].",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
    validation_samples: Annotated[
        int, typer.Option(metavar="N", help="Held-out captions to draw.", rich_help_panel=RUN)
    ] = 32,
    patience: Annotated[
        int,
        typer.Option(metavar="N", help="End after so many validations got worse; 0: never.", rich_help_panel=RUN),
    ] = 3,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where encoded pictures are kept [default: OUT/cache].", rich_help_panel=RUN),
    ] = None,
    mixed_precision: Annotated[str, typer.Option(metavar="KIND", help="no, or bf16.", rich_help_panel=SPEED)] = "no",
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, a third more time.", rich_help_panel=SPEED),
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile: slow to begin, then faster.", rich_help_panel=SPEED)
    ] = False,
    fsdp: Annotated[
        bool,
        typer.Option("--fsdp", help="Cut a full student up over the processes of torchrun.", rich_help_panel=SPEED),
    ] = False,
    device: Annotated[str, typer.Option(metavar="D", help="auto, cpu, cuda.", rich_help_panel=SPEED)] = "auto",
    offline: Annotated[bool, typer.Option("--offline", help="Use only models that are on this machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Distil a latent consistency model: few steps instead of many. Prints the folder when it is done.

    Under torchrun it trains in all processes. Ctrl-C and SIGTERM save at the end of a step; --resume goes on.
    """
    given = dict(locals())
    if check is not None:
        report(check, resolution, aspect_buckets, as_json, quiet)
        return
    if teacher is None or data is None or output is None:
        missing = "TEACHER" if teacher is None else "DATA" if data is None else "--output"
        raise UsageError(f"{missing} is missing", hint="calotype distill TEACHER DATA -o OUT [--lora]")
    from dataclasses import fields

    import calotype
    from calotype.training.settings import Settings

    chosen = {field.name: given[field.name] for field in fields(Settings)}
    quiet = quiet or os.environ.get("RANK", "0") != "0"
    with progress(quiet=quiet) as show, interruptible() as signals:
        show("loading the teacher")
        run = calotype.distill(
            teacher,
            data,
            output,
            student=student,
            resume=resume,
            cache=cache,
            device=device,
            offline=offline,
            dtype=dtype,
            stop=signals.stop,
            command=shlex.join(["calotype", *sys.argv[1:]]),
            **chosen,
        )
        follow(run, show, signals, quiet)
    if os.environ.get("RANK", "0") == "0":
        print(output)


def follow(run: Iterator[TrainStep], show: Show, signals: Signals, quiet: bool) -> None:
    """Draws the progress of a run until it ends. Raises what a signal asks for, once the run is saved."""
    first: tuple[int, float] | None = None
    distance = ""
    for step in run:
        if step.stage == "encode":
            show(f"encoding pictures: {step.step}", step.step, step.total)
        elif step.stage == "train":
            signals.training = True
            first = first or (step.step, time.monotonic())
            left = remaining(first, step)
            rate = f"{step.samples_per_second:.1f} pictures/s"
            text = f"step {step.step} of {step.total}, loss {step.loss:.4f}{distance}, {rate}{left}"
            show(text, step.step, step.total)
        elif step.stage == "validate" and not math.isnan(step.distance):
            distance = f", held-out distance {1000 * step.distance:.1f}"
            if not quiet:
                error = 1000 * step.distance_error
                print(f"step {step.step}{distance} ± {error:.1f}", file=sys.stderr)
        elif step.stage == "validate":
            show(f"drawing held-out captions: {step.step}", step.step, step.total)
        elif step.stage == "stopped":
            print(f"saved at step {step.step} of {step.total}: --resume goes on", file=sys.stderr)
            signals.answer()


def remaining(first: tuple[int, float], step: TrainStep) -> str:
    """How long the rest will take, by the time since the first step."""
    done, since = step.step - first[0], time.monotonic() - first[1]
    if done < 2 or step.total is None:
        return ""
    seconds = since / done * (step.total - step.step)
    return f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left"


class Signals:
    """What SIGINT and SIGTERM asked for. In training the first is heeded at the end of a step, a second one at once."""

    def __init__(self) -> None:
        self.training = False
        self._number: int | None = None

    def receive(self, number: int, frame: object) -> None:
        again, self._number = self._number is not None, number
        if again or not self.training:
            self.answer()
        print("saving at the end of this step; once more ends it at once", file=sys.stderr)

    def stop(self) -> bool:
        return self._number is not None

    def answer(self) -> None:
        """Raises what the signal means."""
        from calotype.cli.interruption import Terminated

        if self._number == signal.SIGTERM:
            raise Terminated
        raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Signals]:
    signals = Signals()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, signals.receive)
    except ValueError:  # not the main thread: whoever runs us handles signals
        yield signals
        return
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report(path: Path, resolution: int | None, buckets: bool, as_json: bool, quiet: bool) -> None:
    """Prints what is in DATA. Raises UsageError where training would refuse it."""
    from calotype.training.check import DataReport, checking

    side = 512 if resolution is None else resolution
    with progress(quiet=quiet) as show:
        found = None
        for step in checking(path, side, buckets=buckets):
            if isinstance(step, DataReport):
                found = step
            else:
                show(f"reading pictures: {step}", step)
    assert found is not None
    print(json.dumps(found.to_json()) if as_json else "\n".join(found.lines()))
    if not found.passes:
        raise UsageError(f"{path} cannot be trained on as it is", hint="remove or replace the files named above")
