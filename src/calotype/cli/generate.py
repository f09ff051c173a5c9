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

from calotype.cli import adapters, destination, parse, report
from calotype.cli.progress import Show, progress
from calotype.cli.show import recorded
from calotype.description import Description
from calotype.errors import CalotypeWarning, UsageError

if TYPE_CHECKING:
    from calotype import Engine, Request, Result

STDIN_LIMIT = 1_000_000  # characters: an endless stream must not fill the memory


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to draw; - reads it from stdin.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The file to write (named after prompt and seed)."),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="M", help="Hub id, folder or file (the shipped model).")] = None,
    unet: Annotated[str | None, typer.Option(metavar="U", help="Take the U-Net from this model.")] = None,
    vae: Annotated[str | None, typer.Option(metavar="V", help="Take the autoencoder from this model.")] = None,
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="Which weight files, such as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the Hub.")] = None,
    prediction: Annotated[
        str | None, typer.Option(metavar="KIND", help="What a single file predicts, if it does not say.")
    ] = None,
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
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A picture to start from; a clip for video to video.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(parser=parse.number, metavar="S", help="How much of it may change, up to 1.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(metavar="FILE", help="White is repainted, black is kept.")] = None,
    mask_feather: Annotated[
        int | None, typer.Option(parser=parse.whole, metavar="PIXELS", help="Blend the mask's edge.")
    ] = None,
    mask_crop: Annotated[
        int | None, typer.Option(parser=parse.whole, metavar="PIXELS", help="Work on the mask and so much around it.")
    ] = None,
    resize: Annotated[str | None, typer.Option(metavar="MODE", help="Pictures to size: stretch, crop, pad.")] = None,
    lora: Annotated[list[str] | None, typer.Option(metavar="REF[:SCALE]", help="A LoRA; may be repeated.")] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REF=IMAGE[:SCALE]",
            help="A ControlNet or T2I-Adapter; =canny:IMAGE finds the edges; may be repeated.",
        ),
    ] = None,
    embedding: Annotated[
        list[str] | None, typer.Option(metavar="REF[=TOKEN]", help="A textual inversion; may be repeated.")
    ] = None,
    motion: Annotated[str | None, typer.Option(metavar="REF", help="A motion adapter, for --frames.")] = None,
    frames: Annotated[
        int | None, typer.Option(parser=parse.whole, metavar="N", help="Make a clip: .gif, .webp, .mp4.")
    ] = None,
    fps: Annotated[int | None, typer.Option(parser=parse.whole, metavar="N", help="Frames a second (8).")] = None,
    sampler: Annotated[str | None, typer.Option(metavar="NAME", help="lcm, tcd, ddim or euler.")] = None,
    gamma: Annotated[float | None, typer.Option(parser=parse.number, metavar="G", help="Of tcd, 0 to 1 (0.3).")] = None,
    spacing: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of ddim's and euler's steps: leading, linspace, trailing.")
    ] = None,
    guidance_mode: Annotated[
        str | None, typer.Option(metavar="MODE", help="full, or once: one evaluation of the negative prompt.")
    ] = None,
    timesteps: Annotated[str | None, typer.Option(metavar="T,T,...", help="An explicit grid, such as 999,499.")] = None,
    clip_skip: Annotated[
        int | None, typer.Option(parser=parse.whole, metavar="N", help="Skip the last N layers of CLIP.")
    ] = None,
    emphasis: Annotated[
        bool | None, typer.Option("--emphasis/--no-emphasis", help="Read (word:1.2) as emphasis.", show_default=False)
    ] = None,
    like: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Repeat the request in this file; other options change it.")
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
        image=None if image is None else parse.picture(image, frames),
        strength=strength,
        mask=None if mask is None else parse.picture(mask, None),
        mask_feather=mask_feather,
        mask_crop=mask_crop,
        resize=resize,
        frames=frames,
        fps=fps,
        sampler=sampler,
        gamma=gamma,
        spacing=spacing,
        guidance_mode=guidance_mode,
        timesteps=None if timesteps is None else parse.timesteps(timesteps),
        guidance_steps=guidance_steps,
        clip_skip=clip_skip,
        emphasis=emphasis,
    )
    models = given(
        model=model,
        unet=unet,
        vae=vae,
        variant=variant,
        revision=revision,
        prediction=prediction,
        device=device,
        dtype=dtype,
    )
    extras: dict[str, Any] = given(
        loras=adapters.loras(lora) if lora else None,
        embeddings=adapters.embeddings(embedding) if embedding else None,
        motion=None if motion is None else {"ref": motion},
    )
    if control:
        extras["controls"], fields["controls"] = adapters.controls(control, frames)
    job = new_job(fields, models, extras) if like is None else job_like(like, fields, models, extras)
    destination.check(output, job.count, clip=job.request.frames is not None)
    if job.request.frames is not None:
        from calotype import video

        video.check(Path("clip.gif") if output is None else output, job.request.fps)
    with progress(quiet=quiet) as show:
        engine, loading = load(job.models | ({"offline": True} if offline else {}), job.adapters, show)
        result = develop(engine, job.request, show)
    indices = range(len(result.seeds)) if job.index is None else [job.index]
    paths = write(result, indices, output)
    if as_json:
        print(json.dumps(summary(result, indices, paths, loading)))
    else:
        for path in paths:
            print(path)


