"""What `calotype eval` tells: a table for people and a sheet of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calotype.training.distance import Estimate
    from calotype.training.evaluate import Drawn, Row, Table

Column = tuple[str, "Callable[[Row], str]"]


def lines(table: Table) -> list[str]:
    """The table as text, a block for each model, sampler and guidance: distances x 1000, with their standard errors."""
    judged = table.targets[0].clip_score is not None
    steps, columns = table.targets[0].steps, list(_columns(judged))
    blocks = list(_blocks(table, steps))
    cells = [[cell(row) for _, cell in columns] for _, rows in blocks for row in rows]
    widths = [max(map(len, column)) for column in zip([name for name, _ in columns], *cells, strict=True)]

    def line(texts: Sequence[str]) -> str:
        return "  ".join((texts[0].ljust(widths[0]), *map(str.rjust, texts[1:], widths[1:])))

    text = [line([name for name, _ in columns])]
    for title, rows in blocks:
        text += [title, *(line([cell(row) for _, cell in columns]) for row in rows)]
    return [*_legend(table, judged), "", *text]


def _legend(table: Table, judged: bool) -> Iterator[str]:
    steps = table.targets[0].steps
    yield f"{table.samples} prompts, {table.batch} at a time, against the teacher's pictures in {steps} DDIM steps"
    yield "distance: unbiased kernel distance x 1000; by picture: mean feature distance to the same prompt's"
    yield "evals, s: of the network, seconds; for a picture. MB: the peak of a batch, beyond the weights"
    if judged:
        yield "CLIP: 100 x cosine with the prompt; FID: of CLIP's embeddings, too high where pictures are few"


def _columns(judged: bool) -> Iterator[Column]:
    yield "pictures", lambda row: "  other seeds" if row.model == "floor" else f"  {_counted(row.steps)}"
    yield "evals", lambda row: f"{row.evaluations}"
    yield "distance", lambda row: plus_minus(row.distance, 1000, 1)
    yield "above floor", lambda row: "floor" if row.model == "floor" else plus_minus(row.above_floor, 1000, 1)
    yield "by picture", lambda row: plus_minus(row.paired, 1, 3)
    yield "s", lambda row: f"{row.seconds:.3f}"
    yield "MB", lambda row: _megabytes(row)
    if judged:
        yield "CLIP", lambda row: _score(row)
        yield "FID", lambda row: "?" if row.fid_clip is None else f"{row.fid_clip:.2f}"


def _blocks(table: Table, steps: int) -> Iterator[tuple[str, list[Row]]]:
    """Rows that differ in their number of steps alone, under a title."""
    for target in table.targets:
        rows = [row for row in table.rows if row.teacher_guidance == target.guidance]
        for key in dict.fromkeys((row.model, row.sampler, row.guidance) for row in rows):
            model, sampler, guidance = key
            title = f"{model}: {sampler}, guidance {guidance:g}"
            if model == "floor":
                title = f"against the teacher at guidance {guidance:g}: {_counted(steps)}, {target.evaluations} evals"
                title += f", {target.seconds:.3f} s, {_megabytes(target)} MB"
                title += "" if target.clip_score is None else f", CLIP {_score(target)}"
            yield title, [row for row in rows if (row.model, row.sampler, row.guidance) == key]


def _counted(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"


def _megabytes(drawn: Drawn) -> str:
    return "?" if drawn.memory is None else f"{drawn.memory / 1e6:.0f}"


def _score(drawn: Drawn) -> str:
    return "?" if drawn.clip_score is None else f"{drawn.clip_score.value:.2f}"


def plus_minus(estimate: Estimate, factor: int, digits: int) -> str:
    return f"{factor * estimate.value:.{digits}f} ± {factor * estimate.error:.{digits}f}"


def draw_grid(table: Table, prompts: Sequence[str], output: Path) -> None:
    """A row for each prompt; a column for each of the model's sets, then the teacher's that they are compared with."""
    from calotype.images import grid, to_pil
    from calotype.stills import save

    names = []
    for target in table.targets:
        own = [row for row in table.rows if row.model == "student" and row.teacher_guidance == target.guidance]
        names += [*(row.name for row in own), target.name]
    columns = [to_pil(table.examples[name].float() / 127.5 - 1) for name in names]
    cells = [picture for row in zip(*columns, strict=True) for picture in row]
    titles = [name.removeprefix("student, ") for name in names]
    save(grid(cells, len(names), column_titles=titles, row_titles=prompts[: len(columns[0])]), output)
