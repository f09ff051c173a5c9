"""The public surface, frozen: a name or an option changes here on purpose or not at all."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from typer.main import get_command

import calotype
from calotype import cli

ROOT = Path(__file__).resolve().parent.parent

NAMES = """
    load load_from Engine Batch Request Control Result Step distill canny open_image
    CalotypeError UsageError ModelNotFoundError CheckpointError UnsafeFileError OutputError CalotypeWarning
    __version__
"""

OPTIONS = {
    "generate": """
        prompt --output -o --model --unet --vae --tiny-vae --decoder --variant --revision --prediction --steps
        --guidance --guidance-steps --seed --size -n --negative --image --strength --mask --mask-feather --mask-crop
        --resize --lora --control --embedding --motion --frames --fps --sampler --gamma --spacing --guidance-mode
        --timesteps --clip-skip --emphasis --no-emphasis --like --device --dtype --optimize --offline --json --quiet -q
        --debug
    """,
    "show": "file --json --debug",
    "inspect": "model --json --revision --offline --debug",
    "convert": "model output --dtype --half --force --prediction --variant --revision --offline --debug",
    "distill": """
        teacher data --output -o --check --json --lora --lora-rank --objective --phases --student --sampler --dtype
        --max-train-steps --train-batch-size --gradient-accumulation-steps --resolution --aspect-buckets
        --center-crop --random-flip --samples --teacher-steps --seed --learning-rate --lr-scheduler
        --lr-warmup-steps --optimizer --adam-weight-decay --max-grad-norm --ema-decay --w-min --w-max
        --num-ddim-timesteps --skipping-step --solver-substeps --timestep-power --loss-type --huber-c
        --checkpointing-steps --checkpoints-total-limit --resume --validation-steps --validation-samples
        --patience --cache --mixed-precision --gradient-checkpointing --compile --fsdp --device --offline
        --quiet -q --debug
    """,
    "eval": """
        model --teacher --lora --teacher-unet --prompts --samples --steps --sampler --guidance --teacher-guidance --clip
        --batch --cache --output -o --seed --device --dtype --offline --json --quiet -q --debug
    """,
    "bench": """
        model --random --against --size --steps --runs --starts --dtype --optimize --decoder --tiny-vae --variant --keep
        --json --plot --quiet -q --debug
    """,
    "native": "action --debug",
    "doctor": "--json --debug",
}


def test_the_public_names_are_these() -> None:
    assert sorted(calotype.__all__) == sorted(NAMES.split())
    assert set(NAMES.split()) <= set(dir(calotype))


@pytest.mark.parametrize("name", NAMES.split())
def test_a_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(calotype, name)
    assert isinstance(value, str) if name == "__version__" else value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="lode"):
        _ = calotype.lode


def command(name: str) -> object:
    group = get_command(cli.app)
    found = group.get_command(typer.Context(group), name)  # type: ignore[attr-defined]
    assert found is not None
    return found


def test_the_commands_are_these() -> None:
    assert list(cli.COMMANDS) == list(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_of_a_command_are_these(name: str) -> None:
    found = command(name)
    spelled = [s for p in found.params for s in (*p.opts, *p.secondary_opts)]  # type: ignore[attr-defined]
    assert sorted(spelled) == sorted(OPTIONS[name].split())


@pytest.mark.parametrize("name", OPTIONS)
def test_a_command_and_all_its_options_have_help(name: str) -> None:
    found = command(name)
    assert found.help  # type: ignore[attr-defined]
    assert [p.name for p in found.params if not p.help] == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_readme_shows_every_command(name: str) -> None:
    assert f"calotype {name}" in (ROOT / "README.md").read_text("utf-8")


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    newest = re.search(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None
    assert calotype.__version__ == version("calotype") == project["version"] == newest[1]
