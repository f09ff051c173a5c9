"""The adapters that are in force on a model: merged into its weights for plain inference, or live beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from calotype.errors import CheckpointError, UsageError
from calotype.lora.deltas import LoRA
from calotype.lora.live import Scale, Term, hook, term
from calotype.lora.names import MOTION, NETWORKS, networks, own_rows
from calotype.nn import motion
from calotype.nn.motion import MotionAdapter
from calotype.parts import Motion, Parts
from calotype.rules import shown
from calotype.weights.files import is_finite

Target = tuple[str, str]  # network, parameter
Share = tuple[str, float]  # adapter's name, its scale
Mix = Mapping[str, float]


class Stack:
    """Adapters by name, and the mix {name: scale} of them that is merged into the weights; these can be lent another.

    A weight is always computed from its pristine value, which is read again from the model's files (`Parts.stored`): so
    nothing accumulates, and the empty mix restores every weight bit for bit. Weights are written in place: no parameter
    moves. (Those that are views of a mapped file are private to this process: the file stays as it is.)
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._loras: dict[str, LoRA] = {}
        self._mix: dict[str, float] = {}
        self._merged: dict[str, float] = {}  # the same, unless another mix is lent the weights
        self._current: dict[Target, tuple[Tensor, list[Share]]] = {}  # each parameter that is not pristine
        self._stored: dict[str, Mapping[str, Tensor]] = {}  # pristine weights: views of the mapped files
        self._kept: dict[Target, Tensor] = {}  # pristine values of weights that came from no file
        self._live: object = None  # which call of `live` is in force
        self.before_writing: list[Callable[[frozenset[Target]], None]] = []  # told what `set` is about to write
        self.when_written: list[Callable[[frozenset[Target]], None]] = []  # told what `set` wrote, when it is done

    @property
    def loras(self) -> Mapping[str, LoRA]:
        """Every adapter that is registered."""
        return dict(self._loras)

    @property
    def mix(self) -> dict[str, float]:
        """What `set` was given, {name: scale}."""
        return dict(self._mix)

    @property
    def merged(self) -> dict[str, float]:
        """What is in the weights now: the mix, or that which was lent them."""
        return dict(self._merged)

    @property
    def motion(self) -> Motion | None:
        """The motion adapter that is in the U-Net."""
        return self._parts.motion

    def describe(self, mix: Mix) -> dict[str, dict[str, Any]]:
        """A mix, as what it takes to make it again; those that brought words are in it, if at a scale of 0."""
        return {
            name: {
                "ref": lora.ref,
                "weight_name": lora.weight_name,
                "revision": lora.revision,
                "scale": mix.get(name, 0.0),
                "file": lora.file,
            }
            for name, lora in self._loras.items()
            if name in mix or lora.words
        }

    def misfits(self, adapter: MotionAdapter | None) -> list[str]:
        """The registered adapters that change motion modules which this one has not."""
        there = {} if adapter is None else {name: tuple(p.shape) for name, p in adapter.named_parameters()}
        return [
            name
            for name, lora in self._loras.items()
            if not all(at in there and delta.fits(there[at]) for at, delta in lora.motion.items())
        ]

    def exchange_motion(self, parts: Parts) -> None:
        """Goes on with the same networks, with the motion modules of `parts` in place of those that were in the U-Net,
        and the same mix. `misfits` must be gone before.
        """
        mix = self._mix
        self.set({name: scale for name, scale in mix.items() if not self._loras[name].motion})
        motion.detach(parts.unet)
        if parts.motion is not None:
            motion.attach(parts.unet, parts.motion.adapter)
        self._parts = parts
        self._stored.pop("motion", None)
        self.set(mix)

    def add(self, name: str, lora: LoRA, scale: float = 1.0) -> frozenset[Target]:
        """Registers an adapter and merges it beside the others. Returns what was written, as `set` does.

        Raises UsageError where the name is taken, and what `set` raises; then it is not registered.
        """
        if name in self._loras:
            raise UsageError(f"there is an adapter {name!r} already", "choose another name, or remove that one first")
        self._loras[name] = lora
        try:
            return self.set({**self._mix, name: scale})
        except BaseException:
            del self._loras[name]
            raise

    def remove(self, name: str) -> frozenset[Target]:
        """Forgets an adapter, and takes it out of the mix. Returns what was written. Raises UsageError."""
        self.check_known([name])
        written = self.set({other: scale for other, scale in self._mix.items() if other != name})
        del self._loras[name]
        return written

    # ---- merged ----

    def set(self, mix: Mix) -> frozenset[Target]:
        """Replaces the whole mix: {name: scale}. Scales may be negative; their order means nothing.

        Returns the parameters that were written: those whose share of the mix changed. Raises UsageError for an unknown
        name, a scale that is no finite number and a mix that makes weights infinite, and CheckpointError where a weight
        is not (or no longer) what the model's files hold. Everything is as it was then.
        """
        written = self._merge(mix)
        self._mix = dict(mix)
        return written

    def lend(self, mix: Mix) -> None:
        """Merges another mix for a while: until `restore`, or the next `set`. Raises what `set` raises."""
        if mix != self._merged:
            self._merge(mix)

    def restore(self) -> None:
        """Merges the mix again."""
        self.lend(self._mix)

    def _merge(self, mix: Mix) -> frozenset[Target]:
        self.check_known(mix)
        for name, scale in mix.items():
            if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
                raise UsageError(f"the scale of {name!r} is {shown(scale)}: a finite number is needed")
        parameters, after = self._parameters(), self._shares(mix)
        if missing := next((target for target in after if target not in parameters), None):
            raise UsageError(
                f"the adapter {after[missing][0][0]!r} changes {missing[0]}'s {missing[1]}, which is not there",
                "a motion LoRA takes a motion adapter: set that first",
            )
        before = {target: shares for target, (at, shares) in self._current.items() if parameters.get(target) is at}
        changed = [target for target in before | after if before.get(target) != after.get(target)]
        for told in self.before_writing if changed else ():
            told(frozenset(changed))
        written: list[Target] = []
        try:
            for target in changed:
                parameter = self._own(target, parameters[target])
                pristine = self._pristine(target, parameter)
                if target not in before:
                    _check_untouched(target, parameter, pristine)
                written.append(target)
                self._write(target, parameter, pristine, after.get(target, []))
        except BaseException:
            for target in written:
                parameter = self._own(target, parameters[target])
                self._write(target, parameter, self._pristine(target, parameter), before.get(target, []))
            raise
        self._merged = dict(mix)
        self._current = {target: (parameters[target], shares) for target, shares in after.items()}
        self._kept = {target: value for target, value in self._kept.items() if target in after}
        for told in self.when_written if changed else ():
            told(frozenset(changed))
        return frozenset(changed)

    def key(self, network: str, mix: Mix) -> Hashable:
        """What a mix makes of a network: where keys are equal, weights are. For caches of what the network gives."""
        shares = ((lora, mix.get(name, 0.0)) for name, lora in self._loras.items() if network in lora.deltas)
        return tuple((lora, float(scale)) for lora, scale in shares if scale)

    def check_known(self, names: Collection[str]) -> None:
        """Raises UsageError for a name that no adapter has."""
        if unknown := [name for name in names if name not in self._loras]:
            there = ", ".join(self._loras) or "none"
            raise UsageError(f"no adapter {unknown[0]!r}: there are {there}", "add it first")

    def _parameters(self) -> dict[Target, Tensor]:
        return {
            (network, name): parameter
            for network, module in networks(self._parts).items()
            for name, parameter in module.named_parameters()
        }

    def _own(self, target: Target, parameter: Tensor) -> Tensor:
        network, name = target
        return own_rows(networks(self._parts)[network], name, parameter)

    def _shares(self, mix: Mix) -> dict[Target, list[Share]]:
        """The adapters in a mix that change a parameter, in the order in which they were registered."""
        shares: dict[Target, list[Share]] = {}
        for name, lora in self._loras.items():
            if mix.get(name, 0.0) != 0.0:
                for target in _targets(lora):
                    shares.setdefault(target, []).append((name, mix[name]))
        return shares

    def _pristine(self, target: Target, parameter: Tensor) -> Tensor:
        """A parameter's value in the files; of one that came from none, a copy of what it is when first touched."""
        network, name = target
        part = "motion" if MOTION in name else network  # those have a file of their own
        if part not in self._parts.stored:
            return self._kept.setdefault(target, parameter.detach().clone())
        if part not in self._stored:
            self._stored[part] = self._parts.stored[part]()
        return self._stored[part][name]

    @torch.no_grad()
    def _write(self, target: Target, parameter: Tensor, pristine: Tensor, shares: Sequence[Share]) -> None:
        """Gives a parameter its value in place: the pristine one plus its changes, summed up in float32."""
        if not shares:
            parameter.copy_(pristine)
            return
        network, name = target
        base = pristine.to(parameter.device, torch.float32)
        (first, scale), *others = shares
        total = self._loras[first].deltas[network][name](base, scale)
        for lora, scale in others:
            total += self._loras[lora].deltas[network][name](base, scale)
        value = total.add_(base).to(parameter.dtype)
        if not is_finite(value):
            mix = ", ".join(f"{lora} {scale:g}" for lora, scale in shares)
            dtype = str(value.dtype).removeprefix("torch.")
            raise UsageError(f"the mix ({mix}) leaves the range of {dtype} in {network}'s {name}", "scale it down")
        parameter.copy_(value)

    # ---- live ----

    @contextmanager
    def live(self, mix: Mapping[str, Scale], *, only: Collection[str] = NETWORKS) -> Iterator[None]:
        """Within it the networks compute with these adapters on top of what is merged; no weight is written.

        A scale is a number, or one for each row of the U-Net's batch, (B,): different mixes in one batch; guidance's
        second evaluation of the same rows, in one batch with the first, takes them again. For rows, say
        `only=("unet",)` and encode each mix's text by itself: the text encoders have no such rows. Motion modules mix
        all rows, so their scales must agree. Nested calls replace each other: the innermost counts, and `live({})` is
        none. Gradients reach adapters whose tensors want them; with checkpointing, stay within for the backward pass.
        Raises UsageError, CheckpointError.
        """
        self.check_known(mix)
        terms = self._terms(mix, only)
        outer, mine = self._live, object()
        modules = {network: dict(module.named_modules()) for network, module in networks(self._parts).items()}
        handles = [
            modules[network][module].register_forward_hook(hook(added, lambda: self._live is not mine))
            for (network, module), added in terms.items()
        ]
        self._live = mine
        try:
            yield
        finally:
            self._live = outer
            for handle in handles:
                handle.remove()

    def _terms(self, mix: Mapping[str, Scale], only: Collection[str]) -> dict[Target, list[tuple[Scale, Term]]]:
        """(network, module) -> what is added to its output, and by how much."""
        modules, terms = networks(self._parts), dict[Target, list[tuple[Scale, Term]]]()
        for name, lora in self._loras.items():
            for network, parameter in _targets(lora) if name in mix else ():
                if network not in only:
                    continue
                path, _, last = parameter.rpartition(".")
                module = modules[network].get_submodule(path)
                scale = _scale_for(name, mix[name], network, parameter)
                target = network, parameter
                pristine = partial(self._pristine, target, self._own(target, module.get_parameter(last)))
                added = term(module, last, lora.deltas[network][parameter], pristine)
                terms.setdefault((network, path), []).append((scale, added))
        return terms


def _targets(lora: LoRA) -> Iterator[Target]:
    for network, deltas in lora.deltas.items():
        for parameter in deltas:
            yield network, parameter


def _check_untouched(target: Target, parameter: Tensor, pristine: Tensor) -> None:
    """A weight that no adapter has changed is what its file holds: else the file, or the weight, was changed since."""
    if not torch.equal(parameter, pristine.to(parameter.device, parameter.dtype)):
        raise CheckpointError(
            f"{target[0]}'s {target[1]} is not what the model's files hold", "they were changed: load the model again"
        )


def _scale_for(name: str, scale: Scale, network: str, parameter: str) -> Scale:
    """A scale as it can be used in a network."""
    if not isinstance(scale, Tensor) or scale.ndim == 0:
        return scale
    if network != "unet":
        raise UsageError(f"{name!r} has a scale for each row, and changes {network}, which has no such rows", ROWS)
    if MOTION in parameter:
        if not bool((scale == scale[0]).all()):
            raise UsageError(f"{name!r} changes motion modules, which mix all rows: one scale is needed", ROWS)
        return scale[0]
    return scale


ROWS = 'say only=("unet",) and encode the text of each mix by itself; motion takes one scale'
