"""calotype eval: how far a model's few-step pictures are from its teacher's."""

from __future__ import annotations

import itertools
import json
import os
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calotype.cli import destination, parse
from calotype.cli.progress import Report, progress
from calotype.errors import UsageError

if TYPE_CHECKING:
    from calotype.parts import Parts
    from calotype.training.distance import Estimate
    from calotype.training.evaluate import Table

PROMPTS = "prompts.txt"  # beside or in the teacher's folder


def evaluate(
    model: Annotated[str, typer.Argument(help="The few-step model: folder or Hub id.", show_default=False)],
    teacher: Annotated[
        str,
        typer.Option(metavar="T", help="What it was distilled from: folder or Hub id.", show_default=False),
    ],
    teacher_unet: Annotated[
        str | None, typer.Option(metavar="U", help="Take the teacher's U-Net from this model.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"A prompt a line [default: {PROMPTS} in or beside the teacher's folder]."),
    ] = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=3, help="How many pictures of each kind; prompts are repeated as needed.")
    ] = 1000,
    steps: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of steps to try.")] = "1,2,4,8",
    sampler: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's: lcm, tcd, ddim, euler [default: its own].")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="G", parser=parse.number, help="Guidance scale [default: the model's own]."),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Pictures drawn at a time.")] = 20,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the teacher's pictures are kept [default: in the user's cache]."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A PNG to write: the first 16 prompts.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Seed of the first picture.")] = 0,
    device: Annotated[str, typer.Option(metavar="D", help="auto, cpu, cuda, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="T", help="auto, float32, bfloat16, float16.")] = "auto",
    offline: Annotated[bool, typer.Option("--offline", help="Use only models that are on this machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure how far a model's pictures are from its teacher's.

    Prints the kernel distance of the model's pictures in a few steps, and of the teacher's by DDIM in as many, to the
    teacher's in 50 steps. The teacher's pictures are kept, and an interrupted run goes on where it was.
    """
    counts = parse_steps(steps)
    texts = read_prompts(prompts if prompts is not None else find_prompts(teacher, teacher_unet), samples)
    check(texts, counts, sampler, guidance, seed)
    if output is not None:
        destination.check(output, 1)
    folder = default_cache() if cache is None else cache

    import calotype

    with progress(quiet=quiet) as show:
        show("loading")
        where = {"device": device, "dtype": dtype, "offline": offline}
        student = fast(calotype.load(model, **where).parts)  # type: ignore[arg-type]
        origin = fast(calotype.load(teacher, unet=teacher_unet, **where).parts)  # type: ignore[arg-type]
        table = measure(student, origin, texts, counts, sampler, guidance, seed, batch, folder, show)
    if output is not None:
        draw_grid(table, texts, output)
    typer.echo(json.dumps(to_json(table)) if as_json else "\n".join(lines(table)))


def fast(parts: Parts) -> Parts:
    """Convolutions are a tenth quicker on a CPU with the channels last in memory."""
    import torch

    parts.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return parts


def measure(
    student: Parts,
    teacher: Parts,
    prompts: Sequence[str],
    steps: Sequence[int],
    sampler: str | None,
    guidance: float | None,
    seed: int,
    batch: int,
    cache: Path,
    show: Report,
) -> Table:
    """Runs the evaluation to its end, showing where it is."""
    from calotype.training import evaluate as training

    run = training.evaluate(
        student, teacher, prompts, steps=steps, sampler=sampler, guidance=guidance, seed=seed, batch=batch, cache=cache
    )
    for event in run:
        if isinstance(event, training.Table):
            return event
        show(f"{event.stage}: {event.done} of {event.total}", event.done, event.total)
    raise AssertionError("the evaluation ends with a table")


# ---- what is asked for ----


def parse_steps(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,9}", part) for part in parts):
        message = f"--steps must be whole numbers with commas between them, not {reprlib.repr(text)}"
        raise UsageError(message, hint="for example --steps 1,2,4,8")
    return sorted({int(part) for part in parts})


def find_prompts(*references: str | None) -> Path:
    """prompts.txt in or beside the folder of a model. UsageError if there is none."""
    for reference in references:
        if reference is not None and (folder := Path(reference)).is_dir():
            for path in (folder / PROMPTS, folder.resolve().parent / PROMPTS):
                if path.is_file():
                    return path
    raise UsageError(f"there is no {PROMPTS} in or beside the teacher's folder", hint="give --prompts FILE")


def read_prompts(path: Path, count: int) -> list[str]:
    """The first `count` lines that are not empty, from the top again if there are fewer."""
    try:
        found = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UsageError(
            f"cannot read the prompts {str(path)!r}: {error.strerror}", hint="give --prompts FILE"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"the prompts {str(path)!r} are not UTF-8 text", hint="a prompt a line") from None
    if not found:
        raise UsageError(f"{str(path)!r} holds no prompts", hint="a prompt a line")
    return list(itertools.islice(itertools.cycle(found), count))


def check(prompts: Sequence[str], steps: Sequence[int], sampler: str | None, guidance: float | None, seed: int) -> None:
    """Raises UsageError for what no request may have, before anything is loaded."""
    from calotype.request import Request

    for prompt in dict.fromkeys(prompts):
        Request(prompt, sampler=sampler, guidance=guidance, seed=seed)
    for count in steps:
        Request("", steps=count)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "calotype" / "eval"


# ---- what is told ----


def lines(table: Table) -> list[str]:
    """The table as text: distances x 1000, each with its standard error."""
    head = ("pictures", "distance", "above floor", "by picture", "s/picture")
    rows = [
        (
            row.name,
            plus_minus(row.distance, 1000, 1),
            plus_minus(row.above_floor, 1000, 1) if row.above_floor.error > 0 else "floor",
            plus_minus(row.paired, 1, 3),
            f"{row.seconds:.3f}",
        )
        for row in table.rows
    ]
    widths = [max(len(cells[i]) for cells in (head, *rows)) for i in range(len(head))]
    text = ["  ".join((c[0].ljust(widths[0]), *map(str.rjust, c[1:], widths[1:]))) for c in (head, *rows)]
    return [
        f"{table.samples} prompts at guidance {table.guidance:g}, against the teacher's pictures in"
        f" {table.teacher_steps} DDIM steps ({table.teacher_seconds:.3f} s each)",
        "distance: unbiased kernel distance x 1000; by picture: mean feature distance to the same prompt's",
        "",
        *text,
    ]


def plus_minus(estimate: Estimate, factor: int, digits: int) -> str:
    return f"{factor * estimate.value:.{digits}f} ± {factor * estimate.error:.{digits}f}"


def to_json(table: Table) -> dict[str, object]:
    return {
        "samples": table.samples,
        "guidance": table.guidance,
        "teacher_steps": table.teacher_steps,
        "teacher_seconds": table.teacher_seconds,
        "rows": [row.to_json() for row in table.rows],
    }


def draw_grid(table: Table, prompts: Sequence[str], output: Path) -> None:
    """A row for each prompt; a column for each number of the model's steps, and the teacher's 50."""
    from calotype.images import grid, save_png, to_pil

    names = [row.name for row in table.rows if row.name.startswith("student")]
    names += [name for name in table.examples if name not in {row.name for row in table.rows}]
    columns = [to_pil(table.examples[name].float() / 127.5 - 1) for name in names]
    cells = [picture for row in zip(*columns, strict=True) for picture in row]
    titles = [name.removeprefix("student, ") for name in names]
    rows = len(columns[0])
    save_png(grid(cells, len(names), column_titles=titles, row_titles=prompts[:rows]), output)
