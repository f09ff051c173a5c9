"""The comparison as a picture: where a warm picture's time goes, a bar for each contender."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calotype.bench.compare import Comparison

PARTS = ("text", "unet", "decode", "rest")
TITLES = {"text": "text", "unet": "U-Net", "decode": "decoder", "rest": "the rest"}
COLOURS = {"text": "#8d99ae", "unet": "#2b6777", "decode": "#c8553d", "rest": "#d9d9d9"}


def draw(found: Comparison, path: Path) -> None:
    """Writes a PNG (or what the name ends in)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(found.figures)
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.55 * len(names)), layout="constrained")
    left = [0.0] * len(names)
    for part in PARTS:
        widths = [_seconds(found, name, part) for name in names]
        axes.barh(names, widths, left=left, color=COLOURS[part], label=TITLES[part], height=0.62)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for name, end in zip(names, left, strict=True):
        ratio = found.ratio(name, "picture")
        told = f"{end:.2f} s" if name == names[0] or ratio is None else f"{end:.2f} s ({ratio:.2f} x)"
        axes.annotate(told, (end, name), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    _dress(axes, found, max(left))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _seconds(found: Comparison, name: str, part: str) -> float:
    taken = found.figures[name].of(part)
    assert taken is not None
    return taken * found.task.steps if part == "unet" else taken


def _dress(axes: Any, found: Comparison, longest: float) -> None:
    task = found.task
    axes.set_xlim(0, 1.2 * longest)
    axes.invert_yaxis()
    axes.set_xlabel("seconds a warm picture", fontsize=9)
    axes.set_title(
        f"{task.width} x {task.height} px, {task.steps} steps, {task.dtype}\n{found.processor}, {task.threads} threads",
        fontsize=9,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.legend(frameon=False, fontsize=9, ncols=len(PARTS), loc="upper center", bbox_to_anchor=(0.5, -0.32))
