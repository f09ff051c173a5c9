"""Single files as other programs and training runs leave them: wrapped names, other prefixes, bookkeeping beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calotype import cli
from calotype.errors import CheckpointError
from calotype.weights.convert import write_single_file
from calotype.weights.files import metadata
from calotype.weights.folder import Folder
from calotype.weights.inspect import inspect_model
from calotype.weights.load import load_parts
from calotype.weights.wrapping import unwrapped

Tensors = dict[str, Tensor]
SECOND = "conditioner.embedders.1."


@pytest.fixture(scope="module")
def singles(tiny_sd15: Path, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A single file of each, which carries its configs."""
    folder = tmp_path_factory.mktemp("singles")
    for model in (tiny_sd15, tiny_sdxl):
        write_single_file(Folder(model), folder / f"{model.name}.safetensors")
    return {name: folder / f"tiny_{name}.safetensors" for name in ("sd15", "sdxl")}


def rewritten(path: Path, output: Path, change: Callable[[Tensors], Tensors]) -> Path:
    output.unlink(missing_ok=True)
    tensors = change(load_file(path))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, output, metadata(path))
    return output


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def assert_same_model(a: Path, b: Path) -> None:
    one, other = load_parts(a), load_parts(b)
    assert same(one.unet, other.unet)
    assert same(one.vae, other.vae)
    assert all(same(x, y) for x, y in zip(one.text.models, other.text.models, strict=True))
    assert all(torch.equal(tensor, one.unet.state_dict()[name]) for name, tensor in one.stored["unet"]().items())


# ---- wrapped ----


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "state_dict.", "state_dict.module._orig_mod."])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_whole_model_in_a_wrapper(singles: dict[str, Path], tmp_path: Path, prefix: str, name: str) -> None:
    counts = {"epoch": torch.tensor(1), "global_step": torch.tensor(9)}
    path = rewritten(
        singles[name], tmp_path / "x.safetensors", lambda held: {prefix + key: t for key, t in held.items()} | counts
    )
    assert_same_model(path, singles[name])
    report = inspect_model(path)
    assert report["problems"] == []
    assert {"epoch", "global_step"} <= set(report["ignored"])


def test_a_compiled_network_in_a_model(singles: dict[str, Path], tmp_path: Path) -> None:
    path = rewritten(
        singles["sd15"],
        tmp_path / "x.safetensors",
        lambda held: {key.replace("diffusion_model.", "diffusion_model._orig_mod."): t for key, t in held.items()},
    )
    assert_same_model(path, singles["sd15"])


def test_what_comes_off_and_what_does_not() -> None:
    assert unwrapped(["module.a", "module.b", "epoch"]) == {"a": "module.a", "b": "module.b", "epoch": "epoch"}
    for names in (["module.a", "b"], ["model.diffusion_model.a", "model.diffusion_model.b"], ["a", "_orig_mod.a"]):
        assert unwrapped(names) == {name: name for name in names}
    assert unwrapped([]) == {}
    assert unwrapped(["model.model.diffusion_model.a"]) == {"model.diffusion_model.a": "model.model.diffusion_model.a"}


def test_a_wrapped_part_of_a_model(singles: dict[str, Path], tiny_sd15: Path, tmp_path: Path) -> None:
    """A U-Net and an autoencoder alone."""
    expected = load_parts(tiny_sd15)
    for part, prefix in (("unet", "model.diffusion_model."), ("vae", "first_stage_model.")):
        path = rewritten(
            singles["sd15"],
            tmp_path / f"{part}.safetensors",
            lambda held, prefix=prefix: {  # type: ignore[misc]
                key.replace(prefix, "module."): t for key, t in held.items() if key.startswith(prefix)
            },
        )
        assert same(getattr(load_parts(tiny_sd15, **{part: path}), part), getattr(expected, part))


def test_strangers_stay_an_error(singles: dict[str, Path], tmp_path: Path) -> None:
    path = rewritten(
        singles["sd15"],
        tmp_path / "x.safetensors",
        lambda held: {f"module.{key}": t for key, t in held.items()} | {"module.novelty.weight": torch.zeros(1)},
    )
    with pytest.raises(CheckpointError, match=r"1 tensors that belong to none of its networks \('novelty\.weight'\)"):
        load_parts(path)


