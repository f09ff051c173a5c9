"""What a checkpoint is and what is wrong with it, without stopping at the first fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calotype.errors import CheckpointError, ModelNotFoundError
from calotype.families import family_of
from calotype.nn.clip import CLIPText
from calotype.nn.unet import UNet
from calotype.rules import shown
from calotype.schedule import NoiseSchedule
from calotype.text.tokenizer import Tokenizer
from calotype.weights import load, source
from calotype.weights.compare import check
from calotype.weights.detect import kind_of, looks_like, shapes_of
from calotype.weights.files import PICKLES, TensorInfo, header, is_finite, read, read_json, unsafe
from calotype.weights.folder import SCHEDULER, Folder, Model, available, merged_header, part_header, weight_files
from calotype.weights.habits import SORTS, habit_of
from calotype.weights.names import KINDS, Kind
from calotype.weights.pipeline import Pipeline, defaults_of, read_pipeline, with_class
from calotype.weights.single_file import SingleFile, is_unused, sections
from calotype.weights.wrapping import unwrapped

BUILDERS: dict[Kind, Callable[[dict[str, Any], str], UNet | CLIPText | load.Vae]] = {
    "unet": load.unet_of,
    "vae": load.vae_of,
    "text_encoder": load.text_encoder_of,
}
Facts = dict[str, Any]
Part = UNet | CLIPText | load.Vae


def inspect_model(ref: str | Path | None, *, revision: str | None = None, offline: bool = False) -> Facts:
    """A report, ready for JSON, on a model folder, one part of it, or one .safetensors file.

    Always: "source", "looks_like" and "problems", one line each. A whole model also has "family", "pipeline", "parts",
    "scheduler" and "defaults"; a lone part or file has "parts" with one entry. What is known to be a few-step model or
    adapter has "few_step". All weights are read once, for NaN.
    Raises ModelNotFoundError where there is nothing, UnsafeFileError for a pickle.
    """
    root = source.resolve(ref, revision=revision, offline=offline)
    if root.is_file():
        report = _inspect_file(root)
    elif not (root / "model_index.json").is_file() and (root / "config.json").is_file():
        report = _inspect_part(root)
    else:
        report = _inspect_pipeline(root)
    with _noting(report["problems"]):
        habit = next((found for sort in SORTS if (found := habit_of(sort, ref, root)) is not None), None)
        if habit is not None:
            said = {name: value for name, value in asdict(habit).items() if value is not None}
            report["few_step"] = {"title": said.pop("title"), **said}
    return report


def _inspect_file(path: Path) -> Facts:
    if path.name.endswith(PICKLES):
        raise unsafe(path)
    problems: list[str] = []
    part: Facts = {}
    likeness = "nothing known"
    shapes: dict[str, tuple[int, ...]] = {}
    with _noting(problems):
        infos = header(path)
        shapes = {name: infos[theirs].shape for name, theirs in unwrapped(infos).items()}
        part = {"kind": kind_of(shapes), **_sizes([path], infos)}
        likeness = looks_like(shapes)
        _find_not_finite([path], problems)
    report: Facts = {"source": str(path), "looks_like": likeness, "parts": {path.name: part}, "problems": problems}
    if ignored := [name for name in shapes if is_unused(name)]:
        report["ignored"] = sorted(ignored)
    return report | _inspect_model_file(path, problems) if len(sections(shapes)) > 1 else report


def _inspect_model_file(path: Path, problems: list[str]) -> Facts:
    """What a whole model in one file has more to tell."""
    single: SingleFile | None = None
    with _noting(problems):
        single = SingleFile(path)
    if single is None:
        return {}
    pipeline: Pipeline | None = None
    with _noting(problems):
        pipeline = single.pipeline()
    parts: dict[str, Facts] = {}
    networks: dict[str, Part] = {}
    for part in single.sections:
        infos = single.section(part)
        size = sum(info.bytes for info in infos.values())
        parts[part] = {"kind": KINDS[part], **_sizes([path], infos), "files": {path.name: size}}
        with _noting(problems):
            networks[part] = BUILDERS[KINDS[part]](*load.config_of(single, part))
            single.check(part, networks[part].config, load.network_shapes(networks[part]))
    report = {"parts": parts, **_model_facts(single, pipeline, networks, problems)}
    return report if pipeline is None else {"pipeline": pipeline.kind, **report}


def _inspect_part(folder: Path) -> Facts:
    problems: list[str] = []
    kind: Kind | None = None
    likeness = "nothing known"
    with _noting(problems):
        infos = merged_header(weight_files(folder, None))
        shapes = shapes_of(infos)
        kind, likeness = kind_of(shapes), looks_like(shapes)
    part, network = _part_report(kind, folder, problems) if kind else ({}, None)
    report = {"source": str(folder), "looks_like": likeness, "parts": {folder.resolve().name: {"kind": kind, **part}}}
    return report | {"problems": problems} | _unet_facts(network)


def _inspect_pipeline(root: Path) -> Facts:
    problems: list[str] = []
    report: Facts = {"source": str(root), "looks_like": "nothing known", "problems": problems}
    pipeline: Pipeline | None = None
    with _noting(problems):
        pipeline = read_pipeline(root)
    if pipeline is None:
        return report
    report["pipeline"] = pipeline.kind
    if pipeline.unused:
        report["not_used"] = [f"{part} ({remark})" for part, remark in pipeline.unused.items()]
    parts: dict[str, Facts] = {}
    networks: dict[str, Part] = {}
    for name, class_name in pipeline.classes.items():
        parts[name] = {"class": class_name}
        if name.startswith("tokenizer"):
            with _noting(problems):
                tokenizer = Tokenizer.load(root / name)
                parts[name] |= {"tokens": tokenizer.size, "length": tokenizer.length}
        elif name in KINDS:
            found, network = _part_report(KINDS[name], root / name, problems, class_name)
            parts[name] |= found
            if network is not None:
                networks[name] = network
    report["parts"] = parts

    return report | _model_facts(Folder(root), pipeline, networks, problems)


def _model_facts(model: Model, pipeline: Pipeline | None, networks: Mapping[str, Part], problems: list[str]) -> Facts:
    """What a whole model's configs say, and whether its networks fit each other."""
    report: Facts = {}
    schedule: NoiseSchedule | None = None
    with _noting(problems):
        schedule = NoiseSchedule.from_config(model.json(SCHEDULER))
        report["scheduler"] = {
            "class": schedule.kind,
            "prediction": schedule.prediction,
            "timesteps": schedule.T,
            "spacing": schedule.spacing,
            "zero_terminal_snr": bool(schedule.alpha[-1] == 0),
        }
    unet, vae = networks.get("unet"), networks.get("vae")
    report |= _unet_facts(unet)
    if pipeline is None or not isinstance(unet, UNet) or vae is None or isinstance(vae, CLIPText | UNet):
        return report
    with _noting(problems):
        encoders = [networks[name] for _, name in pipeline.text_parts if name in networks]
        if len(encoders) == len(pipeline.text_parts):
            load.check_fit(unet, vae, [encoder for encoder in encoders if isinstance(encoder, CLIPText)])
    if schedule is not None:
        with _noting(problems):
            own = model.json("calotype.json") if model.has("calotype.json") else {}
            family, place = family_of(unet.config), model.where("calotype.json")
            defaults = defaults_of(own, place, family, unet.config, schedule, vae.config.downscale)
            report["defaults"] = asdict(defaults)
    return report


