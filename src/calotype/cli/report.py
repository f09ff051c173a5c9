"""How people are told things: `note:`, `warning:`, `error:` and `hint:` lines on stderr, and the exit codes."""

from __future__ import annotations

import sys
import traceback

from calotype.errors import CalotypeError

INTERRUPTED = 130  # 128 + SIGINT
TERMINATED = 143  # 128 + SIGTERM


def printable(text: str) -> str:
    """`text` on one line, with control characters escaped: a prompt or a file name must not drive the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def warning(message: str) -> None:
    print(f"warning: {printable(message)}", file=sys.stderr)


def note(message: str) -> None:
    print(f"note: {printable(message)}", file=sys.stderr)


def failure(error: BaseException, *, debug: bool) -> int:
    """Tells `error` in one line and a hint, after the traceback if `debug`; returns the exit code."""
    message, hint, code = explain(error)
    if debug:
        traceback.print_exception(error)
    print(f"error: {printable(message)}", file=sys.stderr)
    if hint is not None:
        print(f"\nhint: {printable(hint)}", file=sys.stderr)
    return code


def explain(error: BaseException) -> tuple[str, str | None, int]:
    """(one line, hint, exit code) of what went wrong."""
    if isinstance(error, CalotypeError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", None, INTERRUPTED
    if not isinstance(error, Exception):
        return "terminated", None, TERMINATED
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # the option parser's own errors
        return _explain_usage(error.format_message(), getattr(error, "ctx", None), error.exit_code)
    first_line = next(iter(str(error).splitlines()), "")
    if _out_of_memory(error):
        hint = "fewer images at once (-n), a smaller --size, or --dtype bfloat16 takes less"
        return f"out of memory: {first_line or type(error).__name__}", hint, 1
    if isinstance(error, OSError):
        return str(error), "the system refused; --debug shows where", 1
    named = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return named, "this is a fault in calotype, not in what you asked for; --debug shows where", 1


def _explain_usage(message: str, context: object, code: int) -> tuple[str, str, int]:
    message = message[:1].lower() + message[1:].rstrip(".")
    command = getattr(context, "command_path", "calotype")
    if "extra argument" in message and command == "calotype generate":
        return message, 'a prompt of several words goes in quotes: calotype "a red fox"', code
    return message, f"{command} --help lists what it takes", code


def _out_of_memory(error: Exception) -> bool:
    """Python's MemoryError, torch's OutOfMemoryError, and torch's allocator on a CPU, which raises RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )
