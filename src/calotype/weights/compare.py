"""A file's header against the network that it should fill: the one report of all that differs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calotype.errors import CheckpointError
from calotype.weights.detect import Shapes, looks_like, shapes_of
from calotype.weights.files import DTYPES, TensorInfo
from calotype.weights.names import Kind, canonical, may_squeeze


@dataclass(frozen=True)
class Comparison:
    """A file's tensors against a network's."""

    matched: dict[str, str]  # the file's name -> the network's
    missing: list[str]  # the network's names
    unexpected: list[str]  # the file's names
    misshaped: list[str]  # phrases

    @property
    def faults(self) -> list[str]:
        """One phrase for each sort of difference."""
        unexpected = [_with_nearest(name, self.missing) for name in self.unexpected[:5]] + self.unexpected[5:]
        lists = (("missing", self.missing), ("unexpected", unexpected), ("of another shape", self.misshaped))
        return [f"{len(names)} {what} ({_first(names)})" for what, names in lists if names]


def check(kind: Kind, infos: Mapping[str, TensorInfo], shapes: Shapes, folder: Path) -> dict[str, str]:
    """The file's names -> the network's, if they match one to one; else a CheckpointError with all that differs."""
    comparison = compare(kind, infos, shapes)
    if comparison.faults:
        raise CheckpointError(
            f"the weights in {folder} do not fit its config: of {len(shapes)} tensors {'; '.join(comparison.faults)}; "
            f"the file looks like {looks_like(shapes_of(infos))}",
            "the weights and config.json must come from the same model",
        )
    return comparison.matched


def compare(
    kind: Kind, infos: Mapping[str, TensorInfo], shapes: Shapes, names: Mapping[str, str] | None = None
) -> Comparison:
    """A file's header against a network's shapes, after old spellings were translated.

    `names` has the file's names -> ours where they are not only spelled differently.
    """
    matched: dict[str, str] = {}
    unexpected, misshaped = [], []
    taken: set[str] = set()
    for name, info in infos.items():
        if names is not None:
            ours: str | None = names.get(name, "")
        else:
            ours = canonical(kind, name, projection="text_projection.weight" in shapes)
        if ours is None:
            continue
        if ours not in shapes or ours in taken:
            unexpected.append(name)
            continue
        taken.add(ours)
        shape = info.shape
        if may_squeeze(kind, ours) and set(shape[2:]) == {1}:
            shape = shape[:2]
        if shape != shapes[ours]:
            misshaped.append(f"{name}: {list(info.shape)} in the file, {list(shapes[ours])} by the config")
        elif not DTYPES[info.dtype].is_floating_point:
            misshaped.append(f"{name}: {info.dtype} in the file, floating point needed")
        matched[name] = ours
    missing = [name for name in shapes if name not in taken]
    return Comparison(matched, missing, unexpected, misshaped)


def _with_nearest(name: str, missing: list[str]) -> str:
    """An unexpected name, with the missing one that it may be a misspelling of."""
    near = difflib.get_close_matches(name[:200], missing[:50], n=1, cutoff=0.8)
    return f"{name}, perhaps for {near[0]}" if near else name


def _first(names: Sequence[str], count: int = 5) -> str:
    listed = ", ".join(ascii(name)[1:-1][:120] for name in names[:count])
    return listed + (", ..." if len(names) > count else "")
