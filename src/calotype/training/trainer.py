"""The training loop of consistency distillation: a generator, so that the caller draws the progress.

One process or many (calotype.training.ranks), a full U-Net or a LoRA. What a step sees is a pure function of the seed
and the step's number, so a run can be stopped at any moment and resumed from its newest checkpoint; on a CPU the
resumed run is the uninterrupted one, bit for bit.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calotype.atomic import make_folder
from calotype.errors import CalotypeError, CalotypeWarning, CheckpointError, UsageError
from calotype.parts import Parts
from calotype.precision import DTYPES, warn_of_emulation
from calotype.schedule import NoiseSchedule
from calotype.training import checkpoint
from calotype.training.card import Run
from calotype.training.dataset import Dataset, Samples, prepare
from calotype.training.export import export
from calotype.training.logs import Log
from calotype.training.loss import Batch, Objective, consistency_loss
from calotype.training.ranks import Ranks, no_sync, process_group
from calotype.training.settings import Settings, TrainStep
from calotype.training.sources import open_source
from calotype.training.students import FullStudent, LoraStudent, Student, whole
from calotype.training.validate import Reading, Validation, is_hopeless, kept
from calotype.weights.load import load_parts

# These may change when a run is resumed, and nothing is said: they say how long it runs, not what a step is.
FREE = (
    *("max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "validation_samples"),
    *("patience", "sampler", "gradient_checkpointing", "compile", "fsdp"),
)
FEWEST = 3  # captions that a distance can be had of
FIXED = ("objective", "lora", "lora_rank")  # these may not


@dataclass
class State:
    """Everything that changes while training."""

    student: Student
    optimizer: torch.optim.Optimizer
    history: list[dict[str, Any]]  # the settings, and from which step on they held
    step: int = 0
    loss: float | None = None  # of the newest step
    readings: list[Reading] = field(default_factory=list)

    def chosen(self) -> Reading | None:
        """The reading whose weights are the result; None where the last step was not validated, which is it then."""
        validated = bool(self.readings) and self.readings[-1].step == self.step
        return kept(self.readings) if validated else None

    def tensors(self) -> dict[str, Tensor]:
        """All of it that is a tensor, by name, in place."""
        files = self.student.files()
        found = {f"{kind}.{name}": tensor for kind, tensors in files.items() for name, tensor in tensors.items()}
        names = {id(parameter): name for name, parameter in self.student.module.named_parameters()}
        for parameter, moments in self.optimizer.state.items():
            found |= {f"optimizer.{names[id(parameter)]}.{key}": moment for key, moment in moments.items()}
        return found


def distill(
    teacher: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    student: str | Path | None = None,
    resume: bool = False,
    cache: str | Path | None = None,
    device: str = "auto",
    offline: bool = False,
    stop: Callable[[], bool] = lambda: False,
    command: str | None = None,
    dtype: str = "float16",
    **settings: object,
) -> Iterator[TrainStep]:
    """Distils a latent consistency model from `teacher` on `data`.

    `data` is a folder of captioned pictures, WebDataset tars, or a file of prompts whose pictures the teacher draws
    (calotype.training.sources). `settings` are the fields of Settings. `output` becomes a model folder in the diffusers
    layout, written at the end; with `lora` it gets `pytorch_lora_weights.safetensors` instead, for the teacher and its
    kin, and the same for other programs in `kohya_lora_weights.safetensors`. Its `checkpoints` hold what a resumed run
    needs; `cache` (in `output` if None) the encoded pictures and captions. `student` is a latent consistency model of
    that teacher to go on from; without one the student starts as the teacher. When `stop` says so, the run is saved at
    the end of a step and ends. `command` is how the run was started, for the model card; `dtype` that of the files.
    Started by torchrun, it trains in all the processes.

    Raises UsageError for bad settings or data and where `output` is not empty, CheckpointError for a teacher that
    cannot be distilled, OutputError where nothing can be written.
    """
    try:
        chosen = Settings(**settings)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(str(error).replace("Settings.__init__() ", "")) from None
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}: must be one of {', '.join(DTYPES)}")
    if student is not None and chosen.lora:
        raise UsageError("a LoRA has no student to go on from", hint="leave out student, or lora")
    with process_group(device) as ranks:
        if chosen.fsdp and ranks.world == 1:
            raise UsageError("fsdp takes several processes", hint="start it with torchrun --nproc-per-node N")
        output = Path(output)
        if ranks.first:
            if chosen.mixed_precision == "bf16":
                warn_of_emulation(ranks.device, "mixed_precision bf16", "mixed_precision no")
            _check_output(output, resume)
        ranks.barrier()
        encoded = output / "cache" if cache is None else Path(cache)
        source = open_source(Path(data), encoded)
        parts = load_parts(str(teacher), offline=offline, device=ranks.device)
        _check_teacher(parts, str(teacher), chosen)
        chosen = replace(chosen, resolution=chosen.resolution or parts.defaults.width)

        dataset: Dataset | None = None
        for progress in prepare(parts, source, chosen, encoded, ranks):
            if isinstance(progress, Dataset):
                dataset = progress
            else:
                yield TrainStep("encode", progress, None)
        assert dataset is not None

        first = None if student is None else load_parts(str(student), offline=offline, device=ranks.device).unet
        state = start(make_student(parts, chosen, first), chosen, ranks)
        found = ranks.broadcast(checkpoint.newest(output / "checkpoints") if ranks.first and resume else None)
        if found is not None:
            _restore(state, found, chosen, ranks)
        yield from _run(state, parts, dataset, chosen, output, ranks, stop)
        if state.step < chosen.max_train_steps and not is_hopeless(state.readings, chosen.patience):
            yield TrainStep("stopped", state.step, chosen.max_train_steps)
            return
        outcome = state.student.outcome()
        if ranks.first:
            run = _described(state, str(teacher), str(data), command, len(dataset))
            export(parts, outcome, output, run, DTYPES[dtype])
        ranks.barrier()
        yield TrainStep("done", state.step, chosen.max_train_steps)


def make_student(parts: Parts, settings: Settings, first: nn.Module | None = None) -> Student:
    """The student that the settings ask for, before its first step."""
    if settings.lora:
        student: Student = LoraStudent(parts, settings.lora_rank, settings.seed, averaged=settings.ema_decay > 0)
    else:
        student = FullStudent(parts.unet, first)  # type: ignore[arg-type]
    if settings.mixed_precision == "bf16":
        parts.unet.to(torch.bfloat16)  # the teacher is frozen; what is trained was made of it in float32, and stays so
    if settings.gradient_checkpointing:
        student.checkpoint_activations()
    if settings.compile:
        student.compile()
    return student


def start(student: Student, settings: Settings, ranks: Ranks) -> State:
    """Before the first step: the networks are spread over the processes, and the optimizer knows their parameters."""
    if settings.fsdp:
        assert isinstance(student, FullStudent)
        student.shard()
    else:
        student.network = ranks.data_parallel(student.module)
    history = [{"from_step": 0, "processes": ranks.world, **asdict(settings)}]
    return State(student, _optimizer(student, settings), history)


def _optimizer(student: Student, settings: Settings) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": settings.rate(0), "weight_decay": settings.adam_weight_decay}
    if settings.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
        except ImportError:
            message = "adamw8bit needs bitsandbytes, which is not installed"
            raise UsageError(message, "pip install bitsandbytes") from None
        optimizer: torch.optim.Optimizer = AdamW8bit(student.parameters, **options)
        return optimizer
    return torch.optim.AdamW(student.parameters, fused=not settings.fsdp, **options)


# ---- the loop ----


def _run(
    state: State,
    parts: Parts,
    dataset: Dataset,
    settings: Settings,
    output: Path,
    ranks: Ranks,
    stop: Callable[[], bool],
) -> Iterator[TrainStep]:
    """Trains to the last step, or until it is told to stop or no longer worth it; saves and validates on the way."""
    validation, last, told = None, state.step >= settings.max_train_steps, False
    if settings.validation_steps and settings.objective != "lcf":  # which has no teacher to compare with
        validation = Validation(parts, state.student, dataset.held_out, settings, output, ranks)
        if len(validation.prompts) < FEWEST:
            if ranks.first:
                message = f"{len(validation.prompts)} captions are too few to validate with: nothing is held out"
                warnings.warn(message, CalotypeWarning, stacklevel=2)
            validation = None
    with Log(output, state.step, ranks) as log:
        if validation is not None:
            for count in validation.start():
                yield TrainStep("validate", count, len(validation.prompts))
        for report in train(state, parts.schedule, dataset, settings, ranks):
            log.write(report)
            yield report
            last = report.step == settings.max_train_steps
            told = ranks.all_reduce([float(stop())])[0] > 0
            due = report.step % settings.checkpointing_steps == 0 or last or told
            if validation is not None and (report.step % validation.every == 0 or last):
                for found in validation.measure(report.step):
                    if isinstance(found, Reading):
                        state.readings.append(found)
                        log.write(found.report(settings))
                        yield found.report(settings)
                    else:
                        yield TrainStep("validate", found, len(validation.prompts))
                due = True
            if due:
                _save(state, settings, output, ranks)
                yield TrainStep("save", report.step, settings.max_train_steps)
            if told or is_hopeless(state.readings, settings.patience):
                break
    best = state.chosen()
    if best is not None and best.step != state.step and (last or not told):
        message = f"the weights of step {best.step} are kept: held-out pictures were measurably worse after it"
        if ranks.first:
            warnings.warn(message, CalotypeWarning, stacklevel=2)
        checkpoint.read(output / "checkpoints" / f"step-{best.step:08d}", state.tensors(), ranks)


def train(
    state: State, schedule: NoiseSchedule, dataset: Dataset, settings: Settings, ranks: Ranks
) -> Iterator[TrainStep]:
    """Steps of training until `max_train_steps`; `state` is up to date whenever a TrainStep is yielded."""
    student, trained = state.student, state.student.parameters
    schedule = schedule.to(ranks.device)
    objective = Objective(
        settings.objective,
        settings.phases,
        settings.loss_type,
        settings.huber_c,
        settings.skipping_step,
        settings.solver_substeps,
        settings.num_ddim_timesteps,
    )
    parts = settings.gradient_accumulation_steps
    size = settings.train_batch_size * parts * ranks.world
    while state.step < settings.max_train_steps:
        started = time.perf_counter()
        for group in state.optimizer.param_groups:
            group["lr"] = settings.rate(state.step)
        state.optimizer.zero_grad(set_to_none=True)
        total, names = 0.0, list[str]()
        for part in range(parts):
            here = slice(*((part * ranks.world + ranks.rank + i) * settings.train_batch_size for i in (0, 1)))
            samples = dataset.samples(settings.seed, state.step, size, here)
            batch = make_batch(samples, settings, state.step * size + here.start, trained[0])
            with (
                nullcontext() if part + 1 == parts else no_sync(student.network),
                torch.autocast(ranks.device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16"),
            ):
                losses = consistency_loss(student.network, student.target, student.teacher, schedule, batch, objective)
            finite = torch.isfinite(losses)
            if not finite.all():
                names.append(samples.names[int((~finite).int().argmax())])
            total += float(losses.detach().sum())
            (losses.mean() / parts).backward()  # type: ignore[no-untyped-call]
        loss, bad = ranks.all_reduce([total, float(len(names))])
        if bad:
            where = f"on {names[0]!r} " if names else "in another process "
            raise CalotypeError(
                f"step {state.step + 1}: the loss {where}is not a finite number",
                hint="the checkpoints are as they were: go on with --resume and a lower --learning-rate",
            )
        norm = whole(nn.utils.clip_grad_norm_(trained, settings.max_grad_norm))
        state.optimizer.step()
        student.follow(settings.ema_decay)
        state.step, state.loss = state.step + 1, loss / size
        speed = size / (time.perf_counter() - started)
        rate = state.optimizer.param_groups[0]["lr"]
        yield TrainStep("train", state.step, settings.max_train_steps, state.loss, float(norm), rate, speed)


def make_batch(samples: Samples, settings: Settings, first: int, like: Tensor) -> Batch:
    """The examples `first`, `first` + 1, ... of a run: every random choice of example i is a function of (seed, i)."""
    count = len(samples.latents)
    draws = [_draws(settings, first + i, samples.latents.shape[1:]) for i in range(count)]
    noise, numbers = torch.stack([noise for noise, _ in draws]), torch.stack([numbers for _, numbers in draws])
    where, w, share = numbers.unbind(1)
    index = (where**settings.timestep_power * settings.num_ddim_timesteps).long()
    kind = torch.promote_types(like.dtype, torch.float32)
    return Batch(
        samples.latents.to(like.device, kind),
        noise.to(like.device, kind),
        index.clamp(max=settings.num_ddim_timesteps - 1).to(like.device),
        (settings.w_min + (settings.w_max - settings.w_min) * w).to(like.device, kind),
        samples.conditioning.to(like.device, kind),
        samples.null.to(like.device, kind),
        share.to(like.device, kind),
        None if samples.masked is None else samples.masked.to(like.device, kind),
    )


def _draws(settings: Settings, i: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Example i's noise, and its three uniform numbers: timestep, w, and how far down a trajectory ends."""
    generator = torch.Generator().manual_seed((settings.seed << 40) + i)
    return torch.randn(shape, generator=generator), torch.rand(3, generator=generator)