def test_bookkeeping_is_left_out_and_named(
    singles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Stable Diffusion's and DreamBooth's own training leaves it."""
    beside = {
        name: torch.zeros(2)
        for name in ("ddim_sigmas", "ddim_alphas_prev", "embedding_manager.initial_embeddings.*", "model_ema.decay")
    }
    path = rewritten(singles["sd15"], tmp_path / "x.safetensors", lambda held: held | beside)
    assert_same_model(path, singles["sd15"])
    assert cli.main(["inspect", str(path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ignored:"))
    assert all(name in line for name in beside)


# ---- other names of text encoders ----


def transformers_names(held: Tensors, tiny_sdxl: Path) -> Tensors:
    """CLIP G as transformers calls it, in place of OpenCLIP's."""
    others = {name: tensor for name, tensor in held.items() if not name.startswith(SECOND)}
    own = load_file(tiny_sdxl / "text_encoder_2/model.safetensors")
    return others | {f"{SECOND}transformer.{name}": tensor for name, tensor in own.items()}


def test_clip_g_under_the_names_of_transformers(singles: dict[str, Path], tiny_sdxl: Path, tmp_path: Path) -> None:
    def linear(held: Tensors) -> Tensors:
        return transformers_names(held, tiny_sdxl)

    def matrix(within: str) -> Callable[[Tensors], Tensors]:
        """Its projection as OpenCLIP has it, as ComfyUI keeps it."""

        def change(held: Tensors) -> Tensors:
            found = linear(held)
            projection = found.pop(f"{SECOND}transformer.text_projection.weight")
            return found | {f"{SECOND}{within}text_projection": projection.t(), f"{SECOND}logit_scale": torch.ones(())}

        return change

    def bare(held: Tensors) -> Tensors:
        return {name.replace("transformer.text_model.", "transformer."): t for name, t in linear(held).items()}

    for change in (linear, matrix(""), matrix("transformer."), bare):
        path = rewritten(singles["sdxl"], tmp_path / "x.safetensors", change)
        assert_same_model(path, singles["sdxl"])
        assert inspect_model(path)["problems"] == []
    lacking = rewritten(
        singles["sdxl"],
        tmp_path / "y.safetensors",
        lambda held: {name: t for name, t in linear(held).items() if "text_projection" not in name},
    )
    with pytest.raises(CheckpointError, match=r"second text encoder .*1 missing \(text_projection\.weight\)"):
        load_parts(lacking)
    spoilt = rewritten(
        singles["sdxl"],
        tmp_path / "z.safetensors",
        lambda held: linear(held) | {f"{SECOND}transformer.text_projection.weight": torch.full((32, 32), torch.nan)},
    )
    with pytest.raises(CheckpointError, match=r"text_projection\.weight' has NaN"):
        load_parts(spoilt)


def test_clip_l_without_text_model(singles: dict[str, Path], tmp_path: Path) -> None:
    path = rewritten(
        singles["sd15"],
        tmp_path / "x.safetensors",
        lambda held: {name.replace("transformer.text_model.", "transformer."): t for name, t in held.items()},
    )
    assert_same_model(path, singles["sd15"])


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_parts_of_a_folder_in_one_file(
    singles: dict[str, Path], tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path, name: str
) -> None:
    """Under diffusers' names, behind those of the parts."""
    folder = {"sd15": tiny_sd15, "sdxl": tiny_sdxl}[name]
    tensors = {
        f"{file.parent.name}.{key}": tensor
        for file in folder.glob("*/*.safetensors")
        for key, tensor in load_file(file).items()
    }
    path = rewritten(singles[name], tmp_path / "x.safetensors", lambda held: tensors)
    assert_same_model(path, singles[name])


def test_a_network_of_a_whole_model_in_place_of_another(
    singles: dict[str, Path], tiny_sd15: Path, tmp_path: Path
) -> None:
    path = rewritten(
        singles["sd15"], tmp_path / "x.safetensors", lambda held: {f"module.{key}": t.neg() for key, t in held.items()}
    )
    parts, base = load_parts(tiny_sd15, vae=path), load_parts(tiny_sd15)
    assert torch.equal(
        parts.vae.decoder.get_parameter("conv_in.weight"), -base.vae.decoder.get_parameter("conv_in.weight")
    )
    assert same(parts.unet, base.unet)
