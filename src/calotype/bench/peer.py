"""The process of a peer: it loads a model, and draws a picture for each seed that it reads.

    python -m calotype.bench.peer NAME TASK [--prepare]

A line of JSON tells what a picture took, in seconds; the first one also what went before it.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calotype.bench.task import Task

if TYPE_CHECKING:
    from PIL.Image import Image

Draw = Callable[[int], "Image"]


class Clock:
    """Seconds of each stage, and how often it was entered."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.flops: int | None = None  # of a U-Net's call, where they are counted

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage].append(time.perf_counter() - start)

    def watch(self, stage: str, network: Any) -> None:
        """Each call of a torch module is a stage from now on."""
        begun = [0.0]
        network.register_forward_pre_hook(lambda *_: begun.__setitem__(0, time.perf_counter()))
        network.register_forward_hook(lambda *_: self.seconds[stage].append(time.perf_counter() - begun[0]))

    def taken(self) -> dict[str, list[float]]:
        """All that was measured since the last time."""
        found, self.seconds = dict(self.seconds), defaultdict(list)
        return found


def main() -> None:
    name, task = sys.argv[1], Task.from_json(sys.argv[2])
    peer = import_module(f"calotype.bench.peers.{name}")
    if "--prepare" in sys.argv:
        peer.prepare(task)
        return
    clock = Clock()
    draw: Draw = peer.load(task, clock)
    for i, line in enumerate(sys.stdin):
        with clock("picture"):
            picture = draw(int(line))
            picture.load()
        if i == 0:
            picture.save(Path(task.scratch, "picture.png"))
        print(json.dumps({"stages": clock.taken(), "flops": clock.flops}), flush=True)


if __name__ == "__main__":
    main()
