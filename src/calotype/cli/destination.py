"""Where pictures go: names for them, and whether they can be written, asked before anybody waits for a model."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from calotype.errors import OutputError, UsageError

SLUG_LENGTH = 48  # characters; at four bytes each, with a seed, still a legal file name (255 bytes)


def check(output: Path | None, count: int, clip: bool = False) -> None:
    """Raises UsageError or OutputError if `count` pictures, or clips, cannot be written to `output` (None: here)."""
    if output is None:
        _check_folder(Path())
        return
    if output.is_dir():
        raise OutputError(f"{str(output)!r} is a folder", hint=f"name a file in it: -o {output / 'picture.png'}")
    if clip:
        from calotype.video import SUFFIXES
    else:
        from calotype.stills import SUFFIXES
    allowed = list(SUFFIXES)
    if output.suffix.lower() not in allowed:
        message = f"the output must end in {' or '.join(allowed)}, not {output.name!r}"
        raise UsageError(message, hint=f"for example -o picture{allowed[0]}")
    _check_folder(output.parent)
    for path in numbered(output, count):
        if path.exists() and not path.is_file():
            raise OutputError(f"{str(path)!r} exists and is not a file", hint="choose another name")


def numbered(output: Path, count: int) -> list[Path]:
    """The names of `count` pictures: picture.png for one, picture-1.png, picture-2.png ... for more."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(1, count + 1)]


def unused(prompt: str, seeds: list[int], suffix: str = ".png") -> list[Path]:
    """A name for each picture from its prompt and seed, in the current folder, none of which exists already."""
    paths: list[Path] = []
    for seed in seeds:
        name = f"{slug(prompt)}-{seed}"
        path, i = Path(f"{name}{suffix}"), 1
        while path in paths or path.exists() or path.is_symlink():
            i += 1
            path = Path(f"{name}-{i}{suffix}")
        paths.append(path)
    return paths


def slug(prompt: str) -> str:
    """The words of `prompt` as the stem of a file name: lower case, joined by hyphens, cut between words."""
    words = re.findall(r"[^\W_]+", prompt.lower())
    stem = words[0][:SLUG_LENGTH] if words else "picture"
    for word in words[1:]:
        if len(stem) + 1 + len(word) > SLUG_LENGTH:
            break
        stem += f"-{word}"
    return stem


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise OutputError(f"there is no folder {str(folder)!r}", hint=f"make it first: mkdir -p {folder}")
    try:  # the only test that holds for permissions, read-only and full disks alike: write something
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(
            f"cannot write in {str(folder.resolve())!r}: {reason}", hint="choose a place with -o"
        ) from error
