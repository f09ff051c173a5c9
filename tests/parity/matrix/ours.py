"""Our side: a cell as one Request to one engine, whatever the cell is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from PIL import Image
from torch import Tensor

import calotype
from matrix.cells import GUIDANCES, Cell
from matrix.theirs import ENDS, GAMMA, PROMPT, SCALES, SEED, STARTS, STEPS, naming_of
from matrix.world import FRAMES, HEIGHT, WIDTH, World


class Ours:
    """calotype, asked one cell at a time; `grid` gives the timesteps where diffusers cuts them."""

    def __init__(
        self, world: World, grid: Callable[[Cell], tuple[int, ...]], optimize: Sequence[str] | str = "none"
    ) -> None:
        self.world, self.grid, self.optimize = world, grid, optimize
        for name in ("engine", "moving", "control", "lora"):  # each is loaded once
            setattr(self, name, cache(getattr(self, name)))

    def __call__(self, cell: Cell, **changes: Any) -> Tensor:
        """Final latents (1, 4, h, w); of a clip (F, 4, h, w). `changes` are those to the cell's request."""
        *_, last = self.prepared(cell).stream(replace(self.request(cell), **changes))
        return last.x

    def prepared(self, cell: Cell) -> calotype.Engine:
        """The cell's model with all that the cell needs in it."""
        model = cell.family, cell.model, cell.channels
        engine = self.engine(*model)
        if cell.moves:
            self.moving(*model)
        for name in control_names(cell):
            self.control(*model, name)
        engine.set_loras({self.lora(*model, name, naming_of(name, cell)): scale for name, scale in cell.stack.items()})
        return engine

    def drawn(self, cell: Cell) -> tuple[Tensor, list[Image.Image]]:
        """Final latents and pictures."""
        stream = self.prepared(cell).stream(self.request(cell))
        while True:
            try:
                last = next(stream).x
            except StopIteration as end:
                return last, end.value.images

    def together(self, cells: Sequence[Cell]) -> list[tuple[Tensor, list[Image.Image]]]:
        """The same of an engine's cells, all of them in one batch."""
        engine = self.prepared(cells[0])
        batch = engine.batch(rows=64)
        for cell in cells:
            model = cell.family, cell.model, cell.channels
            mix = {self.lora(*model, name, naming_of(name, cell)): scale for name, scale in cell.stack.items()}
            batch.add(replace(self.request(cell), loras=mix))
        last: dict[int, Tensor] = {}
        pictures: dict[int, list[Image.Image]] = {}
        for number, made in batch:
            assert isinstance(made, calotype.Step | calotype.Result), made
            if isinstance(made, calotype.Step):
                last[number] = made.x
            else:
                pictures[number] = made.images
        return [(last[number], pictures[number]) for number in range(len(cells))]

    def engine(self, family: str, model: str, channels: int) -> calotype.Engine:
        folder = self.world.model(family, model, channels)
        return calotype.load(folder, device="cpu", dtype="float32", optimize=self.optimize)

    def moving(self, family: str, model: str, channels: int) -> None:
        self.engine(family, model, channels).set_motion(self.world.motion(family))

    def control(self, family: str, model: str, channels: int, name: str) -> str:
        kind, number = name.split()
        path = getattr(self.world, kind)(family, int(number))
        return self.engine(family, model, channels).add_control(path, name)

    def lora(self, family: str, model: str, channels: int, name: str, naming: str) -> str:
        engine = self.engine(family, model, channels)
        return engine.add_lora(self.world.lora(family, name, naming), f"{name}, {naming}")

    def request(self, cell: Cell) -> calotype.Request:
        guidance, negative = GUIDANCES[cell.guidance]
        source = self.world.pictures[:FRAMES] if cell.moves else self.world.pictures[0]
        several = len(cell.controls) > 1 and cell.adapter == "controls"
        return calotype.Request(
            PROMPT,
            negative_prompt=negative,
            steps=None if cell.cuts else STEPS,
            timesteps=self.grid(cell) if cell.cuts else None,
            guidance=guidance,
            seed=SEED,
            width=WIDTH,
            height=HEIGHT,
            sampler=cell.sampler,
            gamma=GAMMA,
            image=None if cell.strength is None else source,
            mask=self.world.mask if cell.task.startswith("inpaint") else None,
            strength=cell.strength,
            frames=FRAMES if cell.moves else None,
            controls=tuple(
                calotype.Control(name, hint, scale=scale, start=start if several else 0.0, end=end if several else 1.0)
                for name, hint, scale, start, end in zip(
                    control_names(cell), self.world.hints(cell), SCALES, STARTS, ENDS, strict=False
                )
            ),
        )


def control_names(cell: Cell) -> list[str]:
    """As the cell's engine has them: "control 1", "t2i 3"."""
    return [f"{'t2i' if cell.adapter.startswith('t2i') else 'control'} {number}" for number in cell.controls]