def _unet_facts(unet: object) -> Facts:
    """What a U-Net's config says of the whole model."""
    if not isinstance(unet, UNet):
        return {}
    family = family_of(unet.config)
    embedding = unet.config.guidance_dim is not None
    return {
        "family": family.name,
        "looks_like": f"{family.title}, LCM with guidance embedding" if embedding else family.title,
        "guidance_embedding": embedding,
    }


def _part_report(
    kind: Kind, folder: Path, problems: list[str], class_name: str | None = None
) -> tuple[Facts, Part | None]:
    """Facts on one part, and the network without weights that its config describes; faults go to `problems`.

    `class_name` is what model_index.json calls it.
    """
    report: Facts = {}
    network: Part | None = None
    with _noting(problems):
        path = folder / "config.json"
        network = BUILDERS[kind](with_class(read_json(path), class_name), str(path))
    with _noting(problems):
        files = weight_files(folder, None)
        infos = part_header(folder, files)
        report = _sizes(files, infos) | {"variants": sorted(name for name in available(folder) if name is not None)}
        if network is not None:
            with _noting(problems):
                check(kind, infos, load.network_shapes(network), folder)
        _find_not_finite(files, problems)
    beside = sorted(path.name for path in folder.glob("*") if path.name.endswith(PICKLES))
    if beside and report:
        problems.append(f"{folder} holds pickles beside the safetensors, which are not read: {', '.join(beside[:5])}")
    return report, network


def _sizes(files: list[Path], infos: Mapping[str, TensorInfo]) -> Facts:
    dtypes = sorted({info.dtype for info in infos.values() if info.count > 0})
    return {
        "files": {path.name: path.stat().st_size for path in files},
        "tensors": len(infos),
        "parameters": sum(info.count for info in infos.values()),
        "dtypes": dtypes,
    }


def _find_not_finite(files: list[Path], problems: list[str]) -> None:
    """Reads every weight once, by mmap."""
    bad = [name for name, tensor in read(files).items() if not is_finite(tensor)]
    if bad:
        problems.append(
            f"{files[0].parent}: {len(bad)} tensors have NaN or infinite values, the first is {shown(bad[0])}"
        )


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Turns a fault into a line of the report, so that the rest is still looked at."""
    try:
        yield
    except (CheckpointError, ModelNotFoundError) as error:
        problems.append(error.message)
