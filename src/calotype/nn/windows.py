"""Clips longer than a motion module was trained for: overlapping windows of frames, evaluated one after another.

Each window is a clip of its own for the network; where windows overlap, their outputs are averaged, each frame counting
the more the nearer it is to its window's middle.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from calotype.errors import UsageError
from calotype.nn.call import Call

LENGTH, OVERLAP = 16, 4  # AnimateDiff was trained on clips of 16 frames


def context_windows(frames: int, length: int = LENGTH, overlap: int = OVERLAP) -> list[range]:
    """The fewest windows of `length` frames that cover a clip and share at least `overlap` frames with the next.

    They are spread evenly. A clip that is no longer than `length` is one window. Raises UsageError.
    """
    if frames < 1 or length < 1:
        raise UsageError(f"{frames} frames in windows of {length}: must be at least 1 of each")
    if not 0 <= overlap < length:
        raise UsageError(f"windows of {length} frames overlap by {overlap}: must be 0 to {length - 1}")
    if frames <= length:
        return [range(frames)]
    gaps = -(-(frames - length) // (length - overlap))
    starts = [i * (frames - length) // gaps for i in range(gaps + 1)]
    return [range(start, start + length) for start in starts]


def window_weights(length: int) -> list[int]:
    """How much each frame of a window counts: 1, 2, ... up to the middle and down again."""
    return [min(i + 1, length - i) for i in range(length)]


def blend(windows: Sequence[range], outputs: Sequence[Tensor], frames: int) -> Tensor:
    """The weighted mean of the windows' outputs, each (n, length, ...), as (n, frames, ...), at least in float32.

    A frame that lies in one window only is that window's, bit for bit.
    """
    first = outputs[0]
    weights = torch.zeros(len(windows), frames, dtype=torch.float64)
    for row, window in enumerate(windows):
        weights[row, window.start : window.stop] = torch.tensor(window_weights(len(window)), dtype=torch.float64)
    assert (weights.sum(0) > 0).all(), "the windows leave frames out"
    weights /= weights.sum(0)
    dtype = torch.promote_types(first.dtype, torch.float32)
    total = first.new_zeros(len(first), frames, *first.shape[2:], dtype=dtype)
    for row, window, output in zip(weights, windows, outputs, strict=True):
        within = slice(window.start, window.stop)
        total[:, within] += output * row[within].to(first.device, dtype).view(-1, *(1,) * (first.ndim - 2))
    return total


def by_windows(call: Call, windows: Sequence[range]) -> Generator[Call, Tensor, Tensor]:
    """A call for clips of some frames, asked for window by window; returns the output for all of it."""
    assert call.frames is not None
    clips = torch.arange(len(call.x), device=call.x.device).view(-1, call.frames)
    outputs = []
    for window in windows:
        out = yield call.select(clips[:, window.start : window.stop].flatten(), len(window))
        outputs.append(out.view(-1, len(window), *out.shape[1:]))
    return blend(windows, outputs, call.frames).flatten(0, 1).to(outputs[0].dtype)
