"""calotype generate: a prompt in, pictures out."""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calotype.cli import destination, parse
from calotype.cli.progress import Report, progress
from calotype.cli.show import recorded
from calotype.errors import CalotypeWarning, UsageError

if TYPE_CHECKING:
    from calotype import Engine, Request, Result

# What `calotype.load` takes and `engine.describe` gives back.
LOAD_ARGUMENTS = ("model", "unet", "vae", "variant", "revision", "device", "dtype")
STDIN_LIMIT = 1_000_000  # characters: an endless stream must not fill the memory


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to draw; - reads it from stdin.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The PNG to write (named after prompt and seed)."),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="M", help="Hub id, folder or file (the shipped model).")] = None,
    unet: Annotated[str | None, typer.Option(metavar="U", help="Take the U-Net from this model.")] = None,
    vae: Annotated[str | None, typer.Option(metavar="V", help="Take the autoencoder from this model.")] = None,
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="Which weight files, such as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the Hub.")] = None,
    steps: Annotated[
        int | None, typer.Option(parser=parse.whole, metavar="N", help="Network evaluations, usually 1 to 8.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(parser=parse.number, metavar="G", help="Guidance scale; 1 is none.")
    ] = None,
    guidance_steps: Annotated[
        int | None, typer.Option(parser=parse.whole, metavar="N", help="Guide only the first N steps.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(parser=parse.whole, metavar="S", help="Seed of the first picture (random).")
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels, multiples of 8.")] = None,
    n: Annotated[
        int | None, typer.Option("-n", parser=parse.whole, metavar="N", help="How many pictures: seeds S, S+1, ...")
    ] = None,
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="What not to draw.")] = None,
    sampler: Annotated[str | None, typer.Option(metavar="NAME", help="lcm, ddim or euler.")] = None,
    timesteps: Annotated[str | None, typer.Option(metavar="T,T,...", help="An explicit grid, such as 999,499.")] = None,
    clip_skip: Annotated[
        int | None, typer.Option(parser=parse.whole, metavar="N", help="Skip the last N layers of CLIP.")
    ] = None,
    emphasis: Annotated[
        bool | None, typer.Option("--emphasis/--no-emphasis", help="Read (word:1.2) as emphasis.", show_default=False)
    ] = None,
    like: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Repeat the request in this PNG; other options change it.")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="D", help="auto, cpu, cuda, mps.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="T", help="auto, float32, bfloat16, float16.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only models that are on this machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of paths.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Draw a prompt: writes PNG files and prints their paths."""
    width, height = (None, None) if size is None else parse.size(size)
    fields = given(
        prompt=read_stdin() if prompt == "-" else prompt,
        negative_prompt=negative,
        steps=steps,
        guidance=guidance,
        seed=seed,
        n=n,
        width=width,
        height=height,
        sampler=sampler,
        timesteps=None if timesteps is None else parse.timesteps(timesteps),
        guidance_steps=guidance_steps,
        clip_skip=clip_skip,
        emphasis=emphasis,
    )
    models = given(model=model, unet=unet, vae=vae, variant=variant, revision=revision, device=device, dtype=dtype)
    job = new_job(fields, models) if like is None else job_like(like, fields, models)
    destination.check(output, job.count)
    with progress(quiet=quiet) as show:
        engine, loading = load(job.models | ({"offline": True} if offline else {}), show)
        result = develop(engine, job.request, show)
    indices = range(len(result.images)) if job.index is None else [job.index]
    paths = write(result, indices, output)
    if as_json:
        print(json.dumps(summary(result, indices, paths, loading)))
    else:
        for path in paths:
            print(path)


@dataclass(frozen=True)
class Job:
    """What to run: a request, the arguments of `calotype.load`, and which of the request's pictures to keep."""

    request: Request
    models: dict[str, Any]
    index: int | None = None  # None keeps them all

    @property
    def count(self) -> int:
        return self.request.n if self.index is None else 1


def new_job(fields: dict[str, Any], models: dict[str, Any]) -> Job:
    from calotype.request import Request

    if "prompt" not in fields:
        raise UsageError("there is no prompt", hint='calotype "a fox"; - reads the prompt from stdin')
    return Job(Request(**fields), models)


def job_like(path: Path, fields: dict[str, Any], models: dict[str, Any]) -> Job:
    """The request that made the picture at `path`, changed by what was given explicitly.

    The whole batch runs again, because a picture is repeated bit for bit only in a batch of the same size; but only
    the one picture is kept. With a seed or a count of its own it is a new request instead, and all are kept.
    """
    import calotype
    from calotype.request import Request

    metadata = recorded(path)
    if metadata.get("calotype") != calotype.__version__:
        message = f"{path} was made by calotype {metadata.get('calotype')}; this is {calotype.__version__}"
        warnings.warn(f"{message}: the picture may differ", CalotypeWarning, stacklevel=2)
    request = Request.from_json(metadata["request"])
    index: int | None = metadata["index"]
    if "seed" in fields or "n" in fields:
        own_seed = None if request.seed is None else request.seed + metadata["index"]
        request, index = replace(request, seed=own_seed, n=1), None
    if ("steps" in fields) != ("timesteps" in fields):  # the one decides the other
        request = replace(request, steps=None, timesteps=None)
    made_with = {name: value for name, value in metadata["model"].items() if name in LOAD_ARGUMENTS}
    return Job(replace(request, **fields), given(**made_with) | models, index)


def load(models: dict[str, Any], show: Report) -> tuple[Engine, float]:
    """The engine and the seconds that loading it took, torch's import among them."""
    import calotype

    show("loading")
    start = time.perf_counter()
    with uncollected():
        load_model = calotype.load  # imports torch
    return load_model(**models), time.perf_counter() - start


@contextmanager
def uncollected() -> Iterator[None]:
    """What is imported stays to the end: the garbage collector need not walk it again and again, nor at the exit."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def develop(engine: Engine, request: Request, show: Report) -> Result:
    """Runs the request to its end; the generator `engine.stream` returns the result after its last step."""
    stream = engine.stream(request)
    show("reading the prompt")
    start = time.perf_counter()
    while True:
        try:
            step = next(stream)
        except StopIteration as end:
            result: Result = end.value
            return result
        seconds, start = time.perf_counter() - start, time.perf_counter()
        done = step.index + 1
        show("decoding" if done == step.total else f"step {done}/{step.total}, {seconds:.2f} s", done, step.total)


def write(result: Result, indices: Sequence[int], output: Path | None) -> list[Path]:
    """Saves the pictures `indices` of `result`, each with all that repeats it."""
    from calotype.images import save_png

    if output is None:
        paths = destination.unused(result.request.prompt, [result.seeds[i] for i in indices])
    else:
        paths = destination.numbered(output, len(indices))
    for i, path in zip(indices, paths, strict=True):
        save_png(result.images[i], path, result.metadata(i))
    return paths


def summary(result: Result, indices: Sequence[int], paths: list[Path], loading: float) -> dict[str, Any]:
    return {
        "paths": [str(path) for path in paths],
        "seeds": [result.seeds[i] for i in indices],
        "request": result.request.to_json(),
        "timings": {"load": loading, **result.timings},
    }


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: None is an option left out, while 0 and "" are values."""
    return {name: value for name, value in options.items() if value is not None}


def read_stdin() -> str:
    """The prompt from stdin, without the newline that ends it."""
    try:
        text = sys.stdin.read(STDIN_LIMIT + 1)
    except UnicodeDecodeError as error:
        raise UsageError("the prompt on stdin is not text", hint="it must be UTF-8") from error
    if len(text) > STDIN_LIMIT:
        raise UsageError(f"the prompt on stdin is longer than {STDIN_LIMIT} characters")
    return text.removesuffix("\n")
