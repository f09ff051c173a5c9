"""What programs that train put before the names of a network's tensors, and how it comes off again."""

from __future__ import annotations

import re
from collections.abc import Iterable

from calotype.weights.names import BOOKKEEPING

# torch.compile, FSDP and activation checkpointing call a module by these, wherever it lies; no network does.
COMPILERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
INNER = re.compile(rf"(?<![^.])(?:{'|'.join(COMPILERS)})\.")
# Distributed training, savers and trainers put these before all: a model's own "model.diffusion_model." stays.
OUTER = re.compile(r"module\.|state_dict\.|model\.(?!diffusion_model\.)")


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names without what stands before all of them -> the names as they are.

    Only what all weights share comes off, since what some share may tell networks apart.
    """
    found = without_inner(names)
    while outer := _around(found):
        found = {name.removeprefix(outer): theirs for name, theirs in found.items()}
    return found


def without_inner(names: Iterable[str]) -> dict[str, str]:
    """Names without what stands within them -> the names as they are; all as they are where two would be the same."""
    names = [*names]
    found = {INNER.sub("", name): name for name in names}
    return found if len(found) == len(names) else {name: name for name in names}


def _around(names: Iterable[str]) -> str | None:
    weights = [name for name in names if not BOOKKEEPING.fullmatch(name)]
    match = OUTER.match(weights[0]) if weights else None
    return match[0] if match and all(OUTER.match(name) and name.startswith(match[0]) for name in weights) else None
