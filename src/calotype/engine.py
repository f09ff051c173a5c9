"""The public object: a loaded model that turns requests into pictures."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calotype.batch import Batch
from calotype.errors import CalotypeWarning, UsageError
from calotype.lora import Delta, LoRA, Stack, load_lora
from calotype.lora.live import Scale
from calotype.lora.names import MOTION, NETWORKS
from calotype.lora.words import Words
from calotype.nn import motion
from calotype.parts import Habit, Motion, Parts, Stored
from calotype.precision import DTYPES, warn_of_emulation
from calotype.request import Request, adapter_name
from calotype.resolve import Resolved, resolve
from calotype.result import Result, Step
from calotype.run import Run
from calotype.samplers import CONSISTENCY
from calotype.schedule import NoiseSchedule
from calotype.text import inversion
from calotype.weights.control import load_control
from calotype.weights.habits import habit_of
from calotype.weights.load import load_parts
from calotype.weights.motion import beta_schedule_of, load_motion, read_motion, resolve_motion, with_betas

__all__ = ["Engine", "load"]

UNSAID = (
    "the LoRA {!r} changes every layer, as few-step LoRAs do, and does not say how it is used: if it is one, say"
    " sampler, steps and guidance, such as lcm, 4 and 1"
)


class Engine:
    """A model in memory, with its adapters. It keeps nothing of a request, so requests may be interleaved."""

    def __init__(self, parts: Parts, described: dict[str, Any], *, offline: bool = False) -> None:
        self.parts = parts
        self._described = described
        self._offline = offline
        self._controls: dict[str, dict[str, Any]] = {}  # name -> what it was loaded from
        self._embeddings: dict[str, dict[str, Any]] = {}  # token -> what it was loaded from
        self._stack = Stack(parts)
        self._mix: dict[str, float] = {}  # of requests that have none of their own; a request's may be merged just now
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
        return self._resolve(request)[0].request

    def notes(self, request: Request) -> list[str]:
        """A line for each few-step model or adapter that decides something which the request leaves open, or that may
        be one and does not say how it is used; and for what this model will do badly. Raises UsageError.
        """
        return self._resolve(request)[1]

    def _resolve(self, request: Request) -> tuple[Resolved, list[str]]:
        habits, mix = self._habits(request), self._mix_of(request)
        resolved, notes = resolve(self.parts, request, habits)
        asked = (request.sampler, request.steps, request.timesteps, request.guidance)
        if not habits and self.parts.defaults.sampler not in CONSISTENCY and asked == (None,) * len(asked):
            loras = [name for name, scale in mix.items() if scale > 0]
            notes += [UNSAID.format(name) for name in loras if self._stack.loras[name].may_be_few_step]
        return resolved, notes

    def _habits(self, request: Request) -> dict[str, Habit]:
        """The few-step adapters that are in force, by what to call them, and how they like to be used."""
        mix, motion = self._mix_of(request), self.parts.motion
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
            self._merge(run, run.mix)
            with torch.inference_mode():
                run.begin()
            while run.call is not None:
                clock = time.perf_counter()
                with torch.inference_mode():
                    self._merge(run, run.mix)
                    step = run.answer(run.call.answered_by(run.parts.unet))
                run.seconds["denoise"] += time.perf_counter() - clock  # the caller's own time between steps is not ours
                if step is not None:
                    yield step
            with torch.inference_mode():
                while (result := run.develop()) is None:
                    pass
            return result
        finally:
            self._merge_own()

    def batch(self, *, rows: int = 32) -> Batch:
        """Where requests are drawn together. A call of the network has at most so many rows, one for each picture, or
        two where it is guided by real evaluations; or those of a single request.
        """
        return Batch(self._take, self._merge, self._merge_own, self._stack, rows)

    def _take(self, request: Request) -> Run:
        """A run with the adapters of this moment. Raises UsageError."""
        clock = time.perf_counter()
        resolved, notes = self._resolve(request)
        mix, loras = self._mix_of(request), self._stack.loras
        run = Run(self.parts, resolved, notes, mix, {name: loras[name] for name in mix}, self.describe(mix))
        run.seconds["prepare"] += time.perf_counter() - clock
        return run

    def _mix_of(self, request: Request) -> dict[str, float]:
        """The LoRAs that a request is drawn with. Raises UsageError for a name that `add_lora` has not given."""
        if request.loras is None:
            return dict(self._mix)
        self._stack.check_known(request.loras)
        return dict(request.loras)

    def _merge(self, run: Run, mix: Mapping[str, float]) -> None:
        """Puts LoRAs into the weights for a run, where others are there. Raises UsageError if its own are gone."""
        gone = [name for name, lora in run.loras.items() if self._stack.loras.get(name) is not lora]
        if gone or self.parts.motion is not run.parts.motion:
            raise UsageError(
                f"{f'the LoRA {gone[0]!r}' if gone else 'the motion adapter'} was taken away while a request was drawn",
                "let its stream end first",
            )
        if mix != self._stack.mix:
            self._stack.set(mix)

    def _merge_own(self) -> None:
        """Puts the engine's own mix into the weights again."""
        if self._mix != self._stack.mix:
            self._stack.set(self._mix)

    # ---- adapters: whatever cannot be loaded leaves all as it was ----

    @property
    def loras(self) -> dict[str, float]:
        """The LoRAs of requests that have none of their own, {name: scale}: merged into the weights."""
        return dict(self._mix)

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
        self._merge_own()
        self._stack.add(name, lora, scale)
        self._mix = self._stack.mix
        self._words.learn(name, words)
        return name

    def set_loras(self, mix: Mapping[str, float]) -> None:
        """Replaces the whole mix, {name: scale}: negative scales too; {} restores the model bit for bit.

        Raises UsageError for a name that `add_lora` has not given and a scale that is no number.
        """
        self._stack.set(mix)
        self._mix = self._stack.mix

    def remove_lora(self, name: str) -> None:
        """Takes a LoRA out of the mix and forgets it, with the words in its file. Raises UsageError for a name that
        `add_lora` has not given.
        """
        self._merge_own()
        self._stack.remove(name)
        self._mix = self._stack.mix
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
        if name in self._controls:
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
        self._controls[name] = {"ref": str(ref), "subfolder": subfolder, "variant": variant, "revision": revision}
        return name

    def remove_control(self, name: str) -> None:
        """Forgets a control. Raises UsageError for a name that `add_control` has not given."""
        if name not in self._controls:
            raise UsageError(f"there is no control {name!r}: the engine has {', '.join(self._controls) or 'none'}")
        del self._controls[name]
        self.parts = replace(self.parts, controls={n: c for n, c in self.parts.controls.items() if n != name})

    def add_embedding(self, ref: str | Path, token: str | None = None, *, weight_name: str | None = None) -> str:
        """Loads a textual inversion: prompts that hold its token, which is returned, mean what was learnt. A word that
        came with a LoRA gives way to it.

        Raises UsageError where the token is a word already, ModelNotFoundError, CheckpointError.
        """
        learnt = inversion.load_inversion(ref, token, weight_name=weight_name, offline=self._offline)
        self._words.give_way(learnt)
        inversion.add(self.parts.text, learnt)
        self._embeddings[learnt.token] = {"ref": str(ref), "weight_name": weight_name}
        return learnt.token

    def set_motion(
        self, ref: str | Path | None, *, beta_schedule: str | None = None, variant: str | None = None
    ) -> None:
        """Puts a motion adapter into the model, so that requests may have frames; None takes it out again.

        Clips take the betas that the adapter was trained with: linear, unless its config.json or `beta_schedule` says
        otherwise. Pictures keep the model's own.
        Motion LoRAs that do not fit the new adapter go with the old one (CalotypeWarning). Raises ModelNotFoundError,
        CheckpointError where it does not fit the model.
        """
        if ref is None:
            self._exchange_motion(None, {})
            self._described.pop("motion", None)
            return
        adapter = load_motion(
            ref,
            unet=self.parts.unet.config,
            variant=variant,
            offline=self._offline,
            device=self.parts.device,
            dtype=self.parts.dtype,
        )
        path = resolve_motion(ref, variant=variant, offline=self._offline)
        beta_schedule = beta_schedule_of(path) if beta_schedule is None else beta_schedule
        schedule = NoiseSchedule.from_config(with_betas(self.parts.scheduler, beta_schedule))
        habit = habit_of("motion", ref, path)
        self._exchange_motion(Motion(adapter, schedule, habit), {"motion": partial(read_motion, path, variant)})
        self._described["motion"] = {"ref": str(ref), "beta_schedule": beta_schedule, "variant": variant}

    def _exchange_motion(self, new: Motion | None, stored: Mapping[str, Stored]) -> None:
        there = {} if new is None else {name: p.shape for name, p in new.adapter.named_parameters()}
        moving = {name for name, lora in self._stack.loras.items() if _motion_of(lora)}
        fitting = {
            name
            for name in moving
            if all(
                parameter in there and delta.fits(tuple(there[parameter]))
                for parameter, delta in _motion_of(self._stack.loras[name]).items()
            )
        }
        for name in moving - fitting:
            message = f"the LoRA {name!r} goes with the motion adapter that it changes"
            warnings.warn(message, CalotypeWarning, stacklevel=3)
            self.remove_lora(name)
        mix = self._mix
        self._stack.set({name: scale for name, scale in mix.items() if name not in moving})
        motion.detach(self.parts.unet)
        if new is not None:
            motion.attach(self.parts.unet, new.adapter)
        others = {part: read for part, read in self.parts.stored.items() if part != "motion"}
        self.parts = replace(self.parts, motion=new, stored={**others, **stored})
        self._stack.use(self.parts)
        self._stack.set(mix)

    def describe(self, mix: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Which model this is, how it was loaded and what was added: what it takes to load it again.

        mix: of LoRAs, instead of the engine's own.
        """
        loras = {lora.pop("name"): lora for lora in self._stack.describe(self._mix if mix is None else mix)}
        added = {"loras": loras, "controls": dict(self._controls), "embeddings": dict(self._embeddings)}
        return {**self._described, **{what: value for what, value in added.items() if value}}


def _motion_of(lora: LoRA) -> dict[str, Delta]:
    """What a LoRA changes of motion modules, by their parameters' names."""
    return {name: delta for name, delta in lora.deltas.get("unet", {}).items() if MOTION in name}


def load(
    model: str | Path | None = None,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    variant: str | None = None,
    revision: str | None = None,
    prediction: str | None = None,
    offline: bool = False,
) -> Engine:
    """Loads a model: a folder in the diffusers layout, a single .safetensors file, a Hub id[@revision], or (None) the
    shipped one.

    `unet` and `vae` replace those parts by another model's. `device` and `dtype` "auto" mean the GPU in float16 where
    there is one, else the CPU in float32. `prediction` is for single files that do not say what they predict:
    "epsilon", "v_prediction", "sample". `offline` never asks the Hub; nor does HF_HUB_OFFLINE=1.

    Raises ModelNotFoundError, CheckpointError, UsageError.
    """
    where = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}: allowed are auto, {', '.join(DTYPES)}")
    name = ("float32" if where.type == "cpu" else "float16") if dtype == "auto" else dtype
    if name == "bfloat16":
        warn_of_emulation(where, "dtype bfloat16", "float32")
    refs = {key: None if ref is None else str(ref) for key, ref in (("model", model), ("unet", unet), ("vae", vae))}
    parts = load_parts(
        refs["model"],
        unet=refs["unet"],
        vae=refs["vae"],
        variant=variant,
        revision=revision,
        prediction=prediction,
        offline=offline,
        device=where,
        dtype=DTYPES[name],
    )
    described = {
        **refs,
        "variant": variant,
        "revision": revision,
        "prediction": prediction,
        "device": str(where),
        "dtype": name,
    }
    return Engine(parts, {**described, "family": parts.family}, offline=offline)


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device is {name!r}: not usable here ({str(error).splitlines()[0]})", hint="try auto or cpu"
        ) from None
    return device
