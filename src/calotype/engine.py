"""The public object: a loaded model that turns requests into pictures."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calotype.batch import Batch
from calotype.description import PARTS, Description
from calotype.errors import CalotypeWarning, UsageError
from calotype.hashes import File
from calotype.lora import Stack, load_lora
from calotype.lora.live import Scale
from calotype.lora.names import NETWORKS, networks
from calotype.lora.words import Words
from calotype.optimize import Optimized, chosen
from calotype.optimize.step import Optimization
from calotype.parts import Habit, Motion, Parts, Stored
from calotype.precision import DTYPES, automatic, device_of, warn_of_emulation
from calotype.request import Request, adapter_name
from calotype.resolve import Resolved, resolve
from calotype.result import Result, Step
from calotype.rules import Choice, blaming
from calotype.run import Run
from calotype.samplers import CONSISTENCY
from calotype.schedule import NoiseSchedule
from calotype.text import inversion
from calotype.weights.control import load_control
from calotype.weights.habits import habit_of
from calotype.weights.load import load_parts
from calotype.weights.motion import beta_schedule_of, load_motion, read_motion, resolve_motion, with_betas

__all__ = ["Engine", "load", "load_from"]

DECODERS = ("full", "tiny")
UNSAID = (
    "the LoRA {!r} changes every layer, as few-step LoRAs do, and does not say how it is used: if it is one, say"
    " sampler, steps and guidance, such as lcm, 4 and 1"
)


class Engine:
    """A model in memory, with its adapters. It keeps nothing of a request, so requests may be interleaved."""

    def __init__(
        self, parts: Parts, model: Mapping[str, Any], *, offline: bool = False, steps: Iterable[Optimization] = ()
    ) -> None:
        self.parts = parts
        files = {part: File.of(model.get(part)) for part in PARTS}
        self._made = Description(model, parts.family, {part: file for part, file in files.items() if file is not None})
        self._offline = offline
        self._stack = Stack(parts)
        self._optimized = Optimized(steps)
        self._stack.before_writing.append(self._optimized.expect)
        self._stack.when_written.append(self._optimized.refresh)
        self._optimize()
        self._words = Words(parts.text)

    def __call__(self, prompt: str | Request, **fields: Any) -> Result:
        """Draws a prompt. `fields` are those of Request: steps, guidance, seed, n, width, height, ...

        Raises UsageError for what cannot be carried out.
        """
        given = vars(prompt) if isinstance(prompt, Request) else {"prompt": prompt}
        stream = self.stream(Request.from_json({**given, **fields}))
        while True:
            try:
                next(stream)
            except StopIteration as end:
                result: Result = end.value
                return result

    def resolve(self, request: Request) -> Request:
        """The request with this model's defaults, and a seed, where it leaves them open.

        A few-step adapter that is in force, or a few-step model, brings its own sampler, steps and guidance (`notes`
        says which). Raises UsageError, also where two adapters contradict each other in what is left open.
        """
        return self._resolve(request, self._mix_of(request))[0].request

    def notes(self, request: Request) -> list[str]:
        """A line for each few-step model or adapter that decides something which the request leaves open, or that may
        be one and does not say how it is used; and for what this model will do badly. Raises UsageError.
        """
        return self._resolve(request, self._mix_of(request))[1]

    def _resolve(self, request: Request, mix: Mapping[str, float]) -> tuple[Resolved, list[str]]:
        habits = self._habits(request, mix)
        resolved, notes = resolve(self.parts, request, habits)
        asked = (request.sampler, request.steps, request.timesteps, request.guidance)
        if not habits and self.parts.defaults.sampler not in CONSISTENCY and asked == (None,) * len(asked):
            loras = [name for name, scale in mix.items() if scale > 0]
            notes += [UNSAID.format(name) for name in loras if self._stack.loras[name].may_be_few_step]
        return resolved, notes

    def _habits(self, request: Request, mix: Mapping[str, float]) -> dict[str, Habit]:
        """The few-step adapters that are in force, by what to call them, and how they like to be used."""
        motion = self.parts.motion
        habits = {
            f"the LoRA {name!r}": lora.habit
            for name, lora in self._stack.loras.items()
            if lora.habit is not None and mix.get(name, 0.0) > 0
        }
        if request.frames is not None and motion is not None and motion.habit is not None:
            habits["the motion adapter"] = motion.habit
        return habits

    def stream(self, request: Request) -> Generator[Step, None, Result]:
        """The steps of a request as they are made; the generator's return value is the Result.

        The adapters are those of this moment, whatever is set while it runs; streams may be interleaved. Raises
        UsageError, also at the step before which a LoRA of it or the motion adapter was taken away.
        """
        return self._stream(self._take(request))

    def _stream(self, run: Run) -> Generator[Step, None, Result]:
        try:
            with torch.inference_mode():
                run.merge(self._stack)
                run.begin()
            while run.call is not None:
                clock = time.perf_counter()
                with torch.inference_mode():
                    run.merge(self._stack)
                    step = run.answer(run.call.answered_by(run.parts.unet))
                run.seconds["denoise"] += time.perf_counter() - clock  # the caller's own time between steps is not ours
                if step is not None:
                    yield step
            with torch.inference_mode():
                while (result := run.develop()) is None:
                    pass
            return result
        finally:
            self._stack.restore()

    def batch(self, *, rows: int = 32) -> Batch:
        """Where requests are drawn together. A call of the network has at most so many rows, one for each picture, or
        two where it is guided by real evaluations; or those of a single request.
        """
        return Batch(self._take, self._stack, rows)

    def _take(self, request: Request) -> Run:
        """A run with the adapters of this moment. Raises UsageError."""
        clock = time.perf_counter()
        mix, loras = self._mix_of(request), self._stack.loras
        resolved, notes = self._resolve(request, mix)
        tiny = self.parts.tiny_vae if self.decoder == "tiny" else None
        vae, taken = self.parts.vae if tiny is None else tiny, {name: loras[name] for name in mix}
        run = Run(self.parts, vae, resolved, notes, mix, taken, self._describe(mix))
        run.seconds["prepare"] += time.perf_counter() - clock
        return run

    def _mix_of(self, request: Request) -> dict[str, float]:
        """The LoRAs that a request is drawn with. Raises UsageError for a name that `add_lora` has not given."""
        if request.loras is None:
            return self._stack.mix
        with blaming("loras"):
            self._stack.check_known(request.loras)
        return dict(request.loras)

    # ---- adapters: whatever cannot be loaded leaves all as it was ----

    @property
    def decoder(self) -> str:
        """What decodes pictures: "full", or "tiny" (quicker, with less detail). Previews are by the tiny one if there
        is one.
        """
        return str(self._made.model.get("decoder") or "full")

    @decoder.setter
    def decoder(self, name: str) -> None:
        """Raises UsageError for another name, and where there is no tiny one."""
        Choice(DECODERS)("decoder", name)
        if name == "tiny" and self.parts.tiny_vae is None:
            raise UsageError("decoder is 'tiny', and the model has no tiny autoencoder", "tiny_vae=... gives it one")
        self._made = replace(self._made, model={**self._made.model, "decoder": name})

    @property
    def loras(self) -> dict[str, float]:
        """The LoRAs of requests that have none of their own, {name: scale}: merged into the weights."""
        return self._stack.mix

    def add_lora(
        self,
        ref: str | Path,
        name: str | None = None,
        *,
        weight_name: str | None = None,
        revision: str | None = None,
        scale: float = 1.0,
    ) -> str:
        """Loads a LoRA (LoCon, LoHa, LoKr, DoRA, GLoRA, IA3, OFT) and merges it beside the others; returns the name
        that it got. Textual inversions in the same file are added, too.

        `ref` is a .safetensors file, or a folder or Hub id with the file `weight_name`. Raises UsageError where the
        name is taken, ModelNotFoundError, CheckpointError where a key does not fit the model. A word that is known
        already, or cannot be used, is left out (CalotypeWarning).
        """
        name = adapter_name(ref) if name is None else name
        lora = load_lora(ref, self.parts, weight_name=weight_name, revision=revision, offline=self._offline)
        words = self._words.check(name, lora)
        self._stack.add(name, lora, scale)
        self._words.learn(name, words)
        return name

    def set_loras(self, mix: Mapping[str, float]) -> None:
        """Replaces the whole mix, {name: scale}: negative scales too; {} restores the model bit for bit.

        Raises UsageError for a name that `add_lora` has not given and a scale that is no number.
        """
        self._stack.set(mix)

    def remove_lora(self, name: str) -> None:
        """Takes a LoRA out of the mix and forgets it, with the words in its file. Raises UsageError for a name that
        `add_lora` has not given.
        """
        self._stack.remove(name)
        self._words.forget(name, self._stack.loras)

    @contextmanager
    def live_loras(self, mix: Mapping[str, Scale], *, only: Collection[str] = NETWORKS) -> Iterator[None]:
        """Within it, LoRAs act beside the weights, on top of what is merged: none is written, so changing a scale costs
        nothing, and each evaluation a little. A scale is a number, or a tensor with one for each picture of the batch;
        then say `only=("unet",)`, as text is encoded once for all of them.

        Raises UsageError.
        """
        with self._stack.live(mix, only=only):
            yield

    def add_control(
        self,
        ref: str | Path,
        name: str | None = None,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Loads a ControlNet or T2I-Adapter, which is detected, under a name for requests' controls; returns the name.

        Raises UsageError where the name is taken, ModelNotFoundError, CheckpointError where it does not fit the model.
        """
        name = adapter_name(ref) if name is None else name
        if name in self._made.controls:
            raise UsageError(f"there is a control {name!r} already", "choose another name, or remove that one first")
        network = load_control(
            ref,
            unet=self.parts.unet.config,
            base=self.parts.stored.get("unet"),
            downscale=self.parts.vae.config.downscale,
            subfolder=subfolder,
            variant=variant,
            revision=revision,
            offline=self._offline,
            device=self.parts.device,
            dtype=self.parts.dtype,
        )
        self.parts = replace(self.parts, controls={**self.parts.controls, name: network})
        self._optimize()
        told = {"ref": str(ref), "subfolder": subfolder, "variant": variant, "revision": revision}
        self._made = self._made.with_added("controls", name, {**told, "file": File.of(ref)})
        return name

    def remove_control(self, name: str) -> None:
        """Forgets a control. Raises UsageError for a name that `add_control` has not given."""
        self._made = self._made.without("controls", name)
        self.parts = replace(self.parts, controls={n: c for n, c in self.parts.controls.items() if n != name})
        self._optimize()

    @property
    def controls(self) -> tuple[str, ...]:
        """The names that requests call the controls by."""
        return tuple(self._made.controls)

    def add_embedding(
        self, ref: str | Path, token: str | None = None, *, weight_name: str | None = None, revision: str | None = None
    ) -> str:
        """Loads a textual inversion: prompts that hold its token, which is returned, mean what was learnt. A word that
        came with a LoRA gives way to it.

        Raises UsageError where the token is a word already, ModelNotFoundError, CheckpointError.
        """
        learnt = inversion.load_inversion(ref, token, weight_name=weight_name, revision=revision, offline=self._offline)
        self._words.give_way(learnt)
        inversion.add(self.parts.text, learnt)
        told = {"ref": str(ref), "weight_name": weight_name, "revision": revision, "file": learnt.file}
        self._made = self._made.with_added("embeddings", learnt.token, told)
        return learnt.token

    def remove_embedding(self, token: str) -> None:
        """Forgets a textual inversion. Raises UsageError for a token that `add_embedding` has not given."""
        self._made = self._made.without("embeddings", token)
        self._words.remove(token, self._stack.loras)

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The tokens of the textual inversions that were added by themselves; a LoRA's words go with it."""
        return tuple(self._made.embeddings)

    def set_motion(
        self,
        ref: str | Path | None,
        *,
        beta_schedule: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Puts a motion adapter into the model, so that requests may have frames; None takes it out again.

        Clips take the betas that the adapter was trained with: linear, unless its config.json or `beta_schedule` says
        otherwise. Pictures keep the model's own.
        Motion LoRAs that do not fit the new adapter go with the old one (CalotypeWarning). Raises ModelNotFoundError,
        CheckpointError where it does not fit the model.
        """
        if ref is None:
            self._exchange_motion(None, {})
            self._made = replace(self._made, motion=None)
            return
        path = resolve_motion(ref, variant=variant, revision=revision, offline=self._offline)
        unet, device, dtype = self.parts.unet.config, self.parts.device, self.parts.dtype
        adapter = load_motion(path, unet=unet, variant=variant, device=device, dtype=dtype)
        beta_schedule = beta_schedule_of(path) if beta_schedule is None else beta_schedule
        schedule = NoiseSchedule.from_config(with_betas(self.parts.scheduler, beta_schedule))
        habit = habit_of("motion", ref, path)
        self._exchange_motion(Motion(adapter, schedule, habit), {"motion": partial(read_motion, path, variant)})
        told = {"ref": str(ref), "beta_schedule": beta_schedule, "variant": variant, "revision": revision}
        self._made = replace(self._made, motion={**told, "file": File.of(ref)})

    def _exchange_motion(self, new: Motion | None, stored: Mapping[str, Stored]) -> None:
        for name in self._stack.misfits(None if new is None else new.adapter):
            message = f"the LoRA {name!r} goes with the motion adapter that it changes"
            warnings.warn(message, CalotypeWarning, stacklevel=3)
            self.remove_lora(name)
        others = {part: read for part, read in self.parts.stored.items() if part != "motion"}
        self.parts = replace(self.parts, motion=new, stored={**others, **stored})
        self._stack.exchange_motion(self.parts)
        self._optimize()

    def _optimize(self) -> None:
        controls = {f"control {name}": network for name, network in self.parts.controls.items()}
        vaes = {"vae": self.parts.vae} | ({"tiny_vae": self.parts.tiny_vae} if self.parts.tiny_vae is not None else {})
        self._optimized.cover({**networks(self.parts), **vaes, **controls}, self.parts.stored)

    @property
    def optimizations(self) -> tuple[str, ...]:
        """The steps that were taken on the networks, by name."""
        return tuple(step.name for step in self._optimized.steps)

    def describe(self) -> dict[str, Any]:
        """Which model this is, how it was loaded and what was added, as JSON: what `calotype.load_from` takes.

        Single files are named by their SHA-256 as well, which is found now: a second or a few for a gigabyte, and kept
        on this machine for the next time. LoRAs that are not in the mix have a scale of 0.
        """
        return self._describe({**dict.fromkeys(self._stack.loras, 0.0), **self._stack.mix}).to_json()

    def _describe(self, mix: Mapping[str, float]) -> Description:
        """What a picture with these LoRAs is made of."""
        return replace(self._made, loras=self._stack.describe(mix))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(load_from, offline=self._offline), (self.describe(),)


def load(
    model: str | Path | None = None,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    tiny_vae: str | Path | None = None,
    decoder: str = "full",
    device: str = "auto",
    dtype: str = "auto",
    variant: str | None = None,
    revision: str | None = None,
    prediction: str | None = None,
    optimize: str | Sequence[str] = "auto",
    offline: bool = False,
) -> Engine:
    """Loads a model: a folder in the diffusers layout, a single .safetensors file, a Hub id[@revision], or (None) the
    shipped one.

    `unet` and `vae` replace those parts by another model's. `tiny_vae` is a TAESD for previews, and for results where
    `decoder` is "tiny"; a folder may have one as `tiny_vae`. `device` and `dtype` "auto" mean the GPU in float16 where
    there is one, else the CPU: in bfloat16 where the processor multiplies that itself and the model is not a small one,
    else in float32. `optimize` is "auto", "none", or the steps of calotype.optimize to take: none changes a picture but
    by rounding. `prediction` is for single files that do not say what they predict:
    "epsilon", "v_prediction", "sample". `offline` never asks the Hub; nor does HF_HUB_OFFLINE=1.

    Raises ModelNotFoundError, CheckpointError, UsageError.
    """
    where = device_of(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}: allowed are auto, {', '.join(DTYPES)}")
    if dtype == "bfloat16":
        warn_of_emulation(where, "dtype bfloat16", "float32")
    steps: tuple[Optimization, ...] = ()

    def suited(parameters: int) -> torch.dtype:
        nonlocal steps
        found = automatic(where, parameters) if dtype == "auto" else DTYPES[dtype]
        steps = chosen(optimize, where, found, parameters)
        for step in steps:
            step.begin()
        return found

    named = {"model": model, "unet": unet, "vae": vae, "tiny_vae": tiny_vae}
    refs = {key: None if ref is None else str(ref) for key, ref in named.items()}
    parts = load_parts(
        refs["model"],
        unet=refs["unet"],
        vae=refs["vae"],
        tiny_vae=refs["tiny_vae"],
        variant=variant,
        revision=revision,
        prediction=prediction,
        offline=offline,
        device=where,
        dtype=suited,
        unread=lambda network: frozenset().union(*(step.unread(network) for step in steps)),
    )
    described = {**refs, "variant": variant, "revision": revision, "prediction": prediction}
    described |= {"device": str(where), "dtype": str(parts.dtype).removeprefix("torch.")}
    told = optimize if isinstance(optimize, str) else ",".join(optimize)
    engine = Engine(parts, {**described, "optimize": told}, offline=offline, steps=steps)
    engine.decoder = decoder
    return engine


def load_from(description: Mapping[str, Any], *, search: Sequence[str | Path] = (), offline: bool = False) -> Engine:
    """Loads the engine that `engine.describe()` or a picture's metadata describes, with all that was added to it.

    A single file must be the one that was used then, by its SHA-256. One that was moved is looked for by its name and
    hash in the folders `search` and below them.

    Raises UsageError where the description is damaged, ModelNotFoundError, also for a file that is another by now,
    CheckpointError.
    """
    made = Description.of(description).found(search)
    engine = load(**made.model, offline=offline)
    made.add_to(engine)
    return engine
