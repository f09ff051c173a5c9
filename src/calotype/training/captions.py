"""The files that captions come in: a text beside a picture, and lists for whole folders. No picture is looked for here.

Lists are those of Hugging Face's datasets (metadata.jsonl and metadata.csv of an "imagefolder") and of kohya's scripts
(metadata.json).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calotype.errors import UsageError

TEXTS = ("txt", "caption", "text")  # endings of captions, the best first; json comes after them
FIELDS = ("text", "caption", "prompt")  # what a caption is called in JSON and CSV; the first that is there counts
LISTS = ("metadata.jsonl", "metadata.csv", "metadata.json")  # what is read; where two name a picture, the first counts
DELIMITERS = ",;\t"  # of a CSV: whichever makes a column file_name

ROW = {
    "metadata.jsonl": 'each line looks like {"file_name": "a.png", "text": "a red apple"}',
    "metadata.csv": 'the first line is file_name,text and each that follows looks like a.png,"a red apple, cut"',
    "metadata.json": 'each entry looks like "a": {"caption": "a red apple", "tags": "fruit, red"}',
}
PROMPT = 'each line looks like {"text": "a red apple"}'


@dataclass(frozen=True)
class Entry:
    """What a list says of one picture."""

    where: str  # "FOLDER/metadata.csv line 3", for messages
    name: str  # the picture, as the list calls it
    captions: tuple[str, ...]  # at least one


def entries(path: Path) -> list[Entry]:
    """What a list of LISTS says. Raises UsageError for whatever is no caption, and for text that is not UTF-8."""
    read = {".jsonl": _of_jsonl, ".csv": _of_csv, ".json": _of_json}[path.suffix]
    return list(read(path))


def prompts(path: Path) -> Iterator[str]:
    """The captions in a .jsonl that names no pictures. Raises UsageError."""
    for number, row in _lines(path, PROMPT):
        if "file_name" in row:
            raise UsageError(
                f"{path} line {number} names a picture: as DATA, a .jsonl holds prompts alone",
                hint="give the folder of pictures, with this file in it as metadata.jsonl",
            )
        captions = captions_of(row)
        if not captions:
            raise _no_caption(f"{path} line {number}", row, PROMPT)
        yield from captions


def captions_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The caption of an object, or the list of them; empty where it has none."""
    for field in FIELDS:
        value = row.get(field)
        found = value if isinstance(value, list) else [value]
        texts = tuple(each.strip() for each in found if isinstance(each, str))
        if texts and len(texts) == len(found):
            return texts
    return ()


def sidecar(kind: str, data: bytes, where: str) -> tuple[str, ...]:
    """The captions in a file that belongs to one picture, by its ending; empty where a JSON has none.

    Raises UsageError.
    """
    text = decoded(data, where)
    if kind != "json":
        return (text,)
    row = _parsed(text, where, None)
    return captions_of(row) if isinstance(row, dict) else ()


def read_text(path: Path) -> str:
    """A text file's content, without a byte order mark and the space around it. Raises UsageError."""
    return decoded(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """A file's content. Raises UsageError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error


def decoded(data: bytes, where: str) -> str:
    """Text in UTF-8, stripped. UsageError for any other encoding: UTF-16 mostly is not UTF-8, else it has zeros."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not text in UTF-8: {error.reason}", hint="save it as UTF-8") from error
    if "\0" in text:
        raise UsageError(f"{where} is not text in UTF-8: it has zero bytes", hint="save it as UTF-8")
    return text.strip()


def _of_jsonl(path: Path) -> Iterator[Entry]:
    for number, row in _lines(path, ROW[path.name]):
        yield _entry(f"{path} line {number}", row.get("file_name"), captions_of(row), row, path)


def _of_csv(path: Path) -> Iterator[Entry]:
    number = 0
    try:
        for number, row in _csv_rows(path):
            yield _entry(f"{path} line {number}", row["file_name"], captions_of(row), row, path)
    except csv.Error as error:
        raise UsageError(f"{path} is not CSV, after line {max(number, 1)}: {error}", hint=ROW[path.name]) from error


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows by the names of their columns, and the numbers of their last lines."""
    text = read_text(path)
    if not text:
        return
    first = text.split("\n", 1)[0]
    delimiter = next((each for each in DELIMITERS if "file_name" in _columns(first, each)), ",")
    columns = _columns(first, delimiter)
    if "file_name" not in columns or not set(FIELDS) & set(columns):
        wanted = f"file_name and one of {', '.join(FIELDS)}"
        raise UsageError(f"{path} has the columns {', '.join(columns)[:80]}: must have {wanted}", hint=ROW[path.name])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    next(reader)
    for values in reader:
        if len(values) > len(columns):
            raise UsageError(
                f"{path} line {reader.line_num} has more than the {len(columns)} columns of the first line",
                hint="a caption with a comma goes in quotes",
            )
        if values:
            yield reader.line_num, dict(zip(columns, values + [None] * len(columns), strict=False))


def _columns(line: str, delimiter: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([line], delimiter=delimiter))]


def _of_json(path: Path) -> Iterator[Entry]:
    """kohya's list: {"picture": {"caption": ..., "tags": ...}}, where one may be missing; none in any other JSON.

    As there, tags follow the caption (sd-scripts, library/train_util.py, FineTuningDataset).
    """
    found = _parsed(read_text(path), str(path), ROW[path.name])
    rows = list(found.items()) if isinstance(found, dict) else []
    if not any(isinstance(row, dict) and row.keys() & {"caption", "tags"} for _, row in rows):
        return
    for name, row in rows:
        said = [row.get("caption"), row.get("tags")] if isinstance(row, dict) else []
        texts = [text.strip() for text in said if isinstance(text, str)]
        caption = (", ".join(text for text in texts if text),) if texts else ()
        yield _entry(f"{path} entry {name[:60]!r}", name, caption, row, path)


def _entry(where: str, name: object, captions: tuple[str, ...], row: object, path: Path) -> Entry:
    if not isinstance(name, str) or not name or not captions:
        raise _no_caption(where, row, ROW[path.name])
    return Entry(where, name, captions)


def _lines(path: Path, hint: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file and the numbers of their lines."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # not splitlines: JSON may hold U+2028
        if not line.strip():
            continue
        row = _parsed(line, f"{path} line {number}", hint)
        if not isinstance(row, dict):
            raise _no_caption(f"{path} line {number}", row, hint)
        yield number, row


def _parsed(text: str, where: str, hint: str | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not a caption: {error}", hint=hint) from error


def _no_caption(where: str, row: object, hint: str) -> UsageError:
    return UsageError(f"{where} is not a caption: {json.dumps(row)[:60]}", hint=hint)
