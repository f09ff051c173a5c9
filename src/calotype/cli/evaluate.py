"""calotype eval: how far a model's few-step pictures are from its teacher's."""

from __future__ import annotations

import itertools
import json
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer

from calotype.atomic import user_cache
from calotype.cli import adapters, destination
from calotype.cli import eval_report as report
from calotype.cli.progress import Show, progress
from calotype.description import Description
from calotype.errors import UsageError

if TYPE_CHECKING:
    from calotype import Engine
    from calotype.parts import Parts
    from calotype.training.clip import Judge
    from calotype.training.evaluate import Table

PROMPTS = "prompts.txt"  # beside or in the teacher's folder
TRAINING = "training.json"  # beside a LoRA: how it was made


class Asked(TypedDict, total=False):
    """What is left out is the model's own; the teacher's guidances are then the model's."""

    samplers: tuple[str, ...]
    guidances: tuple[float, ...]
    teacher_guidances: tuple[float, ...]


def evaluate(
    model: Annotated[str, typer.Argument(help="The few-step model: folder or Hub id.", show_default=False)],
    teacher: Annotated[
        str,
        typer.Option(metavar="T", help="What it was distilled from: folder or Hub id.", show_default=False),
    ],
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="REF[:SCALE]", help="LoRA to put into the model, not the teacher; may be repeated."),
    ] = None,
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
        str | None, typer.Option(metavar="NAME,...", help="The model's: lcm, tcd, ddim, euler [default: its own].")
    ] = None,
    guidance: Annotated[
        str | None, typer.Option(metavar="G,...", help="Guidance scales to try [default: the model's own].")
    ] = None,
    teacher_guidance: Annotated[
        str | None,
        typer.Option(metavar="G,...", help="The teacher's: one, or one for each of --guidance [default: the same]."),
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A CLIP, as transformers writes it: adds CLIP score and Frechet distance."),
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
    teacher's in 50 steps; and what they cost: evaluations, seconds, memory. Every combination of steps, sampler and
    guidance is a row. The teacher's pictures are kept, and an interrupted run goes on where it was.

    A LoRA that has a training.json beside it says by which sampler and at which guidance it is to be measured.
    """
    added = adapters.loras(lora or [])
    asked = trained([each["ref"] for each in added.values()]) | given(sampler, guidance, teacher_guidance)
    counts = parse_steps(steps)
    texts = read_prompts(prompts if prompts is not None else find_prompts(teacher, teacher_unet), samples)
    check_requests(texts, counts, asked, seed)
    if output is not None:
        destination.check(output, 1)
    folder = default_cache() if cache is None else cache

    import calotype

    with progress(quiet=quiet) as show:
        show("loading")
        where = {"device": device, "dtype": dtype, "offline": offline}
        student = calotype.load(model, **where)  # type: ignore[arg-type]
        Description(loras=added).add_to(student)
        # Loaded anew even where it is the same model: the LoRAs are in the student's weights alone.
        origin = calotype.load(teacher, unet=teacher_unet, **where)  # type: ignore[arg-type]
        judge = None if clip is None else load_judge(clip, origin.parts)
        rest = {"steps": counts, "seed": seed, "batch": batch, "cache": folder, "judge": judge}
        table = measure(fast(student), fast(origin), texts, {**asked, **rest}, show)
    if output is not None:
        report.draw_grid(table, texts, output)
    typer.echo(json.dumps(table.to_json()) if as_json else "\n".join(report.lines(table)))


def fast(engine: Engine) -> Parts:
    """Channels last in memory, where no steps were taken: quicker convolutions, which round differently."""
    import torch

    parts = engine.parts
    if engine.optimizations:
        return parts
    parts.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return parts


def load_judge(folder: Path, teacher: Parts) -> Judge:
    """The CLIP of a folder, on the teacher's device. CheckpointError."""
    from calotype.training.clip import Judge

    return Judge.load(folder, teacher.device)


def measure(student: Parts, teacher: Parts, prompts: Sequence[str], options: dict[str, Any], show: Show) -> Table:
    """Runs the evaluation to its end, showing where it is. `options` are those of training.evaluate."""
    from calotype.training import evaluate as training

    for event in training.evaluate(student, teacher, prompts, **options):
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


def given(sampler: str | None, guidance: str | None, teacher_guidance: str | None) -> Asked:
    """What was said of samplers and guidances."""
    asked: Asked = {}
    if sampler is not None:
        asked["samplers"] = tuple(name.strip() for name in sampler.split(","))
    if guidance is not None:
        asked["guidances"] = parse_numbers("--guidance", guidance)
    if teacher_guidance is not None:
        asked["teacher_guidances"] = parse_numbers("--teacher-guidance", teacher_guidance)
    return asked


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        message = f"{option} must be numbers with commas between them, not {reprlib.repr(text)}"
        raise UsageError(message, hint=f"for example {option} 4,8") from None


def trained(references: Sequence[str]) -> Asked:
    """How a LoRA of `calotype distill` is to be measured: the first of these that has a training.json beside it.

    Guidance was distilled into it, w from w_min to w_max, which is guidance less 1: so it runs without, and stands
    beside a teacher at the middle. {} where no LoRA has such a file; UsageError where it can't be understood.
    """
    for reference in references:
        path = Path(reference) if Path(reference).is_dir() else Path(reference).parent
        file = path / TRAINING
        if Path(reference).exists() and file.is_file():
            try:
                last = json.loads(file.read_text("utf-8"))[-1]
                middle = 1 + (float(last["w_min"]) + float(last["w_max"])) / 2
                return {"samplers": (f"{last['sampler']}",), "guidances": (1.0,), "teacher_guidances": (middle,)}
            except (OSError, ValueError, LookupError, TypeError):
                raise UsageError(
                    f"{str(file)!r} is not what calotype distill writes: a list of settings, w_min, w_max and sampler",
                    hint="move it away, and give --sampler, --guidance and --teacher-guidance",
                ) from None
    return {}


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


def check_requests(prompts: Sequence[str], steps: Sequence[int], asked: Asked, seed: int) -> None:
    """Raises UsageError for what no request may have, before anything is loaded."""
    from calotype.request import Request

    for prompt in dict.fromkeys(prompts):
        Request(prompt, seed=seed)
    for count in steps:
        Request("", steps=count)
    for sampler in asked.get("samplers", ()):
        Request("", sampler=sampler)
    for guidance in (*asked.get("guidances", ()), *asked.get("teacher_guidances", ())):
        Request("", guidance=guidance)


def default_cache() -> Path:
    return user_cache("eval")
