"""Ctrl-C and SIGTERM: they unwind the stack, so that temporary files go, and are never lost.

An exception that a signal's handler raises within an import may vanish: torch's C code there clears it, makes another
of it, or ends the process. So it is raised where the import ends; a second signal is heeded at once.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

IMPORTING = "<frozen importlib._bootstrap>"  # what the frames of an import call their file


class Interrupted(KeyboardInterrupt):
    """SIGINT arrived. Python ends itself by that signal where C code has seen a plain KeyboardInterrupt go by."""


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt it passes through `except Exception`, and every `finally` runs."""


class Interruption:
    """What arrived, if anything did."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        again = self.error is not None
        self.error = Terminated() if number == signal.SIGTERM else Interrupted()
        importing = _import_around(frame)
        if again or importing is None:
            raise self.error

        def profile(at: FrameType, event: str, value: object) -> None:
            if at is importing and event == "return":
                sys.setprofile(None)
                self.raise_pending()

        sys.setprofile(profile)

    def raise_pending(self) -> None:
        """Raises what arrived, if anything did: a destructor or the like may have swallowed it."""
        if self.error is not None:
            raise self.error


def _import_around(frame: FrameType | None) -> FrameType | None:
    """The outermost import that `frame` is part of."""
    found = None
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            found = frame
        frame = frame.f_back
    return found


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Within it, SIGINT raises Interrupted and SIGTERM Terminated. Signals that are ignored stay so, as in `nohup`."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield interruption
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGINT] is not signal.default_int_handler:
        del before[signal.SIGINT]
    try:
        for number in before:
            signal.signal(number, interruption.receive)
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if interruption.error is not None:
            sys.setprofile(None)