# ---- beginning, going on, ending ----


def _save(state: State, settings: Settings, output: Path, ranks: Ranks) -> None:
    readings = [asdict(reading) for reading in state.readings]
    saved = {"step": state.step, "history": state.history, "readings": readings}
    folder = output / "checkpoints"
    checkpoint.write(folder, state.step, state.tensors(), saved, ranks)
    best = kept(state.readings)
    if ranks.first:
        checkpoint.prune(folder, settings.checkpoints_total_limit, None if best is None else best.step)
    ranks.barrier()


def _restore(state: State, folder: Path, settings: Settings, ranks: Ranks) -> None:
    saved = checkpoint.state_of(folder)
    state.step, state.history = saved["step"], saved["history"]
    state.readings = [Reading(**reading) for reading in saved["readings"]]
    now = {"processes": ranks.world, **asdict(settings)}
    before = {"processes": 1, **asdict(Settings()), **state.history[-1]}  # an older run knows fewer settings
    for name in FIXED:
        if now[name] != before[name]:
            raise UsageError(f"{name} is {now[name]}, and the run in this folder has {before[name]}: they must agree")
    changed = [name for name in now if now[name] != before[name] and name not in FREE]
    if changed:
        what = ", ".join(f"{name} {before[name]} -> {now[name]}" for name in changed)
        message = f"from step {state.step} on the settings differ from the run's so far: {what}"
        warnings.warn(message, CalotypeWarning, stacklevel=3)
    if now != {name: before[name] for name in now}:
        state.history.append({"from_step": state.step, **now})
    _fill_moments(state.optimizer)
    checkpoint.read(folder, state.tensors(), ranks)


def _fill_moments(optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimizer its moments before the first step, to be read into: those of a step without a gradient."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _described(state: State, teacher: str, data: str, command: str | None, pictures: int) -> Run:
    best = state.chosen()
    distances = [(reading.step, reading.distance, reading.error) for reading in state.readings]
    return Run(
        teacher,
        state.history,
        state.step if best is None else best.step,
        command,
        data,
        pictures,
        state.loss,
        distances,
    )


def _check_teacher(parts: Parts, teacher: str, settings: Settings) -> None:
    embedded = parts.unet.config.guidance_dim is not None
    if embedded and settings.objective != "lcf":
        raise CheckpointError(
            f"{teacher} is already a latent consistency model",
            hint="distil from an ordinary model; or tune this one on pictures, with --objective lcf",
        )


def _check_output(output: Path, resume: bool) -> None:
    if output.is_dir() and any(output.iterdir()) and not resume:
        raise UsageError(f"{output} is not empty", hint="--resume goes on with the run in it; or choose another folder")
    make_folder(output)
