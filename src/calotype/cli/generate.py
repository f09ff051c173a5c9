"""calotype generate: a prompt in, pictures out."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calotype.cli import adapters, destination, parse, report
from calotype.cli.options import argument, given, of, option, switch, taking
from calotype.cli.progress import Show, progress
from calotype.cli.show import recorded
from calotype.description import Description
from calotype.errors import CalotypeWarning, UsageError
from calotype.request import Request

if TYPE_CHECKING:
    from calotype import Engine, Result

STDIN_LIMIT = 1_000_000  # characters: an endless stream must not fill the memory


LOADING = [
    option("model", str, "Hub id, folder or file (the shipped model).", metavar="M"),
    option("unet", str, "Take the U-Net from this model.", metavar="U"),
    option("vae", str, "Take the autoencoder from this model.", metavar="V"),
    option("tiny_vae", str, "A TAESD, for --decoder tiny.", metavar="V"),
    option("decoder", str, "full, or tiny: quicker, with less detail.", metavar="NAME"),
    option("variant", str, "Which weight files, such as fp16.", metavar="NAME"),
    option("revision", str, "Branch, tag or commit on the Hub.", metavar="REV"),
    option("prediction", str, "What a single file predicts, if it does not say.", metavar="KIND"),
]
RUNNING = [
    option("device", str, "auto, cpu, cuda, mps.", metavar="D"),
    option("dtype", str, "auto, float32, bfloat16, float16.", metavar="T"),
    option("optimize", str, "auto, none, or steps: heap,channels-last,packed.", metavar="S,..."),
]
ADDING = [
    option("lora", list[str], "A LoRA; may be repeated.", metavar="REF[:SCALE]"),
    option(
        "control",
        list[str],
        "A ControlNet or T2I-Adapter; =canny:IMAGE finds the edges; may be repeated.",
        metavar="REF=IMAGE[:SCALE]",
    ),
    option("embedding", list[str], "A textual inversion; may be repeated.", metavar="REF[=TOKEN]"),
    option("motion", str, "A motion adapter, for --frames.", metavar="REF"),
]


def asked(name: str, *flags: str, kind: Any = None) -> Parameter:
    """The option of a request's field: None where it is not given, as the file of --like may give it."""
    return of(Request, name, *flags, kind=kind, default=None)


@taking(
    [
        argument("prompt", str, "What to draw; - reads it from stdin."),
        option("output", Path, "The file to write (named after prompt and seed).", "--output", "-o", metavar="FILE"),
        *LOADING,
        asked("steps"),
        asked("guidance"),
        asked("guidance_steps"),
        asked("seed"),
        option("size", str, "Size in pixels, multiples of 8.", metavar="WxH"),
        asked("n", "-n"),
        asked("negative_prompt", "--negative"),
        asked("image", kind=Path),
        asked("strength", kind=float),
        asked("mask", kind=Path),
        asked("mask_feather"),
        asked("mask_crop"),
        asked("resize"),
        *ADDING,
        asked("frames"),
        asked("fps"),
        asked("sampler"),
        asked("gamma"),
        asked("spacing"),
        asked("guidance_mode"),
        asked("timesteps"),
        asked("clip_skip"),
        asked("emphasis", "--emphasis/--no-emphasis"),
        option("like", Path, "Repeat the request in this file; other options change it.", metavar="FILE"),
        *RUNNING,
        switch("offline", "Use only models that are on this machine."),
        switch("as_json", "Print one JSON object instead of paths.", "--json"),
        switch("quiet", "No progress.", "--quiet", "-q"),
    ]
)
def generate(output: Path | None, like: Path | None, offline: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Draw a prompt: writes picture files and prints their paths."""
    told = given(**options)
    models = {each.name: told[each.name] for each in (*LOADING, *RUNNING) if each.name in told}
    asked_for, extras = request_fields(told), added(told)
    if "control" in told:
        extras["controls"], asked_for["controls"] = adapters.controls(told["control"], told.get("frames"))
    job = new_job(asked_for, models, extras) if like is None else job_like(like, asked_for, models, extras)
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


def request_fields(told: Mapping[str, Any]) -> dict[str, Any]:
    """A request's fields out of the options that were given: pictures opened, texts parsed."""
    found = {each.name: told[each.name] for each in dataclasses.fields(Request) if each.name in told}
    if found.get("prompt") == "-":
        found["prompt"] = read_stdin()
    if "size" in told:
        found["width"], found["height"] = parse.size(told["size"])
    if "timesteps" in found:
        found["timesteps"] = parse.timesteps(found["timesteps"])
    for name, frames in (("image", found.get("frames")), ("mask", None)):
        if name in found:
            found[name] = parse.picture(found[name], frames)
    return found


def added(told: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be put into the engine beside the model."""
    return given(
        loras=adapters.loras(told["lora"]) if "lora" in told else None,
        embeddings=adapters.embeddings(told["embedding"]) if "embedding" in told else None,
        motion={"ref": told["motion"]} if "motion" in told else None,
    )


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


def read_stdin() -> str:
    """The prompt from stdin, without the newline that ends it."""
    try:
        text = sys.stdin.read(STDIN_LIMIT + 1)
    except UnicodeDecodeError as error:
        raise UsageError("the prompt on stdin is not text", hint="it must be UTF-8") from error
    if len(text) > STDIN_LIMIT:
        raise UsageError(f"the prompt on stdin is longer than {STDIN_LIMIT} characters")
    return text.removesuffix("\n")
