"""diffusers, channels last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calotype.bench.peer import Clock, Draw
from calotype.bench.task import Task

if TYPE_CHECKING:
    from PIL.Image import Image


def load(task: Task, clock: Clock) -> Draw:
    with clock("import"):
        import torch
        from diffusers import DiffusionPipeline
    torch.set_num_threads(task.threads)
    with clock("load"):
        pipeline = DiffusionPipeline.from_pretrained(
            task.folder, torch_dtype=getattr(torch, task.dtype), variant=task.variant, local_files_only=True
        )
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)
        arrange(pipeline, task)
    watch(pipeline, clock)
    return drawing(pipeline, task)


def arrange(pipeline: Any, task: Task) -> None:
    """The task's sampler and decoder, and no progress bar."""
    from diffusers import AutoencoderTiny, LCMScheduler

    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if task.tiny_vae is not None:
        pipeline.vae = AutoencoderTiny.from_pretrained(task.tiny_vae, torch_dtype=pipeline.unet.dtype)


def watch(pipeline: Any, clock: Clock) -> None:
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipeline, name, None) is not None:
            clock.watch("text", getattr(pipeline, name))
    clock.watch("unet", pipeline.unet)
    clock.watch("decode", pipeline.vae.decoder)


def drawing(pipeline: Any, task: Task) -> Draw:
    import torch

    def draw(seed: int) -> Image:
        picture: Image = pipeline(
            task.prompt,
            num_inference_steps=task.steps,
            guidance_scale=task.guidance,
            width=task.width,
            height=task.height,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        return picture

    return draw
