"""calotype itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calotype.bench.peer import Clock, Draw
from calotype.bench.task import Task

if TYPE_CHECKING:
    from torch import nn


def load(task: Task, clock: Clock) -> Draw:
    with clock("import"):
        import torch

        import calotype.engine
    torch.set_num_threads(task.threads)
    with clock("load"):
        engine = calotype.engine.load(
            task.folder,
            tiny_vae=task.tiny_vae,
            decoder="full" if task.tiny_vae is None else "tiny",
            device="cpu",
            dtype=task.dtype,
            variant=task.variant,
            optimize=task.optimize,
            offline=True,
        )
    parts = engine.parts
    for encoder in parts.text.models:
        clock.watch("text", encoder)
    clock.watch("unet", parts.unet)
    vae = parts.vae if task.tiny_vae is None else parts.tiny_vae
    assert vae is not None
    clock.watch("decode", vae.decoder)
    if task.count:
        _count(parts.unet, clock)
    fields: dict[str, Any] = {"steps": task.steps, "guidance": task.guidance, "sampler": "lcm"}
    fields |= {"width": task.width, "height": task.height}
    return lambda seed: engine(task.prompt, seed=seed, **fields).image


def _count(unet: nn.Module, clock: Clock) -> None:
    """The arithmetic of a call, as PyTorch counts it."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)

    def end(*_: Any) -> None:
        counter.__exit__(None, None, None)
        clock.flops = counter.get_total_flops()

    unet.register_forward_pre_hook(lambda *_: counter.__enter__() and None)
    unet.register_forward_hook(end)
