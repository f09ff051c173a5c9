"""calotype inspect: what a checkpoint is, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from calotype.cli.report import printable


def inspect(
    model: Annotated[
        str, typer.Argument(help="A model folder, one part of it, a .safetensors file or a Hub id.", show_default=False)
    ] = "icons",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="A branch, a tag or a commit on the Hub.", show_default=False)
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use the local cache only.")] = False,
) -> None:
    """Say what a checkpoint is and what is wrong with it.

    Exits with 1 where problems were found.
    """
    from calotype.weights.inspect import inspect_model

    report = inspect_model(model, revision=revision, offline=offline)
    if as_json:
        print(json.dumps(report))
    else:
        for line in lines(report):
            print(printable(line))
    if report["problems"]:
        raise typer.Exit(1)


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for people: facts, then the parts, then the problems."""
    for name in ("source", "looks_like", "family", "pipeline"):
        if name in report:
            yield row(name.replace("_", " "), report[name])
    for name in ("scheduler", "defaults"):
        if name in report:
            facts = [f"{key} {value}" for key, value in report[name].items() if value is not None]
            yield row(name, ", ".join(facts))
    if "few_step" in report:
        title, *facts = [
            str(value) if key == "title" else f"{key} {value}" for key, value in report["few_step"].items()
        ]
        yield row("few step", f"{title}: {', '.join(facts)}")
    for name, part in report.get("parts", {}).items():
        if name not in report:  # the scheduler has a row already
            yield row(name, ", ".join(part_facts(part)))
    for name in ("not_used", "ignored"):
        if name in report:
            yield row(name.replace("_", " "), ", ".join(report[name][:20]))
    problems = report["problems"]
    yield row("problems", len(problems) if problems else "none")
    yield from (f"  - {problem}" for problem in problems)


def row(name: str, value: object) -> str:
    return f"{name + ':':<17} {value}"


def part_facts(part: dict[str, Any]) -> Iterator[str]:
    """One part in a few words."""
    if part.get("class") or part.get("kind"):
        yield str(part.get("class") or part["kind"])
    if "parameters" in part:
        yield f"{part['parameters']:,} parameters"
        yield "+".join(part["dtypes"])
        yield f"{sum(part['files'].values()):,} bytes in {len(part['files'])} files"
    if part.get("variants"):
        yield f"variants: {' '.join(part['variants'])}"
    if "tokens" in part:
        yield f"{part['tokens']:,} tokens, length {part['length']}"
