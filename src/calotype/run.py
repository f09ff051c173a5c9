"""A request on its way through an engine: what it took of the engine when it was made, its job, and its times."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from calotype.description import Description
from calotype.errors import UsageError
from calotype.generate import Asking, Job
from calotype.latents import Vae, decode
from calotype.lora import LoRA, Stack
from calotype.nn.call import Call
from calotype.parts import Parts
from calotype.prepare import prepare
from calotype.resolve import Resolved
from calotype.result import Result, Step


@dataclass(eq=False)
class Run:
    """One request: `begin` it, `answer` its call until there is none, then `develop` it until it has a result; all in
    inference mode.

    The parts, the mix and the description are those of the moment when it was made.
    """

    parts: Parts
    vae: Vae  # that decodes its pictures
    resolved: Resolved
    notes: list[str]
    mix: Mapping[str, float]
    loras: Mapping[str, LoRA]  # those of the mix: a name may be another's later
    described: Description
    seconds: dict[str, float] = field(default_factory=lambda: {"prepare": 0.0, "denoise": 0.0, "decode": 0.0})
    job: Job = field(init=False)
    call: Call | None = field(init=False, default=None)  # of the network, that it waits for
    drawn: bool = field(init=False, default=False)  # it has had all its steps
    _asking: Asking = field(init=False)
    _last: Step = field(init=False)
    _decoding: Iterator[Image.Image] = field(init=False)
    _images: list[Image.Image] = field(init=False, default_factory=list)

    def merge(self, stack: Stack, mix: Mapping[str, float] | None = None) -> None:
        """Lends the weights to its own mix, or to another. Raises UsageError where what it needs was taken away."""
        gone = [name for name, lora in self.loras.items() if stack.loras.get(name) is not lora]
        if gone or stack.motion is not self.parts.motion:
            raise UsageError(
                f"{f'the LoRA {gone[0]!r}' if gone else 'the motion adapter'} was taken away while a request was drawn",
                "let its stream end first",
            )
        stack.lend(self.mix if mix is None else mix)

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
        self._last = Step(said.index, said.t, said.x, said.x0, len(self.job.grid), self.parts.tiny_vae or self.vae)
        following = next(self._asking, None)
        self.call = following if isinstance(following, Call) else None
        if self.call is None:
            self.drawn = True
            self._decoding = decode(self.vae, self._last.x0, note=self.notes.append)
        return self._last

    def develop(self) -> Result | None:
        """Decodes one picture more of the last step; what was not to be painted comes back as it was. With the last
        picture there is the result.
        """
        clock, finish, done = time.perf_counter(), self.job.finish, len(self._images)
        image = next(self._decoding)
        self._images.append(image if finish is None else finish(done, image))
        self.seconds["decode"] += time.perf_counter() - clock
        if done + 1 < len(self._last.x0):
            return None
        timings = {**self.seconds, "total": sum(self.seconds.values()), "evaluations": self.job.evaluations}
        seeds, request = list(self.resolved.seeds), self.resolved.request
        return Result(self._images, seeds, request, timings, self.described, tuple(self.notes))
