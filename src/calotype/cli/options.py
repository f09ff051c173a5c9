"""A command's options, made of dataclass fields that say what they are (`calotype.rules`), and given as one mapping."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer

from calotype.cli import parse
from calotype.rules import Flag, Number, Positive, Whole, about


def argument(name: str, kind: type, help: str) -> Parameter:
    """One that is given by its place."""
    return _parameter(name, kind | None, typer.Argument(help=help, show_default=False), None)


def option(
    name: str, kind: Any, help: str, *flags: str, default: Any = None, panel: str | None = None, **more: Any
) -> Parameter:
    """One with a name. `more` are those of typer.Option."""
    annotation = kind | None if default is None else kind
    return _parameter(name, annotation, typer.Option(*flags, help=help, rich_help_panel=panel, **more), default)


def switch(name: str, help: str, *flags: str, default: bool | None = False, panel: str | None = None) -> Parameter:
    """One without a value."""
    return option(name, bool, help, *(flags or (f"--{name.replace('_', '-')}",)), default=default, panel=panel)


def of(
    declared: type, name: str, *flags: str, kind: Any = None, default: Any = MISSING, panel: str | None = None
) -> Parameter:
    """That of a dataclass's field: its help, metavar, type and default, unless another type or default is given.

    A field that is text here is to be parsed by the command.
    """
    field = next(each for each in fields(declared) if each.name == name)
    what, rule = about(field), about(field).rule
    default = field.default if default is MISSING else default
    if isinstance(rule, Flag):
        return switch(name, what.help, *flags, default=default, panel=panel)
    kind = _kind(field) if kind is None else kind
    more: dict[str, Any] = {"parser": {int: parse.whole, float: parse.number}.get(kind)}
    return option(name, kind, what.help, *flags, default=default, panel=panel, metavar=what.metavar, **more)


def _kind(field: Field[Any]) -> type:
    rule = about(field).rule
    if isinstance(rule, Whole):
        return int
    return float if isinstance(rule, Number | Positive) else str


def _parameter(name: str, kind: Any, info: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def taking(parameters: Iterable[Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function that takes what was given by name: all of it, as one mapping."""
    found = list(parameters)

    def made(command: Callable[..., None]) -> Callable[..., None]:
        command.__signature__ = Signature(found)  # type: ignore[attr-defined]  # what typer reads
        command.__annotations__ = {each.name: each.annotation for each in found}
        return command

    return made


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: None is an option left out, while 0 and "" are values."""
    return {name: value for name, value in options.items() if value is not None}
