"""The samplers by name, and what is to be known of each without running it: `calotype.sampling` has the functions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One sampler."""

    title: str  # in other programs
    consistency: bool = False  # works on the grid that a model was distilled on; the others' timesteps have a spacing
    stochastic: bool = False  # takes fresh noise between steps


SAMPLERS = {
    "lcm": Kind("LCM", consistency=True, stochastic=True),
    "tcd": Kind("TCD", consistency=True, stochastic=True),
    "ddim": Kind("DDIM"),
    "euler": Kind("Euler"),
}
CONSISTENCY = tuple(name for name, kind in SAMPLERS.items() if kind.consistency)
