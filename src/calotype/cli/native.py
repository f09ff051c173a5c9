"""calotype native: the kernel in C++."""

from __future__ import annotations

from typing import Annotated

import typer

from calotype.errors import UsageError

ACTIONS = ("build", "show", "remove")


def native(
    action: Annotated[str, typer.Argument(help="build, show or remove.", metavar="ACTION", show_default=False)],
) -> None:
    """Build the kernel that makes attention faster on processors with AMX, in bfloat16.

    It takes a C++ compiler and some seconds; models that are loaded afterwards use it by themselves. It is in the
    user's cache: `show` prints where, `remove` deletes it. All works without it.
    """
    if action not in ACTIONS:
        raise UsageError(f"ACTION must be one of {', '.join(ACTIONS)}, not {action!r}")
    from calotype.optimize import native as kernels

    if action == "build":
        print(kernels.build())
    elif action == "remove":
        kernels.place().unlink(missing_ok=True)
    elif kernels.kernel() is None:
        raise UsageError("the native kernel is not built", kernels.unusable() or "calotype native build")
    else:
        print(kernels.place())
