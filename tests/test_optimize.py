"""Steps outside the networks: what they compute is the same to rounding, and undone they leave no trace."""

from __future__ import annotations

import copy
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import calotype
from adapters import chosen as layers_named
from adapters import kohya_names, layers, low_rank, save
from calotype import Request
from calotype.errors import CheckpointError, UsageError
from calotype.nn.motion import MotionAdapter, MotionConfig
from calotype.nn.t2i_adapter import T2IAdapter, T2IAdapterConfig
from calotype.optimize import STEPS, Optimized, chosen
from calotype.optimize import packed as packing
from calotype.precision import SMALL, automatic

CPU = torch.device("cpu")
ROUNDING = 1e-5  # of float32, through all of a request's steps: relative L2 of latents
ALL = [name for name in STEPS if name != "attention"]  # its kernel: tests/test_native.py
NETWORKS = [name for name in ALL if name != "heap"]  # the steps that change a network


@pytest.fixture(autouse=True, params=[packing.LARGE, 0], ids=["kept", "let go"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of large models, whose layers' own weights are let go of; the tests' are too small for that."""
    monkeypatch.setattr(packing, "LARGE", request.param)


def engine_of(folder: Path, optimize: Any, dtype: str = "float32") -> calotype.Engine:
    return calotype.load(folder, device="cpu", dtype=dtype, optimize=optimize)


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def last(engine: calotype.Engine, **fields: Any) -> Tensor:
    *_, step = engine.stream(Request("a red fox", **{"steps": 2, "seed": 1, "width": 64, "height": 48, **fields}))
    return step.x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimize", [*([name] for name in ALL), ALL], ids=" ".join)
@pytest.mark.filterwarnings("ignore:.* no bfloat16 products:calotype.CalotypeWarning")
def test_pictures_are_the_same_to_rounding(tiny_sdxl: Path, optimize: list[str], dtype: str) -> None:
    """In float32. In bfloat16 they are as far from float32's as plain ones are: half as far again at most."""
    plain, engine = engine_of(tiny_sdxl, "none", dtype), engine_of(tiny_sdxl, optimize, dtype)
    exact = engine_of(tiny_sdxl, "none")
    assert engine.optimizations == tuple(optimize)
    for fields in ({"guidance": 4.0}, {"guidance": 1.0, "n": 3, "width": 72}):  # another size than the first, too
        found, own, wanted = (last(each, **fields) for each in (engine, plain, exact))
        assert distance(found, wanted) < max(ROUNDING, 1.5 * distance(own, wanted))
    found, own, wanted = (decoded(each) for each in (engine, plain, exact))
    assert distance(found, wanted) < max(ROUNDING, 1.5 * distance(own, wanted))
    if len(optimize) > 1:
        assert not torch.equal(last(engine), last(plain))  # or nothing was done


@torch.inference_mode()
def decoded(engine: calotype.Engine) -> Tensor:
    vae = engine.parts.vae
    x = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    return vae.decode(x.to(next(vae.parameters()).dtype))


@pytest.mark.parametrize("optimize", [*([name] for name in ALL), ALL], ids=" ".join)
def test_undone_they_leave_no_trace(tiny_sd15: Path, optimize: list[str]) -> None:
    plain, engine = engine_of(tiny_sd15, "none"), engine_of(tiny_sd15, optimize)
    last(engine)
    engine._optimized.undo()
    assert torch.equal(last(engine), last(plain))
    for one, other in zip(engine.parts.unet.modules(), plain.parts.unet.modules(), strict=True):
        assert vars(one).keys() == vars(other).keys()
    for one, other in zip(engine.parts.unet.parameters(), plain.parts.unet.parameters(), strict=True):
        assert one.stride() == other.stride()


@pytest.fixture
def lora(tiny_sd15: Path, tmp_path: Path) -> Path:
    """On convolutions and linear layers."""
    unet = engine_of(tiny_sd15, "none").parts.unet
    chosen_ = layers_named(layers(unet), ("to_q", "to_k", "conv1", "conv_in", "proj_in", "time_emb_proj"))
    return save(tmp_path / "lora.safetensors", kohya_names(low_rank(chosen_), "lora_unet_", None))


def test_loras_are_swapped_with_no_trace(tiny_sd15: Path, lora: Path) -> None:
    plain, engine = engine_of(tiny_sd15, "none"), engine_of(tiny_sd15, NETWORKS)
    base = last(engine)
    for each in (plain, engine):
        each.add_lora(lora, "it")
    assert distance(last(plain), base) > 1e-2
    for scale in (1.0, -0.5, 0.0, 0.7):
        for each in (plain, engine):
            each.set_loras({"it": scale})
        assert distance(last(engine), last(plain)) < ROUNDING
    for i in range(100):
        engine.set_loras({"it": i / 50})
    engine.set_loras({})
    assert torch.equal(last(engine), base)


def test_only_what_was_written_is_packed_again(tiny_sd15: Path, lora: Path) -> None:
    engine = engine_of(tiny_sd15, ["packed"])
    last(engine)
    before = packed(engine)
    assert all(weight is not None for weight in before.values())
    engine.add_lora(lora, "it")
    written = {name for name, weight in packed(engine).items() if weight is None}
    changed = {name.rpartition(".")[0] for name in engine._stack.loras["it"].deltas["unet"]}
    assert written == changed
    last(engine)
    after = packed(engine)
    assert {name for name in before if after[name] is not before[name]} == changed


def packed(engine: calotype.Engine) -> dict[str, Tensor | None]:
    modules = engine.parts.unet.named_modules()
    return {name: vars(each)["forward"].packed for name, each in modules if "forward" in vars(each)}


def test_a_large_weight_is_in_memory_once(tiny_sd15: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed; before that, in its file. Its stand-in is one NaN, which cannot be written to."""
    monkeypatch.setattr(packing, "LARGE", 0)
    plain, engine = engine_of(tiny_sd15, "none"), engine_of(tiny_sd15, ["packed"])
    unet = engine.parts.unet
    layers_ = [each for each in unet.modules() if type(each) in (nn.Linear, nn.Conv2d)]
    for _ in range(2):
        for each in layers_:
            assert packing.is_stand_in(each.weight)
            assert each.weight.untyped_storage().nbytes() == 4
            assert torch.isnan(each.weight).all()
            with pytest.raises(RuntimeError):
                each.weight.copy_(torch.zeros_like(each.weight))
        assert torch.equal(last(engine), last(engine))
    for each in (plain, engine):
        each.add_lora(lora, "it")
    assert distance(last(engine), last(plain)) < ROUNDING
    assert all(packing.is_stand_in(each.weight) for each in layers_)


def test_loras_before_the_first_picture(tiny_sd15: Path, lora: Path) -> None:
    plain, engine = engine_of(tiny_sd15, "none"), engine_of(tiny_sd15, NETWORKS)
    base = last(plain)
    for each in (plain, engine):
        each.add_lora(lora, "it")
    assert distance(last(engine), last(plain)) < ROUNDING
    engine.set_loras({})
    assert distance(last(engine), base) < ROUNDING


def test_numbers_are_checked_though_they_are_not_kept(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd15, tmp_path / "model")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["mid_block.resnets.0.conv1.weight"][3, 2, 1, 0] = torch.nan
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"mid_block\.resnets\.0\.conv1\.weight' has NaN or infinite values"):
        engine_of(folder, ["packed"])


def test_live_loras_act_around_packed_layers(tiny_sd15: Path, lora: Path) -> None:
    plain, engine = engine_of(tiny_sd15, "none"), engine_of(tiny_sd15, NETWORKS)
    for each in (plain, engine):
        each.add_lora(lora, "it", scale=0.0)
    with engine.live_loras({"it": 0.8}), plain.live_loras({"it": 0.8}):
        live = last(engine)
        assert distance(live, last(plain)) < ROUNDING
    assert distance(live, last(engine)) > 1e-2


def test_what_is_added_is_covered(tiny_sd15: Path, tmp_path: Path) -> None:
    """Controls and motion modules, though they come after loading."""
    config = {"_class_name": "T2IAdapter", "channels": [32, 64], "num_res_blocks": 1, "downscale_factor": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    edges = T2IAdapter(T2IAdapterConfig(channels=(32, 64), layers=1, downscale=8))
    save_file(edges.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    shape = MotionConfig(channels=(32, 64), layers=(1, 1), depths=(1, 1), mid_depth=1, heads=(8, 8), max_frames=8)
    save_file(MotionAdapter(shape).state_dict(), tmp_path / "motion.safetensors")
    engine = engine_of(tiny_sd15, ["packed"])
    engine.add_control(tmp_path, "edges")
    engine.set_motion(tmp_path / "motion.safetensors")
    for network in (engine.parts.unet, engine.parts.controls["edges"]):
        found = {name: each for name, each in network.named_modules() if type(each) in (nn.Linear, nn.Conv2d)}
        assert len(found) > 5
        assert all("forward" in vars(each) for each in found.values())
        if network is engine.parts.unet:
            assert any("motion_modules" in name for name in found)


def test_a_copy_in_another_dtype_packs_its_own_weights(tiny_sd15: Path) -> None:
    """As of an autoencoder that overflows: it is copied, and decodes in float32."""
    engine = engine_of(tiny_sd15, NETWORKS)
    vae = engine.parts.vae
    x = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = vae.decode(x)
        copied = copy.deepcopy(vae).double()
        assert distance(copied.decode(x.double()), wanted) < 1e-5
        assert torch.equal(vae.decode(x), wanted)
        for layer, other in zip(vae.modules(), copied.modules(), strict=True):
            if "forward" in vars(layer):
                assert vars(other)["forward"].layer is other


def test_gradients_pass(tiny_sd15: Path) -> None:
    engine = engine_of(tiny_sd15, NETWORKS)
    x = torch.randn(1, 4, 6, 8, requires_grad=True)
    engine.parts.vae.decode(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


# ---- the table ----


def test_auto_leaves_small_models_as_they_are() -> None:
    names = [step.name for step in chosen("auto", CPU, torch.float32, SMALL)]
    assert names == [name for name in STEPS if STEPS[name].fits(CPU, torch.float32) is None]
    assert "channels-last" in names
    assert chosen("auto", CPU, torch.float32, SMALL - 1) == chosen("none", CPU, torch.float32, SMALL) == ()
    assert [step.name for step in chosen("auto", torch.device("cuda"), torch.float16, SMALL)] == ["channels-last"]
    assert chosen("auto", torch.device("mps"), torch.float16, SMALL) == ()


def test_the_shipped_model_is_a_small_one() -> None:
    engine = calotype.load(device="cpu")
    assert engine.optimizations == ()
    assert engine.parts.dtype == torch.float32


def test_the_dtype_suits_processor_and_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for can in (True, False):
        monkeypatch.setattr("calotype.precision.multiplies_bfloat16", lambda device, can=can: can)
        assert automatic(CPU, SMALL) == (torch.bfloat16 if can else torch.float32)
        assert automatic(CPU, SMALL - 1) == torch.float32
        assert automatic(torch.device("cuda"), 1) == torch.float16


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["pakced"], r"optimize has 'pakced': allowed are auto, none, heap, .*did you mean packed"),
        ("heap,fast", "optimize has 'fast'"),
        ([""], "optimize has ''"),
    ],
)
def test_an_unknown_step(tiny_sd15: Path, asked: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine_of(tiny_sd15, asked)


def test_a_step_that_does_not_fit() -> None:
    with pytest.raises(UsageError, match=r"'packed', which is of no use on cuda in float16: it is for processors"):
        chosen(["packed"], torch.device("cuda"), torch.float16, SMALL)
    with pytest.raises(UsageError, match=r"'packed', which is of no use on cpu in float16: oneDNN packs float32"):
        chosen(["packed"], CPU, torch.float16, SMALL)
    assert (STEPS["heap"].fits(CPU, torch.float32) is None) == (platform.libc_ver()[0] == "glibc")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the step is for glibc")
def test_the_heap_keeps_what_it_took() -> None:
    """In a process of its own, which it is about."""
    script = """
import resource, torch
from calotype.optimize.heap import Heap
Heap().begin()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(faults() for _ in range(12)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, *others = map(int, done.stdout.split())
    assert sum(others) < 4 * first  # else each of the eleven begins anew


def test_a_description_says_what_was_asked_for(tiny_sd15: Path) -> None:
    engine = engine_of(tiny_sd15, ["channels-last", "packed"])
    assert engine.optimizations == ("packed", "channels-last")  # in the table's order
    again = calotype.load_from(engine.describe())
    assert again.optimizations == engine.optimizations
    assert torch.equal(last(again), last(engine))


def test_nothing_is_covered_twice(tiny_sd15: Path) -> None:
    unet = engine_of(tiny_sd15, "none").parts.unet
    optimized = Optimized(chosen(NETWORKS, CPU, torch.float32, SMALL))
    optimized.cover({"unet": unet}, {})
    first = {name: vars(each).get("forward") for name, each in unet.named_modules()}
    optimized.cover({"unet": unet}, {})
    assert {name: vars(each).get("forward") for name, each in unet.named_modules()} == first
