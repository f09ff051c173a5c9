"""The exceptions that calotype raises on purpose.

CalotypeError              exit 1   any failure that we can explain
├── UsageError             exit 2   a request or an option that cannot be carried out (also a ValueError)
├── ModelNotFoundError     exit 3   no such model: folder, file, Hub id or cache entry
├── CheckpointError        exit 1   a model whose files are corrupt, hostile or of another family
│   └── UnsafeFileError    exit 1   a file format that can run code when it is read
└── OutputError            exit 1   the result cannot be written

The command line exits with 130 on Ctrl-C and 143 on SIGTERM: 128 and the signal's number.

CalotypeWarning is for what goes on but may surprise, such as a guidance scale outside the trained range.
"""

from __future__ import annotations


class CalotypeError(Exception):
    """An error that a user can act on: one line naming the value and what is allowed, and a hint at the remedy."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} (hint: {self.hint})"


class UsageError(CalotypeError, ValueError):
    """A request or an option that cannot be carried out as it stands.

    field: the field of the request that is to blame: "steps", or "controls.0.scale" of the first control. None where it
    is none of them, or not one alone.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None, *, field: str | None = None) -> None:
        super().__init__(message, hint)
        self.field = field


class ModelNotFoundError(CalotypeError):
    """No model under that name: not a folder, not a file, not on the Hub or in its cache."""

    exit_code = 3


class CheckpointError(CalotypeError):
    """Model files that are corrupt, incomplete, hostile or of another family."""


class UnsafeFileError(CheckpointError):
    """A file whose format can run code when it is read (pickle)."""


class OutputError(CalotypeError):
    """The result cannot be written where it was asked for."""


def missing_package(package: str, extra: str) -> str:
    """The hint where a package of an extra is missing; both commands work whether calotype is on an index or not."""
    return f"pip install {package}, or in calotype's folder: pip install '.[{extra}]'"


class CalotypeWarning(UserWarning):
    """Something that goes on, but that the user should know."""
