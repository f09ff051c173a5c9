"""The README.md of what was distilled: a model card, made of what is known of the run and of nothing else."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from calotype.training.settings import Settings

Row = Mapping[str, Any]  # settings by name, and under "from_step" the step from which on they held

OBJECTIVES = {
    "lcd": ("latent consistency distillation", "2310.04378"),
    "lcf": ("latent consistency fine-tuning", "2310.04378"),
    "pcm": ("phased consistency distillation", "2405.18407"),
    "tcd": ("trajectory consistency distillation", "2402.19159"),
}
# How diffusers draws what was trained for a sampler of ours: its scheduler, what that takes beside the model's noise
# levels, and what the pipeline's call takes. TCD's noise is off in diffusers unless it is asked for: 0.3, as in ours.
PEERS: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "lcm": ("LCMScheduler", {}, {}),
    "tcd": ("TCDScheduler", {}, {"eta": 0.3}),
    "ddim": (
        "DDIMScheduler",
        {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False},
        {},
    ),
}


@dataclass(frozen=True)
class Run:
    """What its trainer knows of a run when it ends."""

    teacher: str  # as the user named it
    history: Sequence[Row]
    step: int  # updates that went into the result
    command: str | None = None  # as one could type it again
    data: str | None = None  # the pictures, as the user named them
    pictures: int | None = None
    loss: float | None = None  # of the last steps
    distances: Sequence[tuple[int, float, float]] = ()  # step, kernel distance of held-out pictures, its standard error
    variant: str | None = None  # of the teacher's weights
    date: str | None = None  # ISO 8601; None: the result is the same whenever it is made


@dataclass(frozen=True)
class Facts:
    """All that a card says. Its texts name no place on one machine; those of `run` may, and are not shown so."""

    run: Run
    name: str  # of the folder
    base: str  # the teacher: a Hub id, or a folder's or file's own name
    data: str | None  # where the pictures are from
    xl: bool  # whether the teacher is built as SDXL is
    steps: int  # to draw in
    guidance: float
    side: int  # pixels
    grid: Sequence[int] = ()  # the timesteps of a phased model, which no other grid will do for
    inpaints: bool = False
    licence: Mapping[str, str] = field(default_factory=dict)  # what the teacher's card says of it, by the card's keys

    @property
    def settings(self) -> dict[str, Any]:
        """The run's last ones, those that it did not know yet at their defaults."""
        return settings_of(self.run.history)


def settings_of(history: Sequence[Row]) -> dict[str, Any]:
    """A run's last settings, all of them: an older run knew fewer, which are as they then were, at their defaults."""
    last = history[-1]
    return _defaults(last) | {name: value for name, value in last.items() if name != "from_step"}


def card(facts: Facts) -> str:
    """The card, in Markdown behind YAML that the Hub reads. The same facts give the same text."""
    return "\n".join(
        [*_front(facts), "", *_title(facts), *_making(facts), *_figures(facts), *_use(facts), *_limits(facts)]
    )


def _front(facts: Facts) -> Iterator[str]:
    lora, objective = facts.settings["lora"], facts.settings["objective"]
    tags = ["lcm-lora", "lora"] if lora else ["latent-consistency-model"]
    tags += {"pcm": ["phased-consistency-model"], "tcd": ["trajectory-consistency-distillation"]}.get(objective, [])
    tags += ["inpainting"] if facts.inpaints else []
    entries: dict[str, object] = {
        "base_model": facts.base.partition("@")[0],
        "base_model_relation": "adapter" if lora else "finetune",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [*tags, "lcm", "stable-diffusion", "calotype"],
        **facts.licence,
    }
    yield "---"
    yield from (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items())  # JSON is YAML
    yield "---"


def _title(facts: Facts) -> Iterator[str]:
    yield f"# {facts.name}"
    yield ""
    if facts.settings["lora"]:
        does = "repaint" if facts.inpaints else "make"
        yield f"A LoRA that lets `{facts.base}`, and models of its kind, {does} pictures in about {facts.steps} steps."
    else:
        yield f"A latent consistency model: it does what `{facts.base}` does, in about {facts.steps} steps."
    yield ""


