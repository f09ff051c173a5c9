"""Every example, run as it stands on tiny random models of its families, and the defaults that the guide names."""

from __future__ import annotations

import inspect
import re
import runpy
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZE = 64

# Example -> the family of its models, and of which the options name one: model, unet, LoRAs, control, motion.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "text_lcm": ("sdxl", ("model", "unet", "variant")),
    "text_lcm_lora": ("sdxl", ("model", "lora")),
    "image_lcm": ("sd15", ("photo", "model", "unet")),
    "image_lcm_lora": ("sd15", ("photo", "model", "lora")),
    "inpaint_lcm": ("sd15", ("photo", "mask", "model", "unet")),
    "inpaint_lcm_lora": ("sd15", ("photo", "mask", "model 9", "lora")),
    "style_lcm": ("sdxl", ("model", "unet", "style", "weight-name")),
    "style_lcm_lora": ("sdxl", ("model", "lora", "style", "weight-name")),
    "control_lcm": ("sd15", ("photo", "model lcm", "control")),
    "control_lcm_lora": ("sd15", ("photo", "model", "lora", "control")),
    "adapter_lcm": ("sdxl", ("photo", "model", "unet", "adapter")),
    "adapter_lcm_lora": ("sdxl", ("photo", "model", "lora", "adapter")),
    "animate": ("sd15", ("model", "motion", "lora", "zoom", "frames")),
    "ssd1b_lcm": ("ssd1b", ("model", "unet")),
    "ssd1b_lcm_lora": ("ssd1b", ("model", "lora")),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The parity matrix's models and adapters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent / "parity")
        yield import_module("matrix.world").World(tmp_path_factory.mktemp("examples"))


def edges(pixels: Any, low: float, high: float) -> Any:
    """Stands in for OpenCV's: the network does not mind."""
    assert (low, high) == (100, 200)
    grey = pixels.mean(axis=2)
    return np.uint8(255) * (np.abs(np.diff(grey, axis=1, prepend=grey[:, :1])) > 20)


def options(world: Any, family: str, names: tuple[str, ...], folder: Path) -> list[str]:
    """The command line that puts tiny models in the place of the real ones."""
    photo, mask = folder / "photo.png", folder / "mask.png"
    world.pictures[0].save(photo)
    world.mask.save(mask)
    style = world.lora(family, "style", "kohya") if "style" in names else Path()
    values: dict[str, Any] = {
        "model": lambda: world.model(family, "lora", 4),
        "model 9": lambda: world.model(family, "lora", 9),
        "model lcm": lambda: world.model(family, "lcm", 4),
        "unet": lambda: world.model(family, "lcm", 4) / "unet",
        "variant": lambda: "",
        "lora": lambda: world.lora(family, "lcm", "kohya"),
        "style": lambda: style.parent,
        "weight-name": lambda: style.name,
        "control": lambda: world.control(family, 1),
        "adapter": lambda: world.t2i(family, 1),
        "motion": lambda: world.motion(family),
        "zoom": lambda: world.lora(family, "motion", "diffusers"),
        "frames": lambda: 3,
    }
    positional = [str({"photo": photo, "mask": mask}[name]) for name in names if name in ("photo", "mask")]
    named = [[f"--{name.split()[0]}", str(values[name]())] for name in names if name in values]
    return [*positional, *(word for pair in named for word in pair), "--size", str(SIZE)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:guidance .* is outside:calotype.CalotypeWarning")
def test_it_draws(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    family, names = CASES[name]
    out = tmp_path / f"out{'.gif' if 'frames' in names else '.png'}"
    monkeypatch.setattr(sys, "argv", [name, *options(world, family, names, tmp_path), "--out", str(out)])
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(Canny=edges))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert not end.value.code, capsys.readouterr().err
    assert capsys.readouterr().out.split() == [str(out)]
    with Image.open(out) as picture:
        assert picture.size == (SIZE, SIZE)
        assert getattr(picture, "n_frames", 1) == (3 if "frames" in names else 1)
        assert np.asarray(picture.convert("RGB")).std() > 10


def test_all_are_run_and_listed() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(CASES)
    links = re.findall(r"\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text("utf-8"))
    assert sorted(links) == sorted(CASES)


def test_they_are_short() -> None:
    for name in CASES:
        main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
        assert len(inspect.getsource(main).splitlines()) <= 25, name
