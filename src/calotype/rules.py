"""What a value must be, and dataclasses whose fields say it themselves.

A field is declared with a line of help and a rule. From these come its check (`settle`), its line in the class's help
(`listed`) and its option of a command (`calotype.cli.options`).
"""

from __future__ import annotations

import difflib
import math
import operator
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from numbers import Real
from typing import Any, Generic, TypeVar, cast

from calotype.errors import UsageError

T = TypeVar("T")
MAX_TEXT = 20_000  # characters


class Rule(ABC, Generic[T]):
    """What a value must be: `str` says it, and a call with a name and a value returns the value as a plain type."""

    advice: str | None = None  # the hint at the remedy

    @abstractmethod
    def plain(self, value: object) -> T | None:
        """The value, of the plain type whatever library it is from; None where it is not allowed."""

    def hint(self, value: object) -> str | None:
        return self.advice

    def __call__(self, name: str, value: object) -> T:
        """Raises UsageError, naming the value and what is allowed."""
        plain = self.plain(value)
        if plain is None:
            raise UsageError(f"{name} is {shown(value)}: must be {self}", self.hint(value))
        return plain


@dataclass(frozen=True)
class Whole(Rule[int]):
    """A whole number from `low` to `high` that `step` divides. Bools and 4.0 are none."""

    low: int
    high: float = math.inf
    step: int = 1
    advice: str | None = None

    def plain(self, value: object) -> int | None:
        number = _index(value)
        return None if number is None or number % self.step or not self.low <= number <= self.high else number

    def hint(self, value: object) -> str | None:
        number = _index(value)
        if self.step == 1 or number is None:
            return self.advice
        near = (number + self.step // 2) // self.step * self.step
        return f"{min(max(near, self.low), self.high)} is the nearest"

    def __str__(self) -> str:
        kind = "whole number" if self.step == 1 else f"multiple of {self.step}"
        return f"a {kind} {_range(self.low, self.high)}"


@dataclass(frozen=True)
class Number(Rule[float]):
    """A number from `low` to `high`."""

    low: float
    high: float = math.inf
    advice: str | None = None

    def plain(self, value: object) -> float | None:
        # Compared before it is converted: float() of a huge whole number overflows. NaN compares false.
        if isinstance(value, bool) or not isinstance(value, Real) or not self.low <= cast(float, value) <= self.high:
            return None
        return float(value)

    def __str__(self) -> str:
        return f"a number {_range(self.low, self.high)}"


class Positive(Rule[float]):
    """A finite number above 0."""

    def plain(self, value: object) -> float | None:
        number = Number(0).plain(value)
        return number if number is not None and 0 < number < math.inf else None

    def __str__(self) -> str:
        return "a positive number"


@dataclass(frozen=True)
class Choice(Rule[str]):
    """One of a few words."""

    allowed: Collection[str]

    def plain(self, value: object) -> str | None:
        return value if isinstance(value, str) and value in self.allowed else None

    def hint(self, value: object) -> str | None:
        return nearest(value, self.allowed)

    def __str__(self) -> str:
        return f"one of {', '.join(self.allowed)}"


class Flag(Rule[bool]):
    """True or false, and nothing that passes for it."""

    def plain(self, value: object) -> bool | None:
        return value if isinstance(value, bool) else None

    def __str__(self) -> str:
        return "true or false"


class Text:
    """Valid Unicode of at most MAX_TEXT characters; the empty text is one. It tells its faults apart."""

    def __call__(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise UsageError(f"{name} is of type {type(value).__name__}: must be text")
        if len(value) > MAX_TEXT:
            raise UsageError(f"{name} has {len(value)} characters: must be at most {MAX_TEXT}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{name} has a lone surrogate at character {error.start}: must be valid Unicode",
                "half of a character that was cut or decoded wrongly",
            ) from None
        return str(value)

    def __str__(self) -> str:
        return f"text of at most {MAX_TEXT} characters"


def _range(low: float, high: float) -> str:
    """Whole numbers with all their digits: a seed has many."""
    least, most = (each if isinstance(each, int) else f"{each:g}" for each in (low, high))
    return f"of at least {least}" if high == math.inf else f"between {least} and {most}"


def _index(value: object) -> int | None:
    """A whole number of any library as an int; None for anything else, bools and 4.0 included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def nearest(name: object, known: Collection[str]) -> str | None:
    """The hint for a misspelt name."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) if isinstance(name, str) and len(name) < 100 else []
    return f"did you mean {near[0]}?" if near else None


_SHORT = reprlib.Repr()  # bounded in depth as well: a plain repr of nested lists may exhaust the stack
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: object) -> str:
    """A value for a message: one printable line of bounded length, whatever it is."""
    try:
        return _SHORT.repr(value)[:160]
    except ValueError:  # Python does not print whole numbers of more than 4300 digits
        return "a number of thousands of digits"


# ---- dataclasses whose fields say what they are ----


@dataclass(frozen=True)
class About:
    """What a field is."""

    help: str  # also of its option
    rule: Callable[[str, Any], Any]  # from its name and a value to the value that is kept; raises UsageError
    metavar: str | None = None  # what stands for its value in the command's help
    more: str | None = None  # to be known by callers besides; what the rule says if None


def about(field: Field[Any]) -> About:
    return cast(About, field.metadata["about"])


def described(
    help: str, rule: Callable[[str, Any], Any], metavar: str | None = None, more: str | None = None
) -> dict[str, About]:
    """The metadata of such a field: `field(metadata=described(...))`."""
    return {"about": About(help, rule, metavar, more)}


def option(
    default: T, help: str, rule: Callable[[str, Any], Any], metavar: str | None = None, more: str | None = None
) -> T:
    """Such a field with a default."""
    found: T = field(default=default, metadata=described(help, rule, metavar, more))
    return found


def listed(kind: type[T]) -> type[T]:
    """Adds the fields to the docstring of a dataclass, one a line."""
    lines, width = [kind.__doc__ or ""], max(len(each.name) for each in fields(cast(Any, kind)))
    for each in fields(cast(Any, kind)):
        what = about(each)
        more = f"{what.rule}.".capitalize() if what.more is None else what.more
        lines.append(f"    {each.name:<{width}} {what.help} {more}".rstrip())
    kind.__doc__ = "\n".join(lines)
    return kind


def settle(made: object, kind: type, prefix: str = "") -> None:
    """Puts the fields that `kind` declares to their rules, and keeps what those return, of the plain type.

    None stays where it is the default. The message names a field with `prefix`. Raises UsageError.
    """
    for each in fields(kind):
        value = getattr(made, each.name)
        if value is None and each.default is None:
            continue
        with blaming(each.name):
            object.__setattr__(made, each.name, about(each).rule(prefix + each.name, value))


@contextmanager
def blaming(field: str) -> Iterator[None]:
    """A UsageError within is about this field, or about the part of it that the error names."""
    try:
        yield
    except UsageError as error:
        error.field = field if error.field is None else f"{field}.{error.field}"
        raise
