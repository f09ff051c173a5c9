"""calotype convert: a model from one layout to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calotype.cli.report import printable
from calotype.errors import UsageError


def convert(
    model: Annotated[
        str,
        typer.Argument(help="A model folder, a single file, a pickle or a Hub id.", metavar="IN", show_default=False),
    ],
    output: Annotated[
        Path, typer.Argument(help="A name that ends in .safetensors, or a folder's.", metavar="OUT", show_default=False)
    ],
    dtype: Annotated[
        str | None, typer.Option(help="Write the weights as float32, bfloat16, float16.", show_default=False)
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="The same as --dtype float16.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    prediction: Annotated[
        str | None,
        typer.Option(
            help="What the model predicts, where it does not say: epsilon, v_prediction, sample.", show_default=False
        ),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Weights such as fp16.", show_default=False)] = None,
    revision: Annotated[
        str | None, typer.Option(help="A branch, a tag or a commit on the Hub.", show_default=False)
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use the local cache only.")] = False,
) -> None:
    """Write a model in another layout: a folder as a single file, a single file as a folder, a pickle as either.

    A folder whose weights are .bin files becomes one of .safetensors files. Single files are in the layout of the
    original Stable Diffusion checkpoints. Of a pickle only tensors are taken, in a process of its own. Prints OUT.
    """
    if half and dtype not in (None, "float16"):
        raise UsageError(f"--half and --dtype {dtype} contradict each other", "give one of them")
    chosen = "float16" if half else dtype
    if prediction not in (None, "epsilon", "v_prediction", "sample"):
        raise UsageError(f"--prediction must be one of epsilon, v_prediction, sample, not {prediction!r}")

    from calotype.precision import DTYPES
    from calotype.weights.convert import convert as write

    if chosen is not None and chosen not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, not {chosen!r}")
    written = write(
        model,
        output,
        dtype=None if chosen is None else DTYPES[chosen],
        force=force,
        variant=variant,
        revision=revision,
        offline=offline,
        prediction=prediction,
    )
    print(printable(str(written)))
