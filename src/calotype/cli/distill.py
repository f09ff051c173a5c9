"""calotype distill: a latent consistency model out of an ordinary one and a folder of captioned pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calotype.cli import parse
from calotype.cli.progress import progress


def distill(
    teacher: Annotated[str, typer.Argument(help="The model to distil: a folder or a Hub id.", show_default=False)],
    data: Annotated[Path, typer.Argument(help="A folder of captioned pictures.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to make.", show_default=False)
    ],
    student: Annotated[
        str | None, typer.Option(metavar="M", help="An LCM of that teacher to go on from.", show_default=False)
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Train an LCM-LoRA for the teacher and its kin, not a whole network.")
    ] = False,
    lora_rank: Annotated[int, typer.Option(metavar="R", help="Of the LoRA.")] = 64,
    max_train_steps: Annotated[int, typer.Option(metavar="N", help="Updates of the network.")] = 1000,
    train_batch_size: Annotated[int, typer.Option(metavar="B", help="Pictures an update.")] = 12,
    learning_rate: Annotated[
        float | None, typer.Option(parser=parse.number, metavar="R", help="Adam's rate [default: 1e-5, LoRA 1e-4].")
    ] = None,
    lr_scheduler: Annotated[str, typer.Option(metavar="NAME", help="constant, or cosine: falls to zero.")] = "constant",
    lr_warmup_steps: Annotated[int, typer.Option(metavar="N", help="Updates over which the rate rises.")] = 50,
    resolution: Annotated[
        int | None, typer.Option(metavar="P", help="Pixels (the teacher's own size).", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Of every random choice.")] = 0,
    w_min: Annotated[float, typer.Option(parser=parse.number, metavar="W", help="Least guidance - 1.")] = 3.0,
    w_max: Annotated[float, typer.Option(parser=parse.number, metavar="W", help="Greatest guidance - 1.")] = 15.0,
    skipping_step: Annotated[int, typer.Option(metavar="K", help="Timesteps that the teacher jumps.")] = 20,
    solver_substeps: Annotated[int, typer.Option(metavar="N", help="Steps in which it jumps.")] = 1,
    timestep_power: Annotated[
        float, typer.Option(parser=parse.number, metavar="P", help="Above 1: more of the less noisy timesteps.")
    ] = 1.0,
    ema_decay: Annotated[float, typer.Option(parser=parse.number, metavar="D", help="Of the target network.")] = 0.95,
    huber_c: Annotated[float, typer.Option(parser=parse.number, metavar="C", help="Of the pseudo-Huber loss.")] = 0.001,
    mixed_precision: Annotated[str, typer.Option(metavar="KIND", help="no, or bf16.")] = "no",
    sampler: Annotated[str, typer.Option(metavar="S", help="The finished model's default: lcm, tcd.")] = "lcm",
    checkpointing_steps: Annotated[int, typer.Option(metavar="N", help="Updates between checkpoints.")] = 500,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUT, or start.")
    ] = False,
    device: Annotated[str, typer.Option(metavar="D", help="auto, cpu, cuda.")] = "auto",
    offline: Annotated[bool, typer.Option("--offline", help="Use only models that are on this machine.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Distil a latent consistency model: few steps instead of many. Prints the folder when it is done."""
    import calotype

    run = calotype.distill(
        teacher,
        data,
        output,
        student=student,
        resume=resume,
        device=device,
        offline=offline,
        lora=lora,
        lora_rank=lora_rank,
        max_train_steps=max_train_steps,
        train_batch_size=train_batch_size,
        learning_rate=learning_rate,
        lr_scheduler=lr_scheduler,
        lr_warmup_steps=lr_warmup_steps,
        resolution=resolution,
        seed=seed,
        w_min=w_min,
        w_max=w_max,
        skipping_step=skipping_step,
        solver_substeps=solver_substeps,
        timestep_power=timestep_power,
        ema_decay=ema_decay,
        huber_c=huber_c,
        mixed_precision=mixed_precision,
        sampler=sampler,
        checkpointing_steps=checkpointing_steps,
    )
    with progress(quiet=quiet) as show:
        show("loading the teacher")
        for step in run:
            if step.stage == "encode":
                show(f"encoding pictures: {step.step}", step.step, step.total)
            elif step.stage == "train":
                show(f"loss {step.loss:.4f}, {step.samples_per_second:.1f} pictures/s", step.step, step.total)
    print(output)
