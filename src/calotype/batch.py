"""Many requests of one engine at once: in each round, one call of the network answers all that fit together.

A picture depends on how many rows share a call with it (about 1e-6 in float32), never on whose they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from calotype.lora import Stack
from calotype.lora.names import NETWORKS
from calotype.nn.call import Call
from calotype.request import Request
from calotype.result import Result, Step
from calotype.run import Run

UNET, *TEXT = NETWORKS

Made = Step | Result | Exception  # the last is why a request ended without a result


class Batch:
    """Requests that are drawn together: `engine.batch()` makes one. Each comes out as it would alone, to 1/255.

        batch = engine.batch()
        numbers = [batch.add(Request(prompt)) for prompt in ("a fox", "a dog")]
        for number, made in batch:  # Step, Step, ... and at last the Result of each
            if isinstance(made, Result):
                made.save(f"{number}.png")

    Requests may be added and cancelled at any time between two things that are made; they may differ in all they ask.
    Those of one size, number of text chunks and kind of controls share calls. For one thread.
    """

    def __init__(self, take: Callable[[Request], Run], stack: Stack, most_rows: int) -> None:
        self._take, self._stack, self._most_rows = take, stack, most_rows
        self._running: dict[int, Run] = {}
        self._added = 0
        self._made: list[tuple[int, Made]] = []  # and not said yet
        self._cancelled: set[int] = set()  # since the last round

    def __len__(self) -> int:
        """How many requests have not ended."""
        return len(self._running)

    def add(self, request: Request) -> int:
        """Takes a request in, with the adapters that the engine has now; returns its number. Raises UsageError."""
        self._running[self._added] = self._take(request)
        self._added += 1
        return self._added - 1

    def cancel(self, number: int) -> None:
        """Takes a request out: nothing more of it is made. One that has ended already stays so."""
        self._cancelled.add(number)
        self._running.pop(number, None)

    def __iter__(self) -> Iterator[tuple[int, Made]]:
        """What is made, with the number of its request, until all have ended."""
        try:
            while self._running:
                yield from ((number, made) for number, made in self.round() if number not in self._cancelled)
        finally:
            self._stack.restore()

    @torch.inference_mode()
    def round(self) -> list[tuple[int, Made]]:
        """Answers one call of each request, decodes one picture of one that has had all its steps, and returns what
        that made. An error of the network itself is raised, and leaves the requests of that call where they were: the
        next round tries it again, and says what was made until then.
        """
        self._cancelled.clear()
        drawing = {number: run for number, run in self._running.items() if not run.drawn}
        mixes = [run.mix for run in drawing.values()]
        apart = any(mix != mixes[0] for mix in mixes)  # then no weight is written: each row has its LoRAs live
        for number, run in drawing.items():
            with self._ended_by_errors(number):
                run.merge(self._stack, {} if apart else None)
                if run.call is None:
                    with self._stack.live(run.mix, only=TEXT) if apart else nullcontext():
                        run.begin()
        for group in self._groups(apart):
            clock = time.perf_counter()
            output = self._output([run for _, run in group], apart)
            seconds = time.perf_counter() - clock
            for (number, run), rows in zip(group, torch.split(output, [_rows(run) for _, run in group]), strict=True):
                with self._ended_by_errors(number):
                    run.seconds["denoise"] += seconds
                    if (step := run.answer(rows)) is not None:
                        self._made.append((number, step))
        for number, run in [(number, run) for number, run in self._running.items() if run.drawn][:1]:
            with self._ended_by_errors(number):
                if (result := run.develop()) is not None:
                    self._made.append((number, result))
                    del self._running[number]
        if not self._running:
            self._stack.restore()
        made, self._made = self._made, []
        return made

    @contextmanager
    def _ended_by_errors(self, number: int) -> Iterator[None]:
        """An error of one request ends that one alone."""
        try:
            yield
        except Exception as error:
            self._made.append((number, error))
            del self._running[number]

    def _groups(self, apart: bool) -> Iterator[list[tuple[int, Run]]]:
        """The requests whose calls can be one, in pieces of at most so many rows, or of a single request."""
        alike: dict[Hashable, list[tuple[int, Run]]] = {}
        for number, run in self._running.items():
            if run.call is None:
                continue
            # Motion modules mix all rows, so a LoRA on them has one scale in a call.
            moving = tuple(sorted((name, scale) for name, scale in run.mix.items() if run.loras[name].motion))
            alike.setdefault((run.call.layout, moving if apart else ()), []).append((number, run))
        for members in alike.values():
            piece: list[tuple[int, Run]] = []
            for member in members:
                if piece and sum(_rows(run) for _, run in piece) + _rows(member[1]) > self._most_rows:
                    yield piece
                    piece = []
                piece.append(member)
            yield piece

    def _output(self, runs: Sequence[Run], apart: bool) -> Tensor:
        """The network's output for the calls of some requests, in one."""
        unet, call = runs[0].parts.unet, Call.cat([run.call for run in runs if run.call is not None])
        if not apart:
            return call.answered_by(unet)
        names = {name for run in runs for name in run.mix}
        mix = {
            name: torch.tensor([run.mix.get(name, 0.0) for run in runs for _ in range(_rows(run))]) for name in names
        }
        with self._stack.live(mix, only=(UNET,)):
            return call.answered_by(unet)


def _rows(run: Run) -> int:
    """How many rows a request's call has."""
    return 0 if run.call is None else len(run.call.x)
