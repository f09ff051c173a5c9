"""The processes that train together, as torchrun or accelerate starts them; and what they say to each other.

A process that was started alone is rank 0 of 1, and every exchange is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from calotype.errors import UsageError

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)  # encoding pictures may take one process longer than another


@dataclass(frozen=True)
class Ranks:
    """This process among `world`, from 0."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all."""
        if self.world > 1:
            dist.barrier()

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over all processes."""
        if self.world == 1:
            return list(values)
        # In float64, which nccl has too: the sum of the losses is the same in any number of processes.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def broadcast(self, value: T) -> T:
        """The value of the first process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in order; each has as many."""
        if self.world == 1:
            return rows
        pieces = [torch.empty_like(rows, device=self.device) for _ in range(self.world)]
        dist.all_gather(pieces, rows.to(self.device).contiguous())
        return torch.cat(pieces).to(rows.device)

    def data_parallel(self, module: nn.Module) -> nn.Module:
        """The module, whose gradients become the average over all processes."""
        if self.world == 1:
            return module
        return DistributedDataParallel(module, device_ids=[self.device] if self.device.type == "cuda" else None)


def no_sync(network: object) -> AbstractContextManager[None]:
    """Within it gradients add up in each process alone: for all parts of an accumulated batch but the last."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """This process' place among those that were started together, by the environment that torchrun sets.

    Raises UsageError for a device that is not there.
    """
    world, rank, local = (int(os.environ.get(name, fallback)) for name, fallback in _VARIABLES)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(name)
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", local)
            torch.cuda.set_device(chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device is {device!r}: {str(error).splitlines()[0]}", "cpu, cuda, or auto") from None
    if world == 1:
        yield Ranks(device=chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(rank, world, chosen)
    finally:
        dist.destroy_process_group()


_VARIABLES = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
