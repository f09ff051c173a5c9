"""calotype show: the request that a picture carries in its metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from calotype.cli.report import printable
from calotype.errors import UsageError


def show(
    file: Annotated[Path, typer.Argument(help="What calotype generate wrote.", metavar="FILE", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the metadata as one JSON object.")] = False,
) -> None:
    """Show the request that made a picture.

    `calotype generate --like FILE` makes the picture again.
    """
    metadata = recorded(file)
    if as_json:
        print(json.dumps(metadata))
        return
    for name, value in rows(metadata):
        print(f"{name + ':':<18}{printable(str(value))}")


def recorded(path: Path) -> dict[str, Any]:
    """The metadata of a picture that calotype wrote, with "request" and "model" as dicts and "index" within the batch.

    Raises UsageError for any other picture, and for metadata that somebody has broken.
    """
    from calotype import stills, video

    read = video.read_metadata if path.is_file() and video.is_clip(path) else stills.read_metadata
    metadata = read(path)
    if not _is_sound(metadata.get("request"), metadata.get("index"), metadata.get("model")):
        raise UsageError(f"the calotype metadata of {str(path)!r} is damaged")
    return metadata


def _is_sound(request: object, index: object, model: object) -> bool:
    if not (isinstance(request, dict) and isinstance(index, int) and isinstance(model, dict)):
        return False
    n = request.get("n", 1)
    return isinstance(n, int) and 0 <= index < n


def rows(metadata: dict[str, Any]) -> list[tuple[str, Any]]:
    """(name, value) of all that was set: the request first, then which picture of it, the model and the version."""
    request = metadata["request"]
    picture = {"picture": f"{metadata['index'] + 1} of {request.get('n', 1)}"}
    model = {"control models" if name == "controls" else name: value for name, value in metadata["model"].items()}
    facts = {**request, **picture, **model, "calotype": metadata.get("calotype")}
    return [(name, value) for name, value in facts.items() if value is not None and value != ""]
