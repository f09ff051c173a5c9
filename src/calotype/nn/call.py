"""A call of the U-Net as a value: a job asks for it, whoever drives the job answers. Those of strangers become one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calotype.nn.unet import Conditioning, Residuals

Network = Callable[[Tensor, Tensor, Conditioning, Residuals | None, int | None], Tensor]  # UNet.forward


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """The arguments of `UNet.forward`, for B rows."""

    x: Tensor  # noisy latents, with what else the network takes in (B, in_channels, h, w)
    t: Tensor  # timesteps (B,)
    conditioning: Conditioning
    residuals: Residuals = field(default_factory=Residuals)
    frames: int | None = None  # so many rows after another are one clip; None: pictures

    def answered_by(self, network: Network) -> Tensor:
        """The network's output (B, out_channels, h, w)."""
        return network(self.x, self.t, self.conditioning, self.residuals, self.frames)

    def select(self, rows: Tensor, frames: int | None) -> Call:
        """The call of some rows, in clips of `frames`."""
        return Call(self.x[rows], self.t[rows], self.conditioning.select(rows), self.residuals.select(rows), frames)

    @property
    def layout(self) -> Hashable:
        """What must be equal for calls to become one: everything but how many rows there are, and their values."""
        conditioning, residuals = self.conditioning, self.residuals
        optional = (conditioning.pooled, conditioning.time_ids, conditioning.w, residuals.mid)
        tensors = (self.x, conditioning.context, *optional, None, *residuals.down, None, *residuals.level)
        rows = tuple(None if tensor is None else (*tensor.shape[1:], tensor.dtype) for tensor in tensors)
        return rows, self.frames

    @staticmethod
    def cat(calls: Sequence[Call]) -> Call:
        """Calls of one layout as one. Timesteps may be whole in some and lie between timesteps in others."""
        if len(calls) == 1:
            return calls[0]
        return Call(
            torch.cat([call.x for call in calls]),
            torch.cat([call.t for call in calls]),
            Conditioning.cat([call.conditioning for call in calls]),
            Residuals.cat([call.residuals for call in calls]),
            calls[0].frames,
        )
