"""What a run leaves behind: a model as a folder in the diffusers layout, or a LoRA in two files; and a card for either.

Whatever fails, an older result stays as it was, and where there was none, nothing is left that a loader would take for
one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calotype.errors import CheckpointError, OutputError
from calotype.lora import LoRA, LowRank
from calotype.lora.formats import DEFAULT_FILE, METADATA
from calotype.lora.names import kohya_name, ldm_names
from calotype.nn.unet import UNet
from calotype.parts import Habit, Parts
from calotype.schedule import NoiseSchedule, spaced_grid
from calotype.text.tokenizer import TABLES, clip_tables
from calotype.training.card import PEERS, Facts, Run, card, portable, settings_of
from calotype.weights import load
from calotype.weights.convert import ARCHITECTURES, PREDICTIONS, SUFFIX, WEIGHTS
from calotype.weights.files import header, is_finite
from calotype.weights.folder import SCHEDULER, TOKENIZER_FILES, Folder, Model, weight_files
from calotype.weights.habits import HABIT, to_json
from calotype.weights.single_file import SingleFile
from calotype.weights.write import Pending, write_safetensors

INDEX, CARD = "model_index.json", "README.md"
KOHYA_FILE = "kohya_lora_weights.safetensors"
STAGE = "export.part"  # where all is written before it takes its place
STEPS = 4

# What the student inherits of the teacher's scheduler: the noise levels and what the network predicts.
SCHEDULE = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "num_train_timesteps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "steps_offset",
)
CONSISTENCY = {"timestep_scaling": 10.0, "timestep_spacing": "leading", "clip_sample": False, "set_alpha_to_one": True}

# What kohya's scripts call the families (ss_base_model_version). They know no SSD-1B: where files are sorted by this,
# it goes with SDXL, whose names it has.
KOHYA_VERSIONS = {"sd15": "sd_v1", "sd21": "sd_v2", "sdxl": "sdxl_base_v1-0", "ssd1b": "sdxl_base_v1-0"}


def export(parts: Parts, result: UNet | LoRA, output: Path, run: Run, dtype: torch.dtype = torch.float16) -> Path:
    """Writes what a student has become into the folder `output`, and gives that. `parts` are the teacher's.

    Raises CheckpointError for weights that `dtype` cannot hold, OutputError where it cannot be written.
    """
    if isinstance(result, LoRA):
        return export_adapter(parts, result, output, run, dtype)
    return export_model(parts, result, output, run, dtype)


# ---- a model ----


def export_model(parts: Parts, unet: UNet, output: Path, run: Run, dtype: torch.dtype = torch.float16) -> Path:
    """Writes a student's U-Net, which has a guidance embedding, with the teacher's other parts.

    Those are copied byte for byte from a folder, and written as they are from a single file.
    """
    weights = unet.state_dict()
    teacher = load.open_model(Path(parts.source), run.variant)
    config = {**teacher.json("unet/config.json"), "time_cond_proj_dim": unet.config.guidance_dim}
    config.pop("_name_or_path", None)  # a place on the machine of whoever wrote it
    assert load.network_shapes(load.unet_of(config, str(output))) == load.network_shapes(unet)
    _check(weights, dtype)
    settings = settings_of(run.history)
    scheduler = _scheduler(parts, settings)
    facts = _facts(parts, output, run)
    with _staged(output, INDEX) as folder:
        _write_others(teacher, parts, folder, run.variant)
        (folder / "unet").mkdir()
        tensors = {name: Pending.of(tensor.detach(), dtype) for name, tensor in weights.items()}
        write_safetensors(folder / "unet" / f"{WEIGHTS['unet']}{SUFFIX}", tensors, {})
        _write(folder / "unet" / "config.json", config)
        (folder / "scheduler").mkdir()
        _write(folder / SCHEDULER, scheduler)
        _write(folder / "calotype.json", _defaults(facts, settings))
        _write(folder / "distillation.json", list(run.history))  # how it was made
        (folder / CARD).write_text(card(facts), encoding="utf-8")
        _write(folder / INDEX, _index(teacher, parts, settings["sampler"], scheduler["_class_name"]))
    return output


def _scheduler(parts: Parts, settings: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' scheduler for the sampler that the student is for, on the teacher's noise levels."""
    kind, options, _ = PEERS[settings["sampler"]]
    own = options if options else CONSISTENCY | {"original_inference_steps": settings["num_ddim_timesteps"]}
    config = {
        "_class_name": kind,
        **own,
        **{name: parts.scheduler[name] for name in SCHEDULE if name in parts.scheduler},
    }
    alpha = parts.schedule.alpha
    if torch.equal(NoiseSchedule.from_config(config).alpha, alpha):
        return config
    # The teacher leaves out what its class has another default for than the student's: say the levels themselves.
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), alpha.double() ** 2])
    config |= {"trained_betas": (1 - alpha_bar[1:] / alpha_bar[:-1]).tolist(), "rescale_betas_zero_snr": False}
    return config


