"""What a live change adds to a layer's output: layers are linear in their parameters, so a change is one more layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.errors import UsageError
from calotype.lora.deltas import Delta, LowRank

Scale = float | Tensor  # of the whole batch, or one for each of its rows: (B,)
Term = Callable[[Tensor], Tensor]


def term(module: nn.Module, parameter: str, delta: Delta, base: Callable[[], Tensor]) -> Term:
    """What a change of a module's parameter adds to its output for an input x, at scale 1.

    Low rank stays low rank. Any other change is computed once; or, where it is being trained, each time.
    """
    like = module.get_parameter(parameter)
    trained = any(tensor.requires_grad for tensor in delta.tensors())
    if isinstance(delta, LowRank) and isinstance(module, nn.Conv2d if delta.mid is not None else nn.Linear | nn.Conv2d):
        moved = delta if trained else delta.map(lambda tensor: tensor.to(like.device, like.dtype))
        return lambda x: _low_rank(module, moved, x)
    pristine = base().to(like.device, torch.float32)
    if trained:
        of_words = isinstance(module, nn.Embedding)  # the input there is whole numbers
        return lambda x: _layer(module, parameter, delta(pristine, 1.0).to(like.dtype if of_words else x.dtype), x)
    change = delta(pristine, 1.0).to(like.dtype)
    return lambda x: _layer(module, parameter, change, x)


def hook(terms: Sequence[tuple[Scale, Term]], off: Callable[[], bool]) -> Callable[..., Tensor | None]:
    """A forward hook that adds terms to a module's output, unless they are off."""

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if off():
            return None
        (x,) = inputs
        for scale, term in terms:
            output = output + _rows(scale, output) * term(x)
        return output

    return add


def _rows(scale: Scale, output: Tensor) -> Scale:
    """A scale that multiplies the rows of an output (B, ...)."""
    if not isinstance(scale, Tensor) or scale.ndim == 0:
        return scale
    if len(output) == 2 * len(scale):  # with guidance, the same rows without the prompt and with it
        scale = scale.repeat(2)
    if len(scale) != len(output):
        raise UsageError(f"{len(scale)} scales for a batch of {len(output)} rows", "one for each row, or one for all")
    return scale.to(output.device, output.dtype).view(-1, *[1] * (output.ndim - 1))


def _low_rank(module: nn.Module, delta: LowRank, x: Tensor) -> Tensor:
    """Down, middle and up as layers. The one in the kernel's size moves over the input as the module does."""
    down, up, mid = (None if factor is None else factor.to(x.dtype) for factor in (delta.down, delta.up, delta.mid))
    assert down is not None
    assert up is not None
    if not isinstance(module, nn.Conv2d):
        return delta.ratio * F.linear(F.linear(x, down.flatten(1)), up.flatten(1))
    if mid is None:
        x = _layer(module, "weight", down.reshape(len(down), -1, *module.kernel_size), x)
    else:
        x = _layer(module, "weight", mid, F.conv2d(x, down.reshape(*down.shape[:2], 1, 1)))
    return delta.ratio * F.conv2d(x, up.reshape(*up.shape[:2], 1, 1))


def _layer(module: nn.Module, parameter: str, value: Tensor, x: Tensor) -> Tensor:
    """The module's output if `value` were this parameter of it and the other were zero."""
    if parameter == "bias":
        channels_first = isinstance(module, nn.Conv2d | nn.GroupNorm)
        return value.view(-1, *[1] * (x.ndim - 2)) if channels_first else value
    match module:
        case nn.Linear():
            return F.linear(x, value)
        case nn.Conv2d():
            padding = module.padding
            return F.conv2d(x, value, None, module.stride, padding, module.dilation, module.groups)
        case nn.GroupNorm():
            return F.group_norm(x, module.num_groups, value, None, module.eps)
        case nn.LayerNorm():
            return F.layer_norm(x, module.normalized_shape, value, None, module.eps)
        case nn.Embedding():  # words that were added have rows of their own behind these
            return F.embedding(x, F.pad(value, (0, 0, 0, module.num_embeddings - len(value))))
    raise TypeError(f"no live change of a {type(module).__name__}")
