"""Has calotype and its peers draw in turn, and collects what each stage took."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from calotype.bench.task import Task
from calotype.errors import CalotypeError
from calotype.machine import ceiling, processor
from calotype.precision import DTYPES

STAGES = ("import", "load", "first", "cold", "text", "unet", "decode", "rest", "picture")  # as tables have them
WARM = ("text", "unet", "decode", "rest", "picture")  # of every picture but a process's first
REST = 1.0  # seconds between two contenders: threads go on spinning for a while
Show = Callable[[str], None]


@dataclass(frozen=True)
class Peer:
    """What a peer needs, and whether the model is converted for it first."""

    module: str  # of calotype.bench.peers
    needs: tuple[str, ...] = ()
    converts: bool = False


PEERS = {
    "diffusers": Peer("diffusers", ("diffusers", "transformers", "accelerate")),
    "openvino": Peer("openvino", ("openvino", "diffusers", "transformers", "accelerate"), converts=True),
}
OURS = Peer("calotype")


@dataclass(frozen=True)
class Contender:
    """Who draws: calotype with some steps, or a peer."""

    name: str
    peer: Peer
    task: Task


@dataclass
class Figures:
    """Seconds of each stage, one number a process or a picture, and how far the first picture is from float32's."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    convert: float | None = None
    distance: float | None = None  # root mean square over pixels of 0 to 255

    def of(self, stage: str) -> float | None:
        return median(self.seconds[stage]) if self.seconds[stage] else None


@dataclass(frozen=True)
class Comparison:
    """All figures: the first contender's are compared with the others'."""

    task: Task
    ceiling: float  # FLOP a second
    flops: int  # of one call of the U-Net
    figures: dict[str, Figures]
    processor: str = field(default_factory=processor)

    def ratio(self, other: str, stage: str) -> float | None:
        """How many times as fast as `other` the first one is: the median of the ratios of each round, so that what
        slows a whole round down cancels out.
        """
        ours, theirs = next(iter(self.figures.values())).seconds[stage], self.figures[other].seconds[stage]
        ratios = [their / our for our, their in zip(ours, theirs, strict=False) if our > 0]
        return median(ratios) if ratios else None

    def share(self, name: str) -> float:
        """Of the ceiling, that a call of the U-Net reaches."""
        unet = self.figures[name].of("unet")
        assert unet is not None
        return self.flops / unet / self.ceiling

    def to_json(self) -> dict[str, Any]:
        others = list(self.figures)[1:]
        return {
            "processor": self.processor,
            "task": json.loads(self.task.to_json()) | {"folder": Path(self.task.folder).name, "scratch": None},
            "ceiling": self.ceiling,
            "flops": self.flops,
            "contenders": {
                name: {
                    "seconds": figures.seconds,
                    "medians": {stage: figures.of(stage) for stage in STAGES},
                    "convert": figures.convert,
                    "distance": figures.distance,
                    "share": self.share(name),
                }
                for name, figures in self.figures.items()
            },
            "ratios": {other: {stage: self.ratio(other, stage) for stage in STAGES} for other in others},
        }


def missing(name: str) -> list[str]:
    """The packages of a peer that are not installed."""
    return [each for each in PEERS[name].needs if find_spec(each) is None]


