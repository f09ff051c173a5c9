"""What a run leaves to be read: a line of JSON for every report, and TensorBoard's events where it is installed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from calotype.atomic import replacing
from calotype.training.ranks import Ranks
from calotype.training.settings import TrainStep

FILE, FOLDER = "log.jsonl", "logs"


class Log:
    """`log.jsonl` in a run's folder, and events in `logs/`. Lines of steps that are done again are taken out first.

    Of many processes only the first writes.
    """

    def __init__(self, output: Path, step: int, ranks: Ranks) -> None:
        self._file: TextIO | None = None
        self._events: Any = None
        if ranks.first:
            self._open(output, step)

    def _open(self, output: Path, step: int) -> None:
        path = output / FILE
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            with replacing(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines if _step(line) <= step), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(output / FOLDER, purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, report: TrainStep) -> None:
        """Keeps a report. Figures that it lacks are left out."""
        if self._file is None:
            return
        row = {name: value for name, value in asdict(report).items() if value is not None and value == value}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in row.items():
                if isinstance(value, float) and math.isfinite(value):
                    self._events.add_scalar(name, value, report.step)


def _step(line: str) -> float:
    """The step of a line; one that a crash cut short is of none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
