"""The tensors of one layer in an adapter's file -> what they change: a delta for its weight, and perhaps its bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calotype.lora.deltas import (
    Decomposed,
    Delta,
    Difference,
    General,
    Hadamard,
    Kronecker,
    LowRank,
    Plain,
    Replaced,
    Scaled,
    Shape,
    Sum,
)
from calotype.lora.rotations import (
    Butterfly,
    Rotated,
    cayley,
    limited,
    neumann,
    projected,
    skew,
    unpacked,
)
from calotype.lora.scaling import Scaling
from calotype.rules import shown
from calotype.weights.files import is_finite

COUNTS = ("bias_indices", "bias_size", "reshape_weight")  # whole numbers; what is trained never is
FLAGS = ("alpha", "ia3_on_input", "oft_scaled", "scalar")  # of any dtype


class Damaged(ValueError):
    """A layer whose numbers mean nothing."""


@dataclass(frozen=True)
class Place:
    """Where a layer's change goes."""

    name: str  # in the file
    module: str  # ours
    shape: Shape  # of its weight
    has_bias: bool
    scaling: Scaling


def deltas_of(layer: dict[str, Tensor], place: Place) -> dict[str, Delta]:
    """A layer's changes by parameter ("weight", "bias"). Raises ValueError, a phrase about the layer."""
    for part, tensor in layer.items():
        if not (tensor.is_floating_point() or part in (*COUNTS, *FLAGS)):
            raise ValueError(
                f"has {part} in {str(tensor.dtype).removeprefix('torch.')}: it needs a scale, which is unknown"
            )
    left = dict(layer)  # each part is taken out of it when it is used
    alpha = _number(left, "alpha")
    factors = any(part.startswith(("up", "hada_", "lokr_", "glora_")) for part in left)
    scalar = _number(left, "scalar") if factors else None

    def ratio(rank: int | None) -> float:
        if rank == 0:
            raise ValueError("is of rank 0")
        return place.scaling.ratio(place.module, rank, alpha) * (1.0 if scalar is None else scalar)

    lengths = _lengths(left, place.shape)
    found: dict[str, Delta] = {}
    rank = len(left["down"]) if "down" in left and left["down"].ndim else None
    if (plain := _plain(left, ratio)) is not None:
        found["weight"] = plain if lengths is None else Decomposed(plain, lengths)
    elif lengths is not None:
        raise ValueError("has DoRA's lengths without a change that they belong to")
    else:
        found |= _relative(left, place, ratio, alpha)
    for part, of in (("up_bias", ratio(rank)), ("diff_b", 1.0), ("b_norm", 1.0)):
        if part in left:
            found["bias"] = Difference(left.pop(part), of)
    if left or not found:
        raise ValueError(f"has {', '.join(left) or 'alpha'} without what belongs to it")
    return found


# ---- changes that are the same for every base ----