@dataclass(frozen=True)
class Order:
    """What to run: a request, the arguments of `calotype.load`, and which of the request's pictures to keep."""

    request: Request
    models: dict[str, Any]
    adapters: Description
    index: int | None = None  # None keeps them all

    @property
    def count(self) -> int:
        return self.request.n if self.index is None else 1


def new_job(fields: dict[str, Any], models: dict[str, Any], extras: dict[str, Any]) -> Order:
    from calotype.request import Request

    if "prompt" not in fields:
        raise UsageError("there is no prompt", hint='calotype "a fox"; - reads the prompt from stdin')
    return Order(Request(**fields), models, Description(**extras))


def job_like(path: Path, fields: dict[str, Any], models: dict[str, Any], extras: dict[str, Any]) -> Order:
    """The request that made the picture at `path`, changed by what was given explicitly: also the pictures that it was
    made from, which are not in the file.

    The whole batch runs again, because a picture is repeated bit for bit only in a batch of the same size; but only
    the one picture is kept. With a seed or a count of its own it is a new request instead, and all are kept.
    """
    import calotype
    from calotype.request import Request

    metadata = recorded(path)
    if metadata.get("calotype") != calotype.__version__:
        message = f"{path} was made by calotype {metadata.get('calotype')}; this is {calotype.__version__}"
        warnings.warn(f"{message}: the picture may differ", CalotypeWarning, stacklevel=2)
    pictures = {name: fields.pop(name) for name in ("image", "mask", "controls") if name in fields}
    request = Request.from_json(metadata["request"] | pictures | {"loras": None})  # the mix is in what the model had
    index: int | None = metadata["index"]
    if "seed" in fields or "n" in fields:
        own_seed = None if request.seed is None else request.seed + metadata["index"]
        request, index = replace(request, seed=own_seed, n=1), None
    if ("steps" in fields) != ("timesteps" in fields):  # the one decides the other
        request = replace(request, steps=None, timesteps=None)
    made = Description.of(metadata["model"])
    files = {part: file for part, file in made.files.items() if part not in models}
    added = replace(made, files=files, **extras)
    return Order(replace(request, **fields), given(**made.model) | models, added, index)


def load(models: dict[str, Any], added: Description, show: Show) -> tuple[Engine, float]:
    """The engine with its adapters, and the seconds that loading it took, torch's import among them."""
    import calotype

    show("loading")
    start = time.perf_counter()
    with uncollected():
        load_model = calotype.load  # imports torch
    made = replace(added, model=models).found()
    engine = load_model(**made.model)
    made.add_to(engine)
    return engine, time.perf_counter() - start


@contextmanager
def uncollected() -> Iterator[None]:
    """What is imported stays to the end: the garbage collector need not walk it again and again, nor at the exit."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def develop(engine: Engine, request: Request, show: Show) -> Result:
    """Runs the request to its end; the generator `engine.stream` returns the result after its last step."""
    told = engine.notes(request)
    for note in told:
        report.note(note)
    stream = engine.stream(request)
    show("reading the prompt")
    start = time.perf_counter()
    while True:
        try:
            step = next(stream)
        except StopIteration as end:
            result: Result = end.value
            for note in result.notes[len(told) :]:  # of what came up on the way
                report.note(note)
            return result
        seconds, start = time.perf_counter() - start, time.perf_counter()
        done = step.index + 1
        show("decoding" if done == step.total else f"step {done}/{step.total}, {seconds:.2f} s", done, step.total)


def write(result: Result, indices: Sequence[int], output: Path | None) -> list[Path]:
    """Saves the pictures `indices` of `result`, each with all that repeats it."""
    if output is None:
        suffix = ".png" if result.request.frames is None else ".gif"
        paths = destination.unused(result.request.prompt, [result.seeds[i] for i in indices], suffix)
    else:
        paths = destination.numbered(output, len(indices))
    for i, path in zip(indices, paths, strict=True):
        result.save_one(i, path)
    return paths


def summary(result: Result, indices: Sequence[int], paths: list[Path], loading: float) -> dict[str, Any]:
    return {
        "paths": [str(path) for path in paths],
        "seeds": [result.seeds[i] for i in indices],
        "request": result.request.to_json(pictures=False),
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
