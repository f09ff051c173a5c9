"""A request on its way through an engine: what it took of the engine when it was made, its job, and its times."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from calotype.generate import Asking, Job
from calotype.latents import decode
from calotype.lora import LoRA
from calotype.nn.call import Call
from calotype.parts import Parts
from calotype.prepare import prepare
from calotype.resolve import Resolved
from calotype.result import Result, Step


@dataclass(eq=False)
class Run:
    """One request: `begin` it, `answer` its call until there is none, and take its `result`; in inference mode.

    The parts, the mix and the description are those of the moment when it was made.
    """

    parts: Parts
    resolved: Resolved
    notes: list[str]
    mix: Mapping[str, float]
    loras: Mapping[str, LoRA]  # those of the mix: a name may be another's later
    model: dict[str, Any]  # Engine.describe
    seconds: dict[str, float] = field(default_factory=lambda: {"prepare": 0.0, "denoise": 0.0, "decode": 0.0})
    job: Job = field(init=False)
    call: Call | None = field(init=False, default=None)  # of the network, that it waits for
    _asking: Asking = field(init=False)
    _last: Step = field(init=False)

    def begin(self) -> None:
        """Encodes and draws; then there is a call."""
        clock = time.perf_counter()
        self.job = prepare(self.parts, self.resolved, note=self.notes.append)
        self._asking = self.job.run()
        first = next(self._asking)
        self.call = first if isinstance(first, Call) else None
        self.seconds["prepare"] += time.perf_counter() - clock

    def answer(self, output: Tensor) -> Step | None:
        """Takes the network's output for the call; returns the step, where that was the last call of one."""
        said = self._asking.send(output)
        if isinstance(said, Call):
            self.call = said
            return None
        self._last = Step(said.index, said.t, said.x, said.x0, len(self.job.grid), self.parts.vae)
        following = next(self._asking, None)
        self.call = following if isinstance(following, Call) else None
        return self._last

    def result(self) -> Result:
        """The pictures of the last step; what was not to be painted comes back as it was."""
        clock = time.perf_counter()
        images = list(decode(self.parts.vae, self._last.x0, note=self.notes.append))
        if self.job.finish is not None:
            images = [self.job.finish(i, image) for i, image in enumerate(images)]
        self.seconds["decode"] = time.perf_counter() - clock
        timings = {**self.seconds, "total": sum(self.seconds.values()), "evaluations": self.job.evaluations}
        return Result(images, list(self.resolved.seeds), self.resolved.request, timings, self.model, tuple(self.notes))
