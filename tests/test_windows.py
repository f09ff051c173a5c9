"""Overlapping windows over long clips: which frames, with which weights."""

from __future__ import annotations

import itertools
from collections.abc import Generator

import pytest
import torch

from calotype.errors import UsageError
from calotype.nn.call import Call, Network
from calotype.nn.unet import Conditioning, Residuals
from calotype.nn.windows import blend, by_windows, context_windows, window_weights


@pytest.mark.parametrize("overlap", [0, 1, 4, 12, 15])
@pytest.mark.parametrize("frames", [1, 15, 16, 17, 24, 31, 32, 100, 512])
def test_windows_cover_and_overlap(frames: int, overlap: int) -> None:
    windows = context_windows(frames, 16, overlap)
    assert sorted({frame for window in windows for frame in window}) == list(range(frames))
    assert {len(window) for window in windows} == {min(16, frames)}
    for before, after in itertools.pairwise(windows):
        assert after.start > before.start
        assert before.stop - after.start >= overlap
    # One window fewer could not do it: it would reach 16 frames, and each further one 16 - overlap more.
    assert len(windows) == 1 or 16 + (len(windows) - 2) * (16 - overlap) < frames


def test_a_short_clip_is_one_window() -> None:
    assert context_windows(16, 16, 4) == [range(16)]
    assert context_windows(5, 16, 4) == [range(5)]
    assert context_windows(24) == [range(16), range(8, 24)]
    assert context_windows(40, 16, 4) == [range(16), range(12, 28), range(24, 40)]


@pytest.mark.parametrize(("frames", "length", "overlap"), [(0, 16, 4), (16, 0, 0), (20, 16, 16), (20, 16, -1)])
def test_windows_that_cannot_be(frames: int, length: int, overlap: int) -> None:
    with pytest.raises(UsageError, match="must be"):
        context_windows(frames, length, overlap)


def test_weights_are_a_pyramid() -> None:
    assert window_weights(1) == [1]
    assert window_weights(4) == [1, 2, 2, 1]
    assert window_weights(5) == [1, 2, 3, 2, 1]


def test_windows_that_agree_change_nothing() -> None:
    """Exactly in the frames of one window, to rounding in those of several."""
    x = torch.randn(2, 40, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    windows = context_windows(40, 16, 4)
    mean = blend(windows, [x[:, window.start : window.stop] for window in windows], 40)
    torch.testing.assert_close(mean, x, rtol=1e-6, atol=1e-6)
    alone = [frame for frame in range(40) if sum(frame in window for window in windows) == 1]
    assert len(alone) == 32
    assert torch.equal(mean[:, alone], x[:, alone])


def test_half_precision_is_averaged_in_single() -> None:
    windows = [range(2), range(1, 3)]
    a, b = torch.full((1, 2, 1), 1.0).half(), torch.full((1, 2, 1), 1.0 + 2**-10).half()
    mean = blend(windows, [a, b], 3)
    assert mean.dtype == torch.float32
    assert mean[0, 1, 0] == 1.0 + 2**-11


def answered(asking: Generator[Call, torch.Tensor, torch.Tensor], network: Network) -> torch.Tensor:
    """What a generator of calls returns, each call answered by the network."""
    try:
        call = next(asking)
        while True:
            call = asking.send(call.answered_by(network))
    except StopIteration as end:
        output: torch.Tensor = end.value
        return output


class Noted:
    """Says which rows it was called with: each output is its row's x, plus its residuals, plus its window's number."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[float], int | None]] = []

    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        conditioning: Conditioning,
        residuals: Residuals | None,
        frames: int | None,
    ) -> torch.Tensor:
        assert residuals is not None
        rows = x.flatten()
        assert torch.equal(t.double(), rows)
        assert torch.equal(conditioning.context.flatten(), rows)
        assert conditioning.w is not None
        assert torch.equal(conditioning.w, rows)
        for given in (residuals.mid, *residuals.down, *residuals.level):
            assert given is None or torch.equal(given.flatten(), rows)
        self.calls.append((rows.tolist(), frames))
        return x


@pytest.mark.parametrize("controlled", [True, False])
def test_each_window_gets_its_rows_of_every_clip(controlled: bool) -> None:
    rows = torch.arange(3 * 5).double()  # three clips of five frames
    picture = rows.view(-1, 1, 1, 1)
    residuals = Residuals((picture, picture), picture, (picture,)) if controlled else Residuals()
    conditioning = Conditioning(rows.view(-1, 1, 1), w=rows)
    network = Noted()
    call = Call(picture, rows.long(), conditioning, residuals, 5)
    out = answered(by_windows(call, context_windows(5, 4, 1)), network)
    assert network.calls == [
        ([0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13], 4),
        ([1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14], 4),
    ]
    torch.testing.assert_close(out, picture)
