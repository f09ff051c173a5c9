"""What `calotype bench` tells: a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from calotype.bench.compare import STAGES, Comparison

TITLES = {"unet": "U-Net call"}


def lines(found: Comparison) -> list[str]:
    """Medians in milliseconds, a row for each contender; then how many times as fast the first one is."""
    task, names = found.task, list(found.figures)
    size = f"{task.width} x {task.height} px, {task.steps} steps, {task.dtype}"
    text = [
        f"{found.processor}, {task.threads} threads; {size}",
        f"ceiling: {found.ceiling / 1e9:,.0f} GFLOP/s in products of matrices; a U-Net call is {found.flops / 1e9:,.0f}"
        " GFLOP",
        "first: a process's first picture; cold: from its start to that; the others are of warm pictures",
        "",
    ]
    rows = [["ms", *(TITLES.get(stage, stage) for stage in STAGES), "of ceiling", "distance"]]
    for name, figures in found.figures.items():
        cells = [_milliseconds(figures.of(stage)) for stage in STAGES]
        distance = "" if figures.distance is None else f"{figures.distance:.2f}"
        rows.append([name, *cells, f"{100 * found.share(name):.0f} %", distance])
    text += _aligned(rows)
    text += ["", "distance: of the first picture to float32's, root mean square of 255"]
    text += [
        f"{name}: {figures.convert:.0f} s more, once, to convert the model"
        for name, figures in found.figures.items()
        if figures.convert is not None
    ]
    if len(names) > 1:
        rows = [[f"{names[0]} is faster than", *(TITLES.get(stage, stage) for stage in STAGES)]]
        rows += [[other, *(_times(found.ratio(other, stage)) for stage in STAGES)] for other in names[1:]]
        text += ["", *_aligned(rows)]
    return text


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.1f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} x"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))).rstrip() for row in rows]