def _defaults(facts: Facts, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sampler": settings["sampler"],
        "steps": facts.steps,
        "guidance": facts.guidance,
        "width": facts.side,
        "height": facts.side,
        "guidance_range": [1 + settings["w_min"], 1 + settings["w_max"]],
    }


def _index(teacher: Model, parts: Parts, sampler: str, scheduler: str) -> dict[str, Any]:
    """model_index.json, with no part that was not written (a safety checker, an image encoder)."""
    raw, xl = teacher.json(INDEX), _xl(parts)
    if parts.inpaints:
        kind = f"StableDiffusion{'XL' if xl else ''}InpaintPipeline"
    elif xl:
        kind = "StableDiffusionXLPipeline"
    else:  # the former takes no scheduler but LCM's
        kind = "LatentConsistencyModelPipeline" if sampler == "lcm" else "StableDiffusionPipeline"
    index = {"_class_name": kind, "_diffusers_version": raw.get("_diffusers_version", "0.35.0")}
    index |= {part: raw[part] for part in teacher.pipeline().classes} | {"scheduler": ["diffusers", scheduler]}
    if xl:
        return index | {"force_zeros_for_empty_prompt": parts.zero_empty_negative}
    nothing = [None, None]
    return index | {"safety_checker": nothing, "feature_extractor": nothing, "requires_safety_checker": False}


def _xl(parts: Parts) -> bool:
    return len(parts.text.models) == 2


def _write_others(teacher: Model, parts: Parts, folder: Path, variant: str | None) -> None:
    """The text encoders, their tokenizers and the autoencoder, as the teacher has them."""
    others = [part for part in teacher.pipeline().classes if part not in ("unet", "scheduler")]
    for part in others:
        (folder / part).mkdir()
    if isinstance(teacher, Folder):
        for part in others:
            _copy(teacher.folder(part), folder / part, variant)
        return
    assert isinstance(teacher, SingleFile)
    networks = {"vae": parts.vae} | dict(zip(("text_encoder", "text_encoder_2"), parts.text.models, strict=False))
    for part, network in networks.items():
        shapes = load.network_shapes(network)
        matched, tensors = teacher.weights(part, network.config, shapes)
        pending = {ours: Pending.of(tensors[name].reshape(shapes[ours])) for name, ours in matched.items()}
        write_safetensors(folder / part / f"{WEIGHTS.get(part, 'model')}{SUFFIX}", pending, {})
    for name, text in teacher.texts().items():
        if name.partition("/")[0] in others:
            (folder / name).write_text(text, encoding="utf-8")
    for part in (part for part in others if part.startswith("tokenizer")):
        if not any((folder / part / name).is_file() for name in TABLES):
            for name, text in clip_tables().items():
                (folder / part / name).write_text(text, encoding="utf-8")


def _copy(source: Path, target: Path, variant: str | None) -> None:
    """A part of a folder, the bytes of its files: of the weights those that were loaded, under their plain names."""
    for name in (*TOKENIZER_FILES, *TABLES) if target.name.startswith("tokenizer") else ("config.json",):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)  # it follows the links of a Hub cache
    if target.name.startswith("tokenizer"):
        return
    files, stem = weight_files(source, variant), WEIGHTS.get(target.name, "model")
    if len(files) == 1:
        shutil.copyfile(files[0], target / f"{stem}{SUFFIX}")
        return
    held: dict[str, str] = {}
    size = 0
    for number, file in enumerate(files, start=1):
        name = f"{stem}-{number:05d}-of-{len(files):05d}{SUFFIX}"
        shutil.copyfile(file, target / name)
        found = header(file)
        held |= dict.fromkeys(found, name)
        size += sum(info.bytes for info in found.values())
    _write(target / f"{stem}{SUFFIX}.index.json", {"metadata": {"total_size": size}, "weight_map": held})


# ---- a LoRA ----