def compare(
    contenders: Sequence[Contender], reference: Task, *, starts: int, runs: int, show: Show, warn: Show
) -> Comparison:
    """`starts` processes of each, one after the other; the last ones draw `runs` more pictures, in turn.

    `reference` draws the picture that others are compared with. A peer that fails is left out, with a warning; the
    first contender's failure is a CalotypeError.
    """
    show("drawing in float32")
    with _process(Contender("reference", OURS, reference)) as process:
        flops = process.draw(0)["flops"]
    truth, dtype = _picture(reference), DTYPES[contenders[0].task.dtype]
    best = ceiling(dtype)
    figures = {each.name: Figures() for each in contenders}
    running: dict[str, _Process] = {}

    def attempt(contender: Contender, act: Callable[..., None], *given: Any) -> None:
        if contender.name not in figures:
            return
        try:
            act(contender, figures[contender.name], *given)
        except CalotypeError as error:
            if contender is contenders[0]:
                raise
            warn(f"{error.message}: it is left out")
            del figures[contender.name]

    for each in contenders:
        if each.peer.converts:
            show(f"{each.name}: converting the model")
            attempt(each, _convert)
    _read(Path(contenders[0].task.folder))
    try:
        for start in range(starts):
            for each in contenders:
                show(f"{each.name}: process {start + 1} of {starts}")
                attempt(each, _start, running, truth)
                if start < starts - 1 and each.name in running:
                    running.pop(each.name).end()
        for run in range(runs):
            for each in contenders:
                show(f"{each.name}: picture {run + 1} of {runs}")
                attempt(each, _draw, running, run + 1)
    finally:
        for process in running.values():
            process.end()
    best = max(best, ceiling(dtype))  # both: the machine may have been busy at one time
    return Comparison(contenders[0].task, best, flops, figures)


def _read(folder: Path) -> None:
    """Everybody finds the model's files in the system's cache, the first one too."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def _convert(contender: Contender, figures: Figures) -> None:
    clock = time.perf_counter()
    process = _Process(contender, "--prepare")
    process.wait()
    figures.convert = time.perf_counter() - clock


def _start(contender: Contender, figures: Figures, running: dict[str, _Process], truth: Any) -> None:
    time.sleep(REST)
    clock = time.perf_counter()
    process = running[contender.name] = _Process(contender)
    stages = process.draw(0)["stages"]
    figures.seconds["cold"].append(time.perf_counter() - clock)
    figures.seconds["first"] += stages["picture"]
    for stage in ("import", "load"):
        figures.seconds[stage] += stages[stage]
    figures.distance = _distance(_picture(contender.task), truth)


def _draw(contender: Contender, figures: Figures, running: dict[str, _Process], seed: int) -> None:
    time.sleep(REST)
    stages = running[contender.name].draw(seed)["stages"]
    networks = {stage: sum(stages.get(stage, [])) for stage in ("text", "unet", "decode")}
    picture = stages["picture"][0]
    taken = networks | {"unet": median(stages["unet"]), "rest": picture - sum(networks.values()), "picture": picture}
    for stage in WARM:
        figures.seconds[stage].append(taken[stage])


def _picture(task: Task) -> Any:
    from PIL import Image

    with Image.open(Path(task.scratch, "picture.png")) as picture:
        return picture.convert("RGB")


def _distance(picture: Any, truth: Any) -> float:
    import numpy as np

    a, b = (np.asarray(each, dtype=np.float64) for each in (picture, truth))
    return float(np.sqrt(np.mean((a - b) ** 2)))


# ---- the processes ----


class _Process:
    """One contender's process. Raises CalotypeError with the last line of what it complained of."""

    def __init__(self, contender: Contender, *options: str) -> None:
        self.name = contender.name
        Path(contender.task.scratch).mkdir(parents=True, exist_ok=True)
        self.log = Path(contender.task.scratch, "log.txt")
        command = [sys.executable, "-m", "calotype.bench.peer", contender.peer.module, contender.task.to_json()]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *options], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )

    def draw(self, seed: int) -> dict[str, Any]:
        """Has it draw, and returns what it says of that."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{seed}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        for line in self.process.stdout:
            if line.startswith("{"):
                told: dict[str, Any] = json.loads(line)
                return told
        raise self._failure()

    def wait(self) -> None:
        """Until it ends by itself."""
        self.process.communicate()
        if self.process.returncode != 0:
            raise self._failure()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _failure(self) -> CalotypeError:
        self.end()
        lines = self.log.read_text("utf-8", errors="replace").strip().splitlines()
        return CalotypeError(f"{self.name} failed: {lines[-1] if lines else f'exit code {self.process.returncode}'}")


@contextmanager
def _process(contender: Contender) -> Iterator[_Process]:
    process = _Process(contender)
    try:
        yield process
    finally:
        process.end()