# ---- how it was made ----


def _making(facts: Facts) -> Iterator[str]:
    run, settings = facts.run, facts.settings
    how, paper = OBJECTIVES[settings["objective"]]
    yield "## How it was made"
    yield ""
    what = (
        f"a LoRA of rank {settings['lora_rank']}" if settings["lora"] else "the whole U-Net, with a guidance embedding"
    )
    yield f"By `calotype distill`: {how} ([arXiv {paper}](https://arxiv.org/abs/{paper}))."
    yield f"Trained was {what}, in {run.step:,} updates of {_batch(settings)} pictures each."
    yield ""
    yield "- Teacher: `" + facts.base + "`"
    if facts.data is not None or run.pictures is not None:
        count = "pictures" if run.pictures is None else f"{run.pictures:,} pictures"
        yield f"- Data: {count} with captions" + ("" if facts.data is None else f", from `{facts.data}`")
    for row in run.history:
        since = f"from step {row['from_step']:,} on" if len(run.history) > 1 and "from_step" in row else ""
        yield f"- Settings that are not the default{since and ', '}{since}: {_changed(row)}"
    yield ""
    if run.command is not None:
        yield from ("```sh", portable(run.command), "```", "")


def _batch(settings: Row) -> int:
    sizes: list[int] = [settings[name] for name in ("train_batch_size", "gradient_accumulation_steps")]
    return math.prod(sizes) * int(settings.get("processes", 1))


def _changed(row: Row) -> str:
    usual = _defaults(row)
    usual["validation_steps"] = row.get("checkpointing_steps", usual["checkpointing_steps"])  # which it follows
    usual["sampler"] = row.get("sampler")  # is said where the result is used
    said = [f"`{name}` {row[name]}" for name in usual if name != "lora" and row.get(name, usual[name]) != usual[name]]
    return ", ".join(said) or "none"


def _defaults(row: Row) -> dict[str, Any]:
    return asdict(Settings(lora=bool(row.get("lora", False))))


