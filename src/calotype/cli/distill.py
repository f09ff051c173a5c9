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
from inspect import Parameter
from pathlib import Path
from typing import Any

from calotype.cli.options import argument, of, option, switch, taking
from calotype.cli.progress import Show, progress
from calotype.errors import UsageError
from calotype.training.settings import Settings, TrainStep

PANELS = {
    "What is trained": "lora lora_rank objective phases student dtype sampler",
    "Pictures and batches": "max_train_steps train_batch_size gradient_accumulation_steps resolution aspect_buckets"
    " random_flip samples teacher_steps seed",
    "Learning rate": "learning_rate lr_scheduler lr_warmup_steps optimizer adam_weight_decay max_grad_norm ema_decay",
    "The teacher's path": "w_min w_max num_ddim_timesteps skipping_step solver_substeps timestep_power loss_type"
    " huber_c",
    "Checkpoints and validation": "checkpointing_steps checkpoints_total_limit resume validation_steps"
    " validation_samples patience cache",
    "Speed and memory": "mixed_precision gradient_checkpointing compile fsdp device",
}
OTHERS = {  # than fields of Settings, as options of their panel
    "student": lambda panel: option("student", str, "An LCM of that teacher to go on from.", panel=panel, metavar="M"),
    "dtype": lambda panel: option(
        "dtype", str, "Of the files: float16, bfloat16, float32.", panel=panel, metavar="T", default="float16"
    ),
    "resume": lambda panel: switch("resume", "Go on from the newest checkpoint in OUT, or start.", panel=panel),
    "cache": lambda panel: option(
        "cache", Path, "Where encoded pictures are kept [default: OUT/cache].", panel=panel, metavar="DIR"
    ),
    "device": lambda panel: option("device", str, "auto, cpu, cuda.", panel=panel, metavar="D", default="auto"),
}
FLAGS = {"aspect_buckets": "--aspect-buckets/--center-crop"}


def panelled() -> Iterator[Parameter]:
    """The options of training, panel by panel."""
    for panel, names in PANELS.items():
        for name in names.split():
            flags = (FLAGS[name],) if name in FLAGS else ()
            yield OTHERS[name](panel) if name in OTHERS else of(Settings, name, *flags, panel=panel)


@taking(
    [
        argument("teacher", str, "The model to distil: a folder, file or Hub id."),
        argument(
            "data",
            Path,
            "Captioned pictures: a folder or WebDataset tars; or a file of prompts, a line each, whose pictures "
            "the teacher draws.",
        ),
        option("output", Path, "The folder to make.", "--output", "-o", metavar="OUT"),
        option("check", Path, "Only say what is in DATA, and what is wrong with it.", metavar="DATA"),
        *panelled(),
        switch("offline", "Use only models that are on this machine."),
        switch("as_json", "With --check: print one JSON object.", "--json"),
        switch("quiet", "No progress.", "--quiet", "-q"),
    ]
)
def distill(
    teacher: str | None,
    data: Path | None,
    output: Path | None,
    check: Path | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Distil a latent consistency model: few steps instead of many. Prints the folder when it is done.

    Under torchrun it trains in all processes. Ctrl-C and SIGTERM save at the end of a step; --resume goes on.
    """
    if check is not None:
        report(check, given["resolution"], given["aspect_buckets"], as_json, quiet)
        return
    if teacher is None or data is None or output is None:
        missing = "TEACHER" if teacher is None else "DATA" if data is None else "--output"
        raise UsageError(f"{missing} is missing", hint="calotype distill TEACHER DATA -o OUT [--lora]")
    import calotype

    quiet = quiet or os.environ.get("RANK", "0") != "0"
    with progress(quiet=quiet) as show, interruptible() as signals:
        show("loading the teacher")
        command = shlex.join(["calotype", *sys.argv[1:]])
        run = calotype.distill(teacher, data, output, stop=signals.stop, command=command, **given)
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
