"""A cell in both programs, and how far apart they end."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from reference import distance
from torch import Tensor

from calotype.optimize import STEPS
from matrix.cells import Cell
from matrix.ours import Ours
from matrix.theirs import Theirs
from matrix.world import World

CPU, FLOAT = torch.device("cpu"), torch.float32


class Matrix:
    """Both programs over one world. What diffusers gave is kept."""

    def __init__(self, world: World) -> None:
        self.world = world
        theirs = Theirs(self.world)
        self.theirs = cache(theirs)
        self.ours = Ours(self.world, theirs.grid)
        self.optimized = Ours(self.world, theirs.grid, [name for name in STEPS if STEPS[name].fits(CPU, FLOAT) is None])

    def error(self, cell: Cell) -> float:
        """Relative L2 between the final latents; of what was painted and what was kept, the worse."""
        return self.between(cell, self.ours(cell), self.theirs(cell))

    def between(self, cell: Cell, ours: Tensor, theirs: Tensor) -> float:
        """The same, for latents that are there already."""
        if not cell.task.startswith("inpaint 4"):
            return distance(ours, theirs)
        return max(distance(ours[..., where], theirs[..., where]) for where in (self.painted, ~self.painted))

    @property
    def painted(self) -> Tensor:
        """The mask on the latents (h, w)."""
        mask = torch.from_numpy(np.asarray(self.world.mask) >= 128).float()
        return F.interpolate(mask[None, None], scale_factor=1 / 8)[0, 0] > 0.5