def portable(command: str) -> str:
    """A command without the places of one machine: of a path from the root or from home, its last name is left."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation mark that is not closed: no command, so that every path in it goes
        return re.sub(r"(?<![\w.:])[~/][^\s'\"]*/", "", command)
    return shlex.join(_without_place(word) for word in words)


def _without_place(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    if not value.startswith(("/", "~")):
        return word
    return f"{option}{equals}{value.rstrip('/').rpartition('/')[2]}"


# ---- figures ----


def _figures(facts: Facts) -> Iterator[str]:
    run = facts.run
    has_loss = run.loss is not None and math.isfinite(run.loss)  # a run that had nothing left to do has none
    if not run.distances and not has_loss:
        return
    yield "## Figures"
    yield ""
    if has_loss:
        yield f"Loss at the end: {run.loss:.4g}."
        yield ""
    if run.distances:
        yield "Kernel distance of the pictures of held-out captions to the teacher's, as `calotype eval` measures it;"
        yield "less is better."
        yield ""
        yield "| step | distance |"
        yield "|---:|---:|"
        for step, distance, error in run.distances:
            here = " (this one)" if step == run.step else ""
            yield f"| {step:,}{here} | {distance:.4g} ± {error:.2g} |"
        yield ""


# ---- how to use it ----


def _use(facts: Facts) -> Iterator[str]:
    yield "## How to use it"
    yield ""
    yield "In calotype:"
    yield ""
    yield from ("```python", *_ours(facts), "```", "")
    yield "In diffusers:"
    yield ""
    yield from ("```python", *_theirs(facts), "```", "")
    if facts.settings["lora"]:
        yield "`kohya_lora_weights.safetensors` is the same LoRA under the names of kohya's scripts, for programs that"
        yield "want those: ComfyUI, A1111, Forge."
        yield ""


def _ours(facts: Facts) -> Iterator[str]:
    lora, sampler = facts.settings["lora"], facts.settings["sampler"]
    how: dict[str, object] = {"timesteps": [*facts.grid]} if lora and facts.grid else {"steps": facts.steps}
    how |= {"guidance": facts.guidance, "seed": 0, **({"sampler": sampler} if lora else {})}
    yield "import calotype"
    if facts.inpaints:
        yield "from PIL import Image"
    yield ""
    yield f"engine = calotype.load({_text(facts.base if lora else facts.name)})"
    if lora:
        yield f"engine.add_lora({_text(facts.name)}, name={_text('lcm')})"
    if facts.inpaints:
        yield 'photo, mask = Image.open("photo.png"), Image.open("mask.png")  # white is repainted'
    pictures = "image=photo, mask=mask, " if facts.inpaints else ""
    yield f'result = engine("a red fox in the snow", {pictures}{_arguments(how)})'
    yield 'result.image.save("fox.png")'


def _theirs(facts: Facts) -> Iterator[str]:
    lora = facts.settings["lora"]
    scheduler, options, call = PEERS[facts.settings["sampler"]]
    single = lora and facts.base.endswith(".safetensors")
    loader = _pipeline_of(facts) if single else "DiffusionPipeline"
    yield "import torch"
    yield f"from diffusers import {', '.join(sorted([loader, *([scheduler] if lora else [])]))}"
    if facts.inpaints:
        yield "from PIL import Image"
    yield ""
    base = facts.base.partition("@")[0] if lora else facts.name
    yield f"pipe = {loader}.from_{'single_file' if single else 'pretrained'}({_text(base)})"
    if lora:
        arguments = "".join(f", {name}={value!r}" for name, value in options.items()).replace("'", '"')
        yield f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{arguments})"
        yield f'pipe.load_lora_weights({_text(facts.name)}, weight_name="pytorch_lora_weights.safetensors")'
    how: dict[str, object] = {"num_inference_steps": facts.steps, "guidance_scale": facts.guidance, **call}
    if facts.inpaints:
        yield 'photo, mask = Image.open("photo.png"), Image.open("mask.png")  # white is repainted'
        yield "how = dict(image=photo, mask_image=mask, width=photo.width, height=photo.height)"
    else:
        yield f"how = dict(width={facts.side}, height={facts.side})"
    yield 'generator = torch.Generator("cpu").manual_seed(0)'
    yield f'result = pipe("a red fox in the snow", {_arguments(how)}, generator=generator, **how)'
    yield 'result.images[0].save("fox.png")'


def _pipeline_of(facts: Facts) -> str:
    return f"StableDiffusion{'XL' if facts.xl else ''}{'Inpaint' if facts.inpaints else ''}Pipeline"


def _arguments(values: Row) -> str:
    return ", ".join(f"{name}={_text(value) if isinstance(value, str) else value}" for name, value in values.items())


def _text(value: str) -> str:
    """A text as it stands in a program."""
    return json.dumps(value, ensure_ascii=False)


# ---- what it is not for ----


def _limits(facts: Facts) -> Iterator[str]:
    settings = facts.settings
    low, high = 1 + settings["w_min"], 1 + settings["w_max"]
    yield "## Limits"
    yield ""
    if settings["objective"] == "pcm":
        yield f"- It was trained for {facts.steps} steps, and makes no good pictures in another number of them."
    else:
        yield f"- It is made for 2 to 8 steps; {facts.steps} are a good start. More steps do not make it better."
    if settings["lora"] and facts.guidance == 1:
        yield f"- Guidance from {low:g} to {high:g} was distilled in: draw at 1 (none), or little above it."
    else:
        yield f"- Guidance is an input of the network, from {low:g} to {high:g}; negative prompts have no effect."
    if settings["lora"]:
        yield f"- It fits `{facts.base}` and models that were made of the same one, no other family."
    yield f"- It was trained at {facts.side} x {facts.side} pixels, or as many in other shapes."
    yield "- It cannot draw what its teacher cannot, has the teacher's biases, and less variety."
    yield "- It brings no safety checker."
    yield "- The licences of the teacher and of the pictures may restrict what it is used for."
    yield ""