def export_adapter(parts: Parts, lora: LoRA, output: Path, run: Run, dtype: torch.dtype = torch.float16) -> Path:
    """Writes an adapter of the teacher's U-Net under two namings.

    `pytorch_lora_weights.safetensors` has the names of diffusers and PEFT, and says in its header how PEFT would have
    trained it: there diffusers and we find alpha. `kohya_lora_weights.safetensors` has those of kohya's scripts, with
    an alpha for each layer.
    """
    deltas: dict[str, LowRank] = {}
    for parameter, delta in lora.deltas["unet"].items():
        assert isinstance(delta, LowRank)
        assert delta.mid is None
        deltas[parameter.removesuffix(".weight")] = delta
    _check({f"{name}.{i}": factor for name, delta in deltas.items() for i, factor in enumerate(delta.tensors())}, dtype)
    ((rank, alpha),) = {(len(delta.down), delta.ratio * len(delta.down)) for delta in deltas.values()}
    facts = _facts(parts, output, run)
    with _staged(output, DEFAULT_FILE) as folder:
        _write(folder / "training.json", list(run.history))  # how it was made
        (folder / CARD).write_text(card(facts), encoding="utf-8")
        tensors = _kohya_tensors(parts.unet, deltas, alpha, _xl(parts), dtype)
        own = Habit(facts.settings["sampler"], facts.steps, facts.guidance, tuple(facts.grid) or None)
        habit = {HABIT: to_json(own)}
        write_safetensors(folder / KOHYA_FILE, tensors, _kohya_metadata(parts, facts, rank, alpha) | habit)
        config = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": [*deltas]}
        peft = {METADATA: json.dumps(config)}
        write_safetensors(folder / DEFAULT_FILE, _peft_tensors(deltas, dtype), peft | habit)
    return output


def _peft_tensors(deltas: Mapping[str, LowRank], dtype: torch.dtype) -> dict[str, Pending]:
    found = {}
    for module, delta in deltas.items():
        for name, factor in (("lora_A", delta.down), ("lora_B", delta.up)):
            found[f"unet.{module}.{name}.weight"] = Pending.of(factor.detach(), dtype)
    return found


def _kohya_tensors(
    unet: UNet, deltas: Mapping[str, LowRank], alpha: float, xl: bool, dtype: torch.dtype
) -> dict[str, Pending]:
    """SDXL's modules have LDM's names there, those of Stable Diffusion diffusers'."""
    ldm = ldm_names(unet) if xl else {}
    found = {}
    for module, delta in deltas.items():
        key = kohya_name("unet", module, ldm)
        found[f"{key}.lora_down.weight"] = Pending.of(delta.down.detach(), dtype)
        found[f"{key}.lora_up.weight"] = Pending.of(delta.up.detach(), dtype)
        found[f"{key}.alpha"] = Pending.of(torch.tensor(alpha))  # exact, which a large rank need not be in `dtype`
    return found


def _kohya_metadata(parts: Parts, facts: Facts, rank: int, alpha: float) -> dict[str, str]:
    """A header as kohya's scripts write it, by which other programs sort and show a LoRA; without times."""
    settings, run = facts.settings, facts.run
    velocity = parts.schedule.prediction == "v_prediction"
    said: dict[str, object] = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps({"conv_dim": str(rank), "conv_alpha": f"{alpha:g}"}),
        "ss_v2": parts.family == "sd21",
        "ss_output_name": facts.name,
        "ss_sd_model_name": facts.base,
        "ss_learning_rate": settings["learning_rate"],
        "ss_lr_scheduler": settings["lr_scheduler"],
        "ss_lr_warmup_steps": settings["lr_warmup_steps"],
        "ss_optimizer": settings["optimizer"],
        "ss_max_grad_norm": settings["max_grad_norm"],
        "ss_mixed_precision": settings["mixed_precision"],
        "ss_batch_size_per_device": settings["train_batch_size"],
        "ss_gradient_accumulation_steps": settings["gradient_accumulation_steps"],
        "ss_gradient_checkpointing": settings["gradient_checkpointing"],
        "ss_resolution": f"({facts.side}, {facts.side})",
        "ss_max_train_steps": settings["max_train_steps"],
        "ss_steps": run.step,
        "ss_seed": settings["seed"],
        "ss_training_comment": None if run.command is None else portable(run.command),
        "ss_num_train_images": run.pictures,
        # Stability's Model Spec (github.com/Stability-AI/ModelSpec)
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": facts.name,
        # the names of the file's layers are those of this code
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if _xl(parts) else "diffusers",
        "modelspec.resolution": f"{facts.side}x{facts.side}",
        "modelspec.prediction_type": PREDICTIONS.get(parts.schedule.prediction, parts.schedule.prediction),
        "modelspec.usage_hint": f"{facts.steps} steps of {settings['sampler']} at guidance {facts.guidance:g}",
        "modelspec.tags": "lcm-lora",
        "modelspec.license": facts.licence.get("license"),
        "modelspec.date": run.date,
    }
    if (version := KOHYA_VERSIONS.get(parts.family)) is not None:
        said["ss_base_model_version"] = f"{version}_v" if velocity and parts.family == "sd21" else version
        said["modelspec.architecture"] = f"{_architecture(parts, velocity)}/lora"
    return {name: str(value) for name, value in said.items() if value is not None}


