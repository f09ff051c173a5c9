"""What an adapter does to one parameter, as values: LoRA, LoCon, LoHa, LoKr, GLoRA, IA3, plain differences, DoRA over
any; rotations (OFT) are in rotations.py.

Shapes: a weight is (O, I) of a linear layer or (O, I, k, k) of a convolution; r is the rank. `ratio` is what the
product is multiplied by in training (alpha / r); a user's scale comes on top of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from calotype.hashes import File
from calotype.lora.names import MOTION
from calotype.parts import Habit
from calotype.text.inversion import Inversion

Shape = tuple[int, ...]


class Delta(ABC):
    """The change of one parameter. Subclasses are frozen dataclasses of tensors and of other deltas."""

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """The shape of the change. Raises ValueError, a phrase, where the tensors do not go together."""

    @abstractmethod
    def __call__(self, base: Tensor, scale: float) -> Tensor:
        """The change of a parameter whose pristine value is `base`: a new float32 tensor in its shape, where it is.

        In a scale it is linear: nothing at 0, as trained at 1, the opposite at -1.
        """

    def fits(self, shape: Shape) -> bool:
        """Whether it changes a parameter of this shape. A 1x1 convolution is a linear layer, and some decompositions
        flatten a convolution's weight to (O, I k k).
        """
        ours = self.shape
        while len(ours) > 2 and ours[-1] == 1:
            ours = ours[:-1]
        return self.shape == shape or (len(ours) == 2 and ours == (shape[0], math.prod(shape[1:])))

    def tensors(self) -> Iterator[Tensor]:
        """All that was trained."""
        for _, value in self._contents():
            yield from value.tensors() if isinstance(value, Delta) else (value,)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with each tensor replaced."""
        changed = {
            name: value.map(function) if isinstance(value, Delta) else function(value)
            for name, value in self._contents()
        }
        return replace(self, **changed)  # type: ignore[type-var]

    def _contents(self) -> list[tuple[str, Any]]:
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]
        return [(name, value) for name, value in values if isinstance(value, Delta | Tensor)]


class Plain(Delta):
    """A change that is the same for every base."""

    @abstractmethod
    def product(self, device: torch.device, scale: float = 1.0) -> Tensor:
        """The change in float32, in the shape `self.shape`."""

    def __call__(self, base: Tensor, scale: float) -> Tensor:
        return self.product(base.device, scale).reshape(base.shape)


