"""How few-step models and adapters like to be used: by what they say of themselves, or by what they are called.

A file in habits.json is known by its Hub id or its published name, wherever it lies; a renamed one is not. Their shapes
do not tell: LCM's, TCD's, PCM's and Hyper-SD's LoRAs change the same layers, and each is sampled in its own way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields as fields_of
from functools import cache
from pathlib import Path
from typing import Any, Literal

from calotype.parts import Habit
from calotype.samplers import SAMPLERS
from calotype.weights.fields import Fields
from calotype.weights.files import metadata, parse_json
from calotype.weights.source import HUB_ID

Sort = Literal["model", "lora", "motion"]
SORTS: tuple[Sort, ...] = ("model", "lora", "motion")

HABIT = "calotype.habit"  # in the header of an adapter that calotype distilled
TABLE = Path(__file__).with_name("habits.json")
# Names that say nothing: the folder's counts.
NAMELESS = ("pytorch_lora_weights", "diffusion_pytorch_model", "adapter_model", "model")
# What other programs say a file is called, whatever it was renamed to.
SAID = ("modelspec.title", "ss_output_name")
# Ends of names that are about the file's format.
FORMAT = re.compile(r"(-(fp16|fp32|bf16|fp8|pruned|converted|comfyui|comfy|diffusers))+$")


def to_json(habit: Habit) -> str:
    """For the header of a file that calotype writes; `read_habit` gives it back."""
    return json.dumps({name: value for name, value in vars(habit).items() if value is not None and name != "title"})


def read_habit(path: Path) -> Habit | None:
    """What a file that calotype distilled says of itself in its header. Raises CheckpointError."""
    text = metadata(path).get(HABIT)
    if text is None:
        return None
    where = f"{path}: {HABIT}"
    fields = Fields(parse_json(text.encode(), where), where)
    return Habit(
        fields.one_of("sampler", "lcm", [*SAMPLERS]),
        fields.integer("steps", 4, 1, 1000),
        fields.number("guidance", 1.0, 0.0, 100.0),
        fields.integers("timesteps", (), 0, 99_999, (0, 1000)) or None,
    )


def habit_of(sort: Sort, ref: str | Path | None, path: Path) -> Habit | None:
    """The habit of what was loaded as a `sort`: `ref` is what the user called it, `path` its file or folder.

    Raises CheckpointError where the file's own header is broken.
    """
    if path.is_file() and (own := read_habit(path)) is not None:
        return own
    repos, files = set(_repositories(str(ref), path)), set(_names(path))
    for row in _table():
        if sort not in row["of"]:
            continue
        if repos & {repo.lower() for repo in row.get("hub", ())}:
            return _habit(row, None)
        for name in files:
            if "file" in row and (match := re.fullmatch(row["file"], name)):
                return _habit(row, match)
    return None


def _habit(row: Mapping[str, Any], match: re.Match[str] | None) -> Habit:
    values = {field.name: row[field.name] for field in fields_of(Habit) if field.name in row}
    if "timesteps" in values:
        values["timesteps"] = tuple(values["timesteps"])
    if match is not None and "steps" in match.groupdict():
        values["steps"] = int(match["steps"])
    return Habit(**values)


def _repositories(ref: str, path: Path) -> Iterator[str]:
    """The Hub ids, in lower case, that a model may have: the one it was asked for by, the one whose cache it lies in,
    and its folder's name, as a clone of the repository has it.
    """
    if (match := HUB_ID.fullmatch(ref)) is not None:
        yield match["repo"].lower()
    for part in path.parts:
        if part.startswith("models--"):
            yield part.removeprefix("models--").replace("--", "/").lower()
    if path.is_dir() or path.name.partition(".")[0] in NAMELESS:
        folders = {folder.name.lower() for folder in (path, path.parent)}  # the latter of a part, or of a file
        for row in _table():
            yield from (repo.lower() for repo in row.get("hub", ()) if repo.split("/")[-1].lower() in folders)


def _names(path: Path) -> Iterator[str]:
    """What a file is called, and what its header says it was called, as the table has names."""
    if path.is_file():
        said = metadata(path)
        yield from (_plain(name) for name in (path.stem, *(said[key] for key in SAID if key in said)))


def _plain(name: str) -> str:
    return FORMAT.sub("", re.sub(r"[\s_.-]+", "-", name.lower()))


@cache
def _table() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(TABLE.read_text("utf-8"))
    return rows
