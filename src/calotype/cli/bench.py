"""calotype bench: how fast this machine draws with a model, beside its peers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from calotype.atomic import make_folder
from calotype.cli import parse, report
from calotype.cli.progress import progress
from calotype.errors import OutputError, UsageError

PLOTS = (".png", ".svg", ".pdf")


def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder, file or Hub id (the shipped model).", metavar="MODEL", show_default=False),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(metavar="FAMILY", help="Random weights of a family's shapes: sd15, sd21, sdxl, ssd1b."),
    ] = None,
    against: Annotated[
        str, typer.Option(metavar="PEER,...", help="diffusers, openvino: whichever are installed.")
    ] = "",
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels [default: the model's own].")] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, max=50, help="Evaluations of the network.")] = 4,
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="Warm pictures of each.")] = 5,
    starts: Annotated[int, typer.Option(metavar="N", min=1, help="Processes of each, one after the other.")] = 1,
    dtype: Annotated[str, typer.Option(metavar="T", help="Of all: auto, float32, bfloat16, float16.")] = "auto",
    optimize: Annotated[
        list[str] | None,
        typer.Option(metavar="S,...", help="Ours: auto, none, or steps; may be repeated, for a row each."),
    ] = None,
    decoder: Annotated[str, typer.Option(metavar="NAME", help="Of all: full or tiny.")] = "full",
    tiny_vae: Annotated[str | None, typer.Option(metavar="V", help="A TAESD's folder, for --decoder tiny.")] = None,
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="Which weight files, such as fp16.")] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where what is made for it stays, for the next time.")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw where the time goes: .png.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure how fast this machine draws with a model, beside diffusers and OpenVINO.

    Each draws in a process of its own, in turn, with the same weights and noise, on the CPU. Prints medians, and how
    many times as fast calotype is. A quiet machine says more.
    """
    sides = None if size is None else parse.size(size)
    if plot is not None and plot.suffix.lower() not in PLOTS:
        raise UsageError(f"--plot must end in {' or '.join(PLOTS)}, not {plot.name!r}")
    if model is not None and random is not None:
        raise UsageError("MODEL and --random contradict each other", "give one of them")
    for path in (as_json, plot):
        if path is not None and not path.parent.is_dir():
            raise OutputError(f"there is no folder {str(path.parent)!r}", "make it first")

    from importlib.util import find_spec

    from calotype.atomic import write
    from calotype.bench import contenders, table
    from calotype.bench.compare import compare

    if plot is not None and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib", "pip install 'calotype[bench]'")
    names = contenders.peers([name.strip() for name in against.split(",") if name.strip()], report.warning)
    with tempfile.TemporaryDirectory() as temporary, progress(quiet=quiet) as show:
        scratch = Path(temporary) if keep is None else keep
        make_folder(scratch)
        folder = contenders.model_folder(model, random, scratch, show)
        asked = {"size": sides, "steps": steps, "dtype": dtype, "optimize": optimize or ["auto"]}
        asked |= {"decoder": decoder, "tiny_vae": tiny_vae, "variant": variant}
        found, reference = contenders.contenders(folder, scratch, names, **asked)  # type: ignore[arg-type]
        compared = compare(found, reference, starts=starts, runs=runs, show=show, warn=report.warning)
    if as_json is not None:
        write(as_json, json.dumps(compared.to_json(), indent=1).encode())
    if plot is not None:
        from calotype.bench.plot import draw

        draw(compared, plot)
    print("\n".join(table.lines(compared)))
