"""bfloat16 where it is emulated: said, and not used unasked."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import calotype
from calotype import precision
from calotype.training.trainer import distill

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True])
def has_it(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A processor without bfloat16 products, and one with them, whichever this one is."""
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(request.param)


def test_what_the_processor_says_counts(has_it: bool) -> None:
    assert precision.multiplies_bfloat16(CPU) == has_it
    assert precision.multiplies_bfloat16(torch.device("cuda"))


def test_other_processors_are_asked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision.platform, "machine", lambda: "arm64")
    assert precision.multiplies_bfloat16(CPU) in (False, True)


def test_loading_in_an_emulated_dtype_warns(has_it: bool, tiny_sd15: Path) -> None:
    def load() -> calotype.Engine:
        return calotype.load(tiny_sd15, device="cpu", dtype="bfloat16")

    if has_it:
        load()  # warnings are errors
    else:
        with pytest.warns(calotype.CalotypeWarning, match="dtype bfloat16: .*; float32 is faster here"):
            load()
    calotype.load(tiny_sd15, device="cpu", dtype="float32")


def test_training_in_an_emulated_dtype_warns(has_it: bool, tiny_sd15: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n")
    steps = distill(tiny_sd15, tmp_path / "prompts.txt", tmp_path / "out", mixed_precision="bf16", samples=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        next(steps)
    steps.close()
    told = [str(each.message) for each in caught if "no bfloat16 products" in str(each.message)]
    assert [each.partition(":")[0] for each in told] == ([] if has_it else ["mixed_precision bf16"])
