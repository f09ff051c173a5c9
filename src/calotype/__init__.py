"""calotype: pictures in one to eight steps with latent consistency models.

    import calotype
    engine = calotype.load()
    engine("a fox", steps=4, seed=0).image.save("fox.png")

Importing this package does no work: a name is imported when it is first used (PEP 562), so that what needs no network,
such as `calotype --help`, never waits for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calotype.batch import Batch
    from calotype.engine import Engine, load, load_from
    from calotype.errors import (
        CalotypeError,
        CalotypeWarning,
        CheckpointError,
        ModelNotFoundError,
        OutputError,
        UnsafeFileError,
        UsageError,
    )
    from calotype.images import canny, open_image
    from calotype.request import Control, Request
    from calotype.result import Result, Step
    from calotype.training.trainer import distill

    __version__: str

# Public name -> the module that defines it.
_HOME = {
    "load": "calotype.engine",
    "load_from": "calotype.engine",
    "Engine": "calotype.engine",
    "Batch": "calotype.batch",
    "Result": "calotype.result",
    "Step": "calotype.result",
    "Request": "calotype.request",
    "Control": "calotype.request",
    "canny": "calotype.images",
    "open_image": "calotype.images",
    "distill": "calotype.training.trainer",
    "CalotypeError": "calotype.errors",
    "UsageError": "calotype.errors",
    "ModelNotFoundError": "calotype.errors",
    "CheckpointError": "calotype.errors",
    "UnsafeFileError": "calotype.errors",
    "OutputError": "calotype.errors",
    "CalotypeWarning": "calotype.errors",
}

__all__ = [
    "Batch",
    "CalotypeError",
    "CalotypeWarning",
    "CheckpointError",
    "Control",
    "Engine",
    "ModelNotFoundError",
    "OutputError",
    "Request",
    "Result",
    "Step",
    "UnsafeFileError",
    "UsageError",
    "__version__",
    "canny",
    "distill",
    "load",
    "load_from",
    "open_image",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("calotype")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'calotype' has no attribute {name!r}")
    globals()[name] = value  # the next use costs nothing
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