def _plain(left: dict[str, Tensor], ratio: Callable[[int | None], float]) -> Plain | None:
    if "embedding_A" in left and "embedding_B" in left:
        for part, ours in (("embedding_A", "up"), ("embedding_B", "down")):  # (r, rows) and (width, r)
            left[ours] = left.pop(part).t() if left[part].ndim == 2 else left.pop(part)
    if "down" in left or "up" in left:
        low = _low_rank(left, "up", "down", "mid")
        low = replace(low, ratio=ratio(len(low.down)))
        if (size := left.pop("reshape_weight", None)) is not None and tuple(size.tolist()) != low.shape:
            raise ValueError(
                f"changes the shape of its weight to {shown(size.tolist())}: no model here has such layers"
            )
        return low if "bias_values" not in left else Sum(low, Difference(_sparse(left), low.ratio))
    if any(part.startswith("hada_") for part in left):
        first, second = (_low_rank(left, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
        return Hadamard(first, second, ratio(len(first.down)))
    if any(part.startswith("lokr_") for part in left):
        one, other = (
            Difference(left.pop(f"lokr_w{i}"))
            if f"lokr_w{i}" in left
            else _low_rank(left, f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}")
            for i in (1, 2)
        )
        ranks = [len(side.down) for side in (one, other) if isinstance(side, LowRank)]
        return Kronecker(one, other, ratio(ranks[-1] if ranks else None))
    whole = next((part for part in ("diff", "w_norm") if part in left), None)
    return None if whole is None else Difference(left.pop(whole))


def _sparse(left: dict[str, Tensor]) -> Tensor:
    """What LyCORIS' extraction kept beside the low rank: single elements (n,) at (2, n) of a matrix of some size."""
    values, indices, size = (left.pop(f"bias_{part}", None) for part in ("values", "indices", "size"))
    if values is None or indices is None or size is None or size.numel() != 2 or values.ndim != 1:
        raise ValueError("has bias_values without what belongs to it")
    rows, columns = (int(side) for side in size)
    at = indices.long()
    fits = at.shape == (2, len(values)) and 0 < rows * columns < 2**31
    if not fits or (len(values) and not bool((at >= 0).all() and (at < torch.tensor([[rows], [columns]])).all())):
        raise ValueError(f"has bias_indices that are not in a matrix of {rows} by {columns}")
    return torch.zeros(rows, columns).index_put_((at[0], at[1]), values.float())


def _low_rank(left: dict[str, Tensor], up: str, down: str, mid: str) -> LowRank:
    for part in (up, down):
        if part not in left:
            raise ValueError(f"has no {part}")
        if left[part].ndim < 2:
            raise ValueError(f"has a {part} of shape {list(left[part].shape)}")
    a, b, middle = left.pop(up), left.pop(down), left.pop(mid, None)
    if middle is not None and up != "up":  # LyCORIS has its own Tucker forms the other way round: (r, O)
        a = a.transpose(0, 1)
    return LowRank(b, a, mid=middle)


def _lengths(left: dict[str, Tensor], shape: Shape) -> Tensor | None:
    """DoRA's magnitudes, in a shape that goes with the weight's."""
    ones = [1] * (len(shape) - 2)
    if len(shape) < 2 and ("row_lengths" in left or "lengths" in left):
        raise ValueError("has DoRA's lengths for a norm, which has no rows")
    if "row_lengths" in left:
        lengths, rows = left.pop("row_lengths"), True  # (O,), or of a convolution (1, O, 1, 1)
    elif "lengths" in left:
        lengths = left.pop("lengths")  # (O, 1, ...) or (1, I, ...)
        rows = lengths.ndim == 1 or len(lengths) == shape[0]
    else:
        return None
    if lengths.numel() != shape[0 if rows else 1]:
        raise ValueError(f"has {lengths.numel()} lengths for a weight of shape {list(shape)}")
    return lengths.reshape(-1, 1, *ones) if rows else lengths.reshape(1, -1, *ones)


def _number(left: dict[str, Tensor], part: str) -> float | None:
    """A number of any dtype, or None where there is none."""
    if part not in left:
        return None
    tensor = left.pop(part)
    if tensor.numel() != 1 or not math.isfinite(value := float(tensor.float().item())):
        raise ValueError(f"has the {part} {shown(tensor.tolist())}")
    return value


# ---- changes that are another one for each base ----


def _relative(
    left: dict[str, Tensor], place: Place, ratio: Callable[[int | None], float], alpha: float | None
) -> dict[str, Delta]:
    if len(place.shape) < 2 and left and "set_weight" not in left and not left.keys() <= {"diff_b", "b_norm"}:
        raise ValueError(f"has {', '.join(left)} for a norm, which has neither inputs nor blocks")
    if not all(is_finite(tensor) for tensor in left.values()):  # before they are computed with
        raise Damaged("has NaN or infinite values")
    if "set_weight" in left:
        return {"weight": Replaced(left.pop("set_weight"))}
    if any(part.startswith("glora_") for part in left):
        return {"weight": _general(left, place, ratio)}
    if "ia3_weight" in left:
        flag = _number(left, "ia3_on_input")
        if flag not in (0.0, 1.0):
            raise ValueError(f"has the on_input {flag}: 0 or 1 is needed")
        return {"weight": Scaled(_along(left.pop("ia3_weight"), place.shape, int(flag)))}
    if "ia3_l" in left:
        return _ia3_of_peft(left, place)
    if "oft_blocks" in left:
        return {"weight": _oft(left, place, alpha)}
    if "oft_diag" in left:  # LyCORIS in 2023: the rotation itself
        return {"weight": Rotated(_square(left.pop("oft_diag")).mT, "outputs")}
    if "oft_packed" in left:
        return {"weight": _oft_packed(left, place)}
    if "oft_r" in left:
        return {"weight": _oft_of_old_peft(left, place)}
    return {}


def _general(left: dict[str, Tensor], place: Place, ratio: Callable[[int | None], float]) -> General:
    """GLoRA's A is a1 a2 and its B is b1 b2; before LyCORIS 3 they were a2 a1 and b2 b1."""
    if missing := [part for part in ("a1", "a2", "b1", "b2") if f"glora_{part}" not in left]:
        raise ValueError(f"has no {missing[0]}.weight")
    a1, a2, b1, b2 = (left.pop(f"glora_{part}") for part in ("a1", "a2", "b1", "b2"))
    if any(factor.ndim not in (2, 4) for factor in (a1, a2, b1, b2)):
        raise ValueError("has factors of shapes that do not go together")
    sides = place.shape[:2]  # outputs, inputs
    new = b1.shape[1] == b2.shape[0] == a1.shape[1] == a2.shape[0] and (len(b1), len(a1)) == sides
    old = b2.shape[1] == b1.shape[0] == a2.shape[1] == a1.shape[0] and (len(b2), len(a2)) == sides
    if new and old:
        raise ValueError(f"is of rank {len(a2)}, as large as its layer: GLoRA's two orders cannot be told apart")
    if old:
        a1, a2, b1, b2 = a2, a1, b2, b1
    return General(LowRank(a2, a1), LowRank(b2, b1), ratio(len(a2)))


def _along(values: Tensor, shape: Shape, axis: int) -> Tensor:
    """A number for each output (axis 0) or input (1), in a shape that goes with the weight's."""
    sides = [1] * len(shape)
    sides[axis] = values.numel()
    return values.reshape(sides)


def _ia3_of_peft(left: dict[str, Tensor], place: Place) -> dict[str, Delta]:
    """IA3's factors themselves; those of outputs multiply the bias as well."""
    factors = left.pop("ia3_l").float()
    more = factors.flatten() - 1
    outputs, inputs = place.shape[:2]
    if factors.ndim == 2 and 1 in factors.shape and factors.numel() > 1:  # of a linear layer: (O, 1) or (1, I)
        axis = int(factors.shape[0] == 1)
    elif outputs != inputs:  # of a convolution: always (1, n, 1, 1)
        axis = int(len(more) == inputs)
    elif place.scaling.on_inputs is not None:
        axis = int(any(place.module.endswith(name) for name in place.scaling.on_inputs))
    else:
        raise ValueError("scales its inputs or its outputs: only adapter_config.json says which")
    found: dict[str, Delta] = {"weight": Scaled(_along(more, place.shape, axis))}
    if axis == 0 and place.has_bias:
        found["bias"] = Scaled(more)
    return found


def _oft(left: dict[str, Tensor], place: Place, alpha: float | None) -> Delta:
    """OFT (k, n, n) and BOFT (m, k, n, n) as kohya's scripts, LyCORIS and ComfyUI's trainer write them. Alpha, unless
    it is 0, limits the norm of Q: times the number of outputs, but in ComfyUI as it is.
    """
    blocks, lengths = left.pop("oft_blocks"), left.pop("rescale", None)
    if lengths is not None:
        lengths = _along(lengths, place.shape, 0)
    q = skew(blocks)
    if alpha is not None and alpha > 0:
        q = limited(q, alpha if place.name.startswith("diffusion_model.") else alpha * place.shape[0])
    turned = cayley(q)
    # Of OFT the outputs in a block are R^T times what they were, of BOFT's they are R times that.
    return Rotated(turned.mT, "outputs", lengths) if blocks.ndim == 3 else Butterfly(turned, lengths)


def _oft_packed(left: dict[str, Tensor], place: Place) -> Rotated:
    """PEFT's OFT turns the inputs, W' = W R^T; so does OneTrainer's, but a convolution's is W' = W R. OneTrainer's
    files do not say how: by five terms of the series, and where they are marked, Q is made smaller for larger blocks.
    (PEFT merges into a convolution what it trains otherwise, on pixels that overlap; this is the merged one.)
    """
    how, flag = place.scaling.rotations, _number(left, "oft_scaled")
    q = unpacked(left.pop("oft_packed"))
    back = True
    if how is not None:
        if how.most is not None:
            q = projected(q, how.most)
        turned = cayley(-q) if how.terms is None else neumann(q, how.terms)
    elif "base_model" in place.name:
        raise ValueError(
            "is PEFT's OFT: only adapter_config.json, beside an adapter_model.safetensors, says how it is applied"
        )
    else:
        if flag:
            q = q / (2 * math.sqrt(max(q.shape[-1] - 1, 1)))
        turned, back = neumann(q, 5), len(place.shape) == 2
    return Rotated(_each(turned.mT if back else turned, math.prod(place.shape[1:])), "inputs")


def _oft_of_old_peft(left: dict[str, Tensor], place: Place) -> Rotated:
    """PEFT's OFT until 0.13 turned the outputs; in 0.14 and 0.15 it turned the inputs, and scaled the outputs."""
    blocks, lengths = _square(left.pop("oft_r").float()), left.pop("oft_s", None)
    how, outputs = place.scaling.rotations, place.shape[0]
    turned = outputs if lengths is None else math.prod(place.shape[1:])
    if how is None:
        raise ValueError(
            "is PEFT's OFT: only adapter_config.json, beside an adapter_model.safetensors, says how it is applied"
        )
    if how.most is not None:
        count = max(turned // blocks.shape[-1], 1)
        blocks = projected(blocks, how.most * math.ceil(outputs / count) ** 2)
    rotations = _each(cayley(-0.5 * skew(blocks)).mT, turned)
    if lengths is None:
        return Rotated(rotations, "outputs")
    return Rotated(rotations, "inputs", _along(lengths, place.shape, 0))


def _square(blocks: Tensor) -> Tensor:
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or not blocks.numel():
        raise ValueError(f"has blocks of shape {list(blocks.shape)}")
    return blocks


def _each(blocks: Tensor, width: int) -> Tensor:
    """One block for each of a width's; a single one is shared by all."""
    size = blocks.shape[-1]
    return blocks.expand(width // size, size, size) if len(blocks) == 1 and width % size == 0 else blocks
