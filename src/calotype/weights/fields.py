"""A config.json whose every field is read with a type, a range and a place to blame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from calotype.errors import CheckpointError
from calotype.rules import Choice, Flag, Number, Rule, Whole, shown

T = TypeVar("T")


class Fields:
    """The fields of one config. Each getter raises a CheckpointError naming the field, its value and what is allowed.

    A field that is absent takes its default; one that is null does too, as `None` is how diffusers writes "not used".
    """

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def refuse(self, name: str, allowed: str) -> CheckpointError:
        """The error for a field's value."""
        return CheckpointError(f"{self.where}: {name} is {shown(self.raw.get(name))}; {allowed}")

    def given(self, name: str) -> bool:
        return self.raw.get(name) is not None

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        return self._read(name, default, Whole(low, high), f"an integer from {low} to {high} is needed")

    def number(self, name: str, default: float, low: float, high: float) -> float:
        return self._read(name, default, Number(low, high), f"a number from {low:g} to {high:g} is needed")

    def flag(self, name: str, default: bool) -> bool:
        return self._read(name, default, Flag(), "true or false is needed")

    def one_of(self, name: str, default: str, allowed: Sequence[str]) -> str:
        return self._read(name, default, Choice(allowed), f"allowed are {', '.join(allowed)}")

    def _read(self, name: str, default: T, rule: Rule[T], allowed: str) -> T:
        value = rule.plain(self.raw[name] if self.given(name) else default)
        if value is None:
            raise self.refuse(name, allowed)
        return value

    def items(self, name: str, default: Sequence[Any], low: int, high: int) -> tuple[Any, ...]:
        """A list of `low` to `high` entries of any kind."""
        value = self.raw[name] if self.given(name) else default
        if not isinstance(value, (list, tuple)) or not low <= len(value) <= high:
            length = str(low) if low == high else f"{low} to {high}"
            raise self.refuse(name, f"a list of {length} entries is needed")
        return tuple(value)

    def integers(
        self, name: str, default: Sequence[int], low: int, high: int, lengths: tuple[int, int]
    ) -> tuple[int, ...]:
        """A list of integers, each from `low` to `high`."""
        values = self.items(name, default, *lengths)
        if any(Whole(low, high).plain(value) is None for value in values):
            raise self.refuse(name, f"integers from {low} to {high} are needed")
        return values

    def names(self, name: str, default: Sequence[str], allowed: Sequence[str], count: int) -> tuple[str, ...]:
        """A list of `count` names out of `allowed`."""
        values = self.items(name, default, count, count)
        if any(Choice(allowed).plain(value) is None for value in values):
            raise self.refuse(name, f"allowed are {', '.join(allowed)}")
        return values

    def each_level(self, name: str, default: int, low: int, high: int, levels: int) -> tuple[int, ...]:
        """One integer for every level, or a list with one for each."""
        if self.given(name) and isinstance(self.raw[name], (list, tuple)):
            return self.integers(name, (), low, high, (levels, levels))
        return (self.integer(name, default, low, high),) * levels

    def only(self, name: str, *allowed: object) -> None:
        """A field that changes the network in ways that are not built: its value must be one of these, or be absent."""
        value = self.raw.get(name)
        if name in self.raw and not any(value == choice and type(value) is type(choice) for choice in allowed):
            choices = " or ".join("null" if choice is None else shown(choice) for choice in allowed)
            raise self.refuse(name, f"only {choices} is supported")