def _architecture(parts: Parts, velocity: bool) -> str:
    if parts.family == "sd21" and velocity:
        return "stable-diffusion-v2-768-v"
    return ARCHITECTURES.get(parts.family, "ssd-1b") + ("-inpainting" if parts.inpaints else "")


# ---- what both have ----


def _check(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Refuses numbers that `dtype` cannot hold, before anything is written."""
    for name, tensor in tensors.items():
        if not is_finite(tensor.detach().to(dtype)):
            if is_finite(tensor):
                kind = str(dtype).removeprefix("torch.")
                raise CheckpointError(
                    f"the trained {name} has values beyond {kind}",
                    "write it in bfloat16 or float32: its checkpoint stays",
                )
            raise CheckpointError(
                f"the trained {name} has NaN or infinite values", "go on from an older checkpoint at a lower rate"
            )


def _facts(parts: Parts, output: Path, run: Run) -> Facts:
    settings = settings_of(run.history)
    low, high = 1 + settings["w_min"], 1 + settings["w_max"]
    embedded = not settings["lora"] or parts.unet.config.guidance_dim is not None
    phased = settings["objective"] == "pcm"
    steps = settings["phases"] if phased else STEPS
    return Facts(
        run=run,
        name=name_of(output),
        base=name_of(run.teacher),
        data=None if run.data is None else name_of(run.data),
        xl=_xl(parts),
        steps=steps,
        guidance=min(max(parts.defaults.guidance, low), high) if embedded else 1.0,
        side=parts.defaults.width if settings["resolution"] is None else settings["resolution"],
        grid=spaced_grid(steps, parts.schedule.T, "trailing") if phased else (),
        inpaints=parts.inpaints,
        licence=_licence(Path(parts.source)),
    )


def name_of(ref: str | Path) -> str:
    """What a model or data is called, without its place on this machine: the last name of a path, or a Hub id."""
    path = Path(ref).expanduser()
    if not (path.is_absolute() or os.path.exists(path)) and isinstance(ref, str):
        return ref
    path = Path(os.path.abspath(path))  # not resolved: a link's own name is what the user chose
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.removeprefix("models--").replace("--", "/", 1)
    return path.name


def _licence(source: Path) -> dict[str, str]:
    """What the card in the teacher's folder says of its licence."""
    file = source / CARD
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8", errors="replace") as opened:
        front = re.match(r"---\n(.*?)\n---", opened.read(100_000), re.DOTALL)
    found = {} if front is None else dict(_LICENCE.findall(front[1]))
    return {key: value.strip("\"'") for key, value in found.items()} if "license" in found else {}


_LICENCE = re.compile(r"^(license|license_name|license_link):[ ]*([\"']?[\w:/.+-]+[\"']?)[ ]*$", re.MULTILINE)


@contextmanager
def _staged(output: Path, last: str) -> Iterator[Path]:
    """A folder to write to, whose contents then take their places in `output`, `last` the last: the sign of a whole
    result. Raises OutputError for what the system refuses.
    """
    stage = output / STAGE
    try:
        shutil.rmtree(stage, ignore_errors=True)  # a killed run's
        stage.mkdir()
        try:
            yield stage
            for file in (path for path in stage.rglob("*") if path.is_file()):
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            (output / last).unlink(missing_ok=True)
            for entry in sorted(stage.iterdir(), key=lambda entry: (entry.name == last, entry.name)):
                if (output / entry.name).is_dir():
                    shutil.rmtree(output / entry.name)
                entry.replace(output / entry.name)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except (OSError, OutputError) as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error
        reason = (getattr(cause, "strerror", None) or str(error)).lower()
        raise OutputError(
            f"the result cannot be written to {str(output)!r}: {reason}",
            "its checkpoint is as it was: make room, and go on with --resume",
        ) from error


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
