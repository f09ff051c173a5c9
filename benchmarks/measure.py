"""How the benchmarks measure: whole processes, interleaved, so that a busy machine is unfair to all alike.

Besides the wall clock, the processor's time (user + system) of each process is kept: other programs hardly move it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "src/calotype/models/icons"
CALOTYPE = str(Path(sys.executable).with_name("calotype"))  # the command as it is installed
Command = Sequence[str]


@dataclass(frozen=True)
class Run:
    """Seconds that one process took."""

    wall: float
    processor: float


def run(command: Command) -> Run:
    """Runs a command to its end, offline. Raises RuntimeError with its stderr where it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        list(command), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed ({process.returncode}):\n{complaint}")
    return Run(wall, usage.ru_utime + usage.ru_stime)


def interleaved(commands: Mapping[str, Command], runs: int) -> dict[str, list[Run]]:
    """Runs every command once to warm the page cache, then `runs` rounds of all of them in turn."""
    for command in commands.values():
        run(command)
    results: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            results[name].append(run(command))
    return results


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios within each round: what slows a whole round down cancels out."""
    return median(mine / other for mine, other in zip(ours, theirs, strict=True))


def report(results: Mapping[str, Sequence[Run]], reference: str) -> None:
    """A table: medians, and each command's ratio to `reference`."""
    other = results[reference]
    print(f"{'':34}   wall s    ratio   processor s    ratio")
    for name, runs in results.items():
        wall = median(run.wall for run in runs)
        processor = median(run.processor for run in runs)
        wall_ratio = ratio([run.wall for run in runs], [run.wall for run in other])
        processor_ratio = ratio([run.processor for run in runs], [run.processor for run in other])
        print(f"{name:34} {wall:8.3f} {wall_ratio:8.3f} {processor:13.3f} {processor_ratio:8.3f}")


def verdict(what: str, figure: float, target: float) -> None:
    """One line that says whether a target is met."""
    print(f"{what}: {figure:.3f}, target at most {target:g}: {'met' if figure <= target else 'MISSED'}")
