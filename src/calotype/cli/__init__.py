"""The command line: one file a command, and here what they share.

A command is imported when it is asked for (or listed by --help), and imports torch only once its arguments are known to
be good. stdout is data, stderr is for people; calotype.cli.report says how a failure is told.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from calotype.cli import report
from calotype.cli.interruption import Terminated, interruptible

# Command -> where its function is. Its signature makes the options, its docstring the help text.
COMMANDS = {
    "generate": "calotype.cli.generate:generate",
    "show": "calotype.cli.show:show",
    "inspect": "calotype.cli.inspect:inspect",
    "convert": "calotype.cli.convert:convert",
    "distill": "calotype.cli.distill:distill",
    "eval": "calotype.cli.evaluate:evaluate",
    "bench": "calotype.cli.bench:bench",
    "native": "calotype.cli.native:native",
    "doctor": "calotype.cli.doctor:doctor",
}
DEFAULT_COMMAND = "generate"
ROOT_OPTIONS = ("-h", "--help", "--version")


class CommandGroup(TyperGroup):
    """The commands of COMMANDS, each imported when it is needed; what is not a command is a prompt."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            self.commands[cmd_name] = _build(cmd_name)
        return self.commands.get(cmd_name)

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if not args:
            args = ["--help"]
        elif args[0] not in (*COMMANDS, *ROOT_OPTIONS):
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)


def _build(name: str) -> Any:
    """The command `name` with the option that all share, --debug (read by main)."""
    module, function = COMMANDS[name].split(":")
    app = typer.Typer(add_completion=False)
    app.command(name)(getattr(import_module(module), function))
    command = typer.main.get_command(app)
    shared = typer.Typer(add_completion=False)
    shared.command()(_shared_options)
    command.params += typer.main.get_command(shared).params
    for parameter in command.params:  # rich would take "[default: ...]" for its markup, and drop it
        parameter.help = parameter.help and parameter.help.replace("[", r"\[")  # type: ignore[attr-defined]
    return command


def _remember_debug(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.find_root().obj["debug"] = True


def _shared_options(
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show the traceback of a failure.",
            callback=_remember_debug,
            expose_value=False,
            is_eager=True,
        ),
    ] = False,
) -> None:
    pass


def _print_version(value: bool) -> None:
    if value:
        import calotype

        print(calotype.__version__)
        raise typer.Exit


app = typer.Typer(
    cls=CommandGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def calotype(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Develop a picture in a few steps:  calotype "a fox"  is short for  calotype generate "a fox"."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0, 1, 2 usage, 3 no such model, 130 Ctrl-C, 143 SIGTERM."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    state: dict[str, Any] = {"debug": False}
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path may hold bytes that are no text
    with interruptible() as interruption, _warnings_as_lines():
        try:
            command = typer.main.get_command(app)
            code = command.main(arguments, prog_name="calotype", standalone_mode=False, obj=state)
            interruption.raise_pending()
            _flush_stdout()
        except (BrokenPipeError, SystemExit):  # the reader of stdout went away; typer makes that a SystemExit
            return 1
        except (KeyboardInterrupt, Terminated, Exception) as error:
            return report.failure(interruption.error or error, debug=state["debug"])
    if code == 130:  # typer has caught the KeyboardInterrupt
        return report.failure(KeyboardInterrupt(), debug=False)
    return code if isinstance(code, int) else 0


def _flush_stdout() -> None:
    try:
        print(end="", flush=True)
    except OSError:  # the interpreter's own last flush must go nowhere (docs.python.org, "Note on SIGPIPE")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    from calotype.errors import CalotypeWarning

    with warnings.catch_warnings():
        warnings.simplefilter("always", CalotypeWarning)
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata: what it comes to, our errors say
        python_way = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, CalotypeWarning):
                report.warning(str(message))
            else:
                python_way(message, category, *where, **more)

        warnings.showwarning = show
        yield