@dataclass(frozen=True, eq=False)
class LowRank(Plain):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) and LoCon, the same of a convolution: ratio * up @ down.

    With `mid` it is in Tucker form: a 1x1 convolution down, `mid` in the kernel's size, a 1x1 convolution up.
    """

    down: Tensor  # (r, I) or (r, I, k, k)
    up: Tensor  # (O, r) or (O, r, 1, 1)
    ratio: float = 1.0
    mid: Tensor | None = None  # (r, r, k, k)

    @property
    def shape(self) -> Shape:
        inner = outer = len(self.down)
        kernel = tuple(self.down.shape[2:])
        if self.mid is not None:
            require(self.mid.ndim == 4 and math.prod(kernel) == 1)
            outer, inner, *size = self.mid.shape
            kernel = tuple(size)
        require(self.down.ndim in (2, 4) and len(self.down) == inner)
        require(self.up.ndim in (2, 4) and math.prod(self.up.shape[1:]) == self.up.shape[1] == outer)
        return (len(self.up), self.down.shape[1], *kernel)

    def product(self, device: torch.device, scale: float = 1.0) -> Tensor:
        up, down = (tensor.flatten(1).to(device, torch.float32) for tensor in (self.up, self.down))
        up = scale * self.ratio * up  # the smallest of the factors
        if self.mid is None:
            return (up @ down).reshape(self.shape)
        return torch.einsum("or,rskl,si->oikl", up, self.mid.to(device, torch.float32), down)


@dataclass(frozen=True, eq=False)
class Hadamard(Plain):
    """LoHa (FedPara, Hyeon-Woo et al. 2021, arXiv 2108.06098): the elementwise product of two of low rank."""

    one: LowRank
    other: LowRank
    ratio: float

    @property
    def shape(self) -> Shape:
        require(self.one.shape == self.other.shape)
        return self.one.shape

    def product(self, device: torch.device, scale: float = 1.0) -> Tensor:
        return self.one.product(device, scale * self.ratio) * self.other.product(device)


@dataclass(frozen=True, eq=False)
class Difference(Plain):
    """The change itself."""

    values: Tensor
    ratio: float = 1.0

    @property
    def shape(self) -> Shape:
        return tuple(self.values.shape)

    def product(self, device: torch.device, scale: float = 1.0) -> Tensor:
        return scale * self.ratio * self.values.to(device, torch.float32)


@dataclass(frozen=True, eq=False)
class Kronecker(Plain):
    """LoKr (Yeh et al. 2023, arXiv 2309.14859): the Kronecker product of (a, b) and (c, d) or (c, d, k, k), where
    O = a c and I = b d. Each is whole, or of low rank.
    """

    one: LowRank | Difference
    other: LowRank | Difference
    ratio: float

    @property
    def shape(self) -> Shape:
        a, b, *kernel = self.one.shape
        c, d, *kernel_ = self.other.shape
        require(math.prod(kernel) == 1)
        return (a * c, b * d, *kernel_)

    def product(self, device: torch.device, scale: float = 1.0) -> Tensor:
        one, other = self.one.product(device, scale * self.ratio), self.other.product(device)
        one = one.reshape(*one.shape[:2], *[1] * (other.ndim - 2))
        return torch.kron(one, other.contiguous())


@dataclass(frozen=True, eq=False)
class Sum(Plain):
    """Both of two changes."""

    one: LowRank
    other: Difference

    @property
    def shape(self) -> Shape:
        require(math.prod(self.one.shape) == math.prod(self.other.shape))
        return self.one.shape

    def product(self, device: torch.device, scale: float = 1.0) -> Tensor:
        return self.one.product(device, scale) + self.other.product(device, scale).reshape(self.shape)


# ---- changes that depend on the base ----
# They are counted from it, so that a scale goes in a straight line from the base (0) through the trained weight (1), as
# in ComfyUI and A1111.


@dataclass(frozen=True, eq=False)
class General(Delta):
    """GLoRA (Chavan et al. 2023, arXiv 2306.07967) as LyCORIS has it, without its biases: ratio * (W A + B)."""

    inner: LowRank  # A: (I, I)
    outer: LowRank  # B: (O, I) or (O, I, k, k)
    ratio: float

    @property
    def shape(self) -> Shape:
        inputs = self.outer.shape[1]
        require(self.inner.shape[:2] == (inputs, inputs) and math.prod(self.inner.shape[2:]) == 1)
        return self.outer.shape

    def __call__(self, base: Tensor, scale: float) -> Tensor:
        base = base.to(torch.float32)
        up, down = (factor.flatten(1).to(base.device, torch.float32) for factor in (self.inner.up, self.inner.down))
        turned = torch.einsum("oi...,ir,rj->oj...", base, up, down)
        return scale * self.ratio * (turned + self.outer(base, 1.0))


@dataclass(frozen=True, eq=False)
class Scaled(Delta):
    """IA3 (Liu et al. 2022, arXiv 2205.05638): each output, or each input, times a trained factor."""

    more: Tensor  # by how much a factor is above 1: (O, 1, ...); (1, I, 1, ...); of a bias (O,)

    @property
    def shape(self) -> Shape:
        return tuple(self.more.shape)

    def fits(self, shape: Shape) -> bool:
        sides = zip(self.shape, shape, strict=False)
        return len(self.shape) == len(shape) and all(ours in (1, theirs) for ours, theirs in sides)

    def __call__(self, base: Tensor, scale: float) -> Tensor:
        return scale * self.more.to(base.device, torch.float32) * base


@dataclass(frozen=True, eq=False)
class Replaced(Delta):
    """Another value in the place of the base's."""

    values: Tensor

    @property
    def shape(self) -> Shape:
        return tuple(self.values.shape)

    def __call__(self, base: Tensor, scale: float) -> Tensor:
        return scale * (self.values.to(base.device, torch.float32).reshape(base.shape) - base)


@dataclass(frozen=True, eq=False)
class Decomposed(Delta):
    """DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5): the changed weight, its rows (or columns) given trained lengths.

    In PEFT a scale acts inside of the norm: the same at 1, but at 0 not the base.
    """

    inner: Plain
    magnitude: Tensor  # (O, 1, ...): the length of each output's row; (1, I, 1, ...): of each input's column

    @property
    def shape(self) -> Shape:
        return self.inner.shape

    def fits(self, shape: Shape) -> bool:
        ones = [1] * (len(shape) - 2)
        lengths = ([shape[0], 1, *ones], [1, shape[1], *ones])
        return self.inner.fits(shape) and list(self.magnitude.shape) in lengths

    def __call__(self, base: Tensor, scale: float) -> Tensor:
        base = base.to(torch.float32)
        weight = base + self.inner(base, 1.0)
        of_rows = self.magnitude.shape[0] == self.magnitude.numel() == len(base)
        axis = 0 if of_rows else 1
        others = [dim for dim in range(base.ndim) if dim != axis]
        # The paper (section 4.3) keeps the norm out of the gradient.
        norm = torch.linalg.vector_norm(weight.detach(), dim=others, keepdim=True)
        unit = weight / norm.clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros stays one
        changed: Tensor = self.magnitude.to(base.device, torch.float32) * unit
        return scale * (changed - base)


@dataclass(frozen=True, eq=False)
class LoRA:
    """One adapter: what it changes of each network. It has the name of the commonest kind, and may be any of them."""

    ref: str  # where it came from, as the user said it
    weight_name: str | None  # which file there
    # "unet", "text_encoder" or "text_encoder_2" -> its parameters -> the change of each
    deltas: Mapping[str, Mapping[str, Delta]]
    revision: str | None = None
    habit: Habit | None = None
    words: tuple[Inversion, ...] = ()  # textual inversions in the same file
    may_be_few_step: bool = False  # by its shape; but nothing says how it likes to be used
    file: File | None = None  # where it was read

    @cached_property
    def motion(self) -> dict[str, Delta]:
        """What it changes of motion modules, by their parameters' names."""
        return {name: delta for name, delta in self.deltas.get("unet", {}).items() if MOTION in name}


def require(fits: bool) -> None:
    """Raises ValueError unless the tensors of a change go together."""
    if not fits:
        raise ValueError("has factors of shapes that do not go together")
