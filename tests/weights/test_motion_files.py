"""Motion adapters from files: configs, names, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from calotype.errors import CheckpointError, ModelNotFoundError, UnsafeFileError
from calotype.families import SD15, SDXL
from calotype.nn.motion import MotionAdapter, MotionConfig, attach, frame_positions
from calotype.nn.unet import UNet, UNetConfig
from calotype.schedule import NoiseSchedule
from calotype.weights.motion import beta_schedule_of, check_motion, load_motion, motion_config, read_motion, with_betas

TINY = MotionConfig(
    channels=(32, 64), layers=(1, 2), depths=(1, 2), mid_depth=1, heads=(8, 8), norm_groups=32, max_frames=8
)
RAW = {
    "_class_name": "MotionAdapter",
    "block_out_channels": [32, 64],
    "motion_layers_per_block": [1, 2],
    "motion_transformer_layers_per_block": [1, 2],
    "motion_max_seq_length": 8,
}
SDXL_UNET = UNetConfig(
    channels=(320, 640, 1280),
    heads=(5, 10, 20),
    down_depths=((None, None), (2, 2), (10, 10)),
    mid_depth=10,
    up_depths=((10,) * 3, (2,) * 3, (None,) * 3),
    context_dim=2048,
    addition_in_dim=2816,
)
SDXL_MOTION = MotionConfig(
    channels=(320, 640, 1280), layers=(2, 2, 2), depths=(1, 1, 1), mid_depth=None, heads=(8, 8, 8)
)


def tiny_unet() -> UNet:
    return UNet(
        UNetConfig(
            channels=(32, 64),
            heads=(4, 4),
            down_depths=((1,), (None, None)),
            up_depths=((None,) * 3, (1, 1)),
            context_dim=16,
        )
    )


def tensors() -> dict[str, Tensor]:
    """An adapter's, by diffusers' names; of those that are random, no two are equal."""
    torch.manual_seed(0)
    state = MotionAdapter(TINY).state_dict()
    return {name: t.clone() if name.endswith(".pe") else torch.randn_like(t) for name, t in state.items()}


def write(folder: Path, weights: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(RAW | changes))
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def authors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by the names of AnimateDiff's own files, where both attentions have a table of positions."""
    found = {}
    for name, tensor in weights.items():
        head, module, rest = name.partition(".motion_modules.")
        number, _, inner = rest.partition(".")
        for ours, theirs in (
            ("pos_embed.pe", "attention_blocks.0.pos_encoder.pe"),
            ("attn1.", "attention_blocks.0."),
            ("attn2.", "attention_blocks.1."),
            ("norm1.", "norms.0."),
            ("norm2.", "norms.1."),
            ("norm3.", "ff_norm."),
        ):
            inner = inner.replace(ours, theirs)
        found[f"{head}{module}{number}.temporal_transformer.{inner}"] = tensor
    second = {name.replace("blocks.0.pos", "blocks.1.pos"): t.clone() for name, t in found.items() if "pos_enc" in name}
    return found | second


def same(adapter: MotionAdapter, weights: dict[str, Tensor]) -> None:
    state = adapter.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert not any(parameter.requires_grad for parameter in adapter.parameters())


# ---- what loads ----


@pytest.mark.parametrize("inside", ["", "motion_adapter"])
def test_a_folder(tmp_path: Path, inside: str) -> None:
    write(tmp_path / "model" / inside, tensors())
    adapter = load_motion(tmp_path / "model")
    assert adapter.config == TINY
    same(adapter, tensors())


@pytest.mark.parametrize("mid", [True, False])
def test_the_authors_single_file(tmp_path: Path, mid: bool) -> None:
    """No config.json: everything is read off the tensors."""
    weights = {name: t for name, t in tensors().items() if mid or not name.startswith("mid_block")}
    save_file(authors(weights), tmp_path / "mm_sd_v15_v2.safetensors")
    adapter = load_motion(tmp_path / "mm_sd_v15_v2.safetensors")
    assert adapter.config == (TINY if mid else replace(TINY, mid_depth=None))
    same(adapter, weights)


@pytest.mark.parametrize("prefix", ["", "module.", "state_dict.module.", "_orig_mod.", "unet."])
def test_a_whole_unet_around_it(tmp_path: Path, prefix: str) -> None:
    """As AnimateDiff's train.py saves one: what is the U-Net's is left out, a count of steps too."""
    unet = {name: tensor.clone() for name, tensor in tiny_unet().state_dict().items()}
    held = {f"{prefix}{name}": tensor for name, tensor in (authors(tensors()) | unet).items()}
    path = tmp_path / "checkpoint.safetensors"
    save_file(held | {"global_step": torch.tensor(100)}, path)
    adapter = load_motion(path)
    assert adapter.config == TINY
    same(adapter, tensors())
    assert read_motion(path).keys() - {"global_step"} == tensors().keys()
    save_file(held | {f"{prefix}novelty.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(novelty\.weight\)"):
        load_motion(path)
    save_file({f"{prefix}{name}": t for name, t in (tensors() | {"conv_in.weight": torch.zeros(1)}).items()}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(conv_in\.weight\)"):  # perhaps not the model's
        load_motion(path)
    pia = {f"{prefix}conv_in.weight": torch.zeros(32, 9, 3, 3)}
    save_file(held | pia, path)
    with pytest.raises(CheckpointError, match="brings another first layer"):
        load_motion(path)


def test_positions_that_a_file_leaves_out(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in tensors().items() if not name.endswith(".pe")}
    adapter = load_motion(write(tmp_path / "a", weights), dtype=torch.float64)
    positions = [tensor for name, tensor in adapter.state_dict().items() if name.endswith(".pe")]
    assert {tuple(table.shape) for table in positions} == {(1, 8, 32), (1, 8, 64)}
    assert all(torch.equal(table, frame_positions(table.shape[-1], 8).double()) for table in positions)
    table = frame_positions(32, 8)[0]
    assert table[0].tolist() == [0.0, 1.0] * 16
    assert table[3, 4].item() == pytest.approx(torch.tensor(3 * 1e4 ** (-4 / 32)).sin().item(), rel=1e-6)


def test_positions_in_the_file_win(tmp_path: Path) -> None:
    """There are adapters whose table was stretched for longer clips."""
    weights = {name: t / 2 if name.endswith(".pe") else t for name, t in tensors().items()}
    same(load_motion(write(tmp_path / "a", weights)), weights)


def test_dtype_and_variant(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", tensors())
    half = {name: tensor.half() for name, tensor in tensors().items()}
    save_file(half, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert {t.dtype for t in load_motion(folder, dtype=torch.bfloat16).state_dict().values()} == {torch.bfloat16}
    same(load_motion(folder, variant="fp16", dtype=torch.float16), half)
    with pytest.raises(ModelNotFoundError, match="bf16"):
        load_motion(folder, variant="bf16")


def test_released_configs() -> None:
    """As their config.json has them: version 1 has 24 frames and no middle, 2 has one, 3 has none; SDXL's 3 levels."""
    v1 = {"_class_name": "MotionAdapter", "motion_max_seq_length": 24, "use_motion_mid_block": False}
    assert motion_config(v1) == MotionConfig(mid_depth=None, max_frames=24)
    v2 = {"_class_name": "MotionAdapter", "block_out_channels": [320, 640, 1280, 1280], "motion_layers_per_block": 2}
    assert motion_config(v2 | {"motion_norm_num_groups": 32, "motion_num_attention_heads": 8}) == MotionConfig()
    v3 = v2 | {"use_motion_mid_block": False, "conv_in_channels": None}
    assert motion_config(v3) == MotionConfig(mid_depth=None)
    sdxl = v3 | {"block_out_channels": [320, 640, 1280]}
    assert motion_config(sdxl) == SDXL_MOTION


def test_what_is_read_is_named_as_in_the_network(tmp_path: Path) -> None:
    """So that an adapter's pristine weights can be found again by the names that LoRAs change."""
    unet = tiny_unet()
    path = tmp_path / "mm.safetensors"
    save_file(authors(tensors()), path)
    before = set(unet.state_dict())
    attach(unet, load_motion(path, unet=unet.config))
    found = read_motion(path)
    assert found.keys() == unet.state_dict().keys() - before
    assert "down_blocks.0.motion_modules.0" in dict(unet.named_modules())
    assert all(torch.equal(unet.state_dict()[name], tensor) for name, tensor in found.items())


# ---- what does not ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_in_channels": 9}, "PIA"),
        ({"_class_name": "UNet2DConditionModel"}, "MotionAdapter"),
        ({"motion_layers_per_block": 10**9}, "motion_layers_per_block"),
        ({"motion_layers_per_block": [1, 2, 3]}, "motion_layers_per_block"),
        ({"motion_transformer_layers_per_block": [[1, 1], [1, 1]]}, "motion_transformer_layers_per_block"),
        ({"motion_mid_block_layers_per_block": 2}, "motion_mid_block_layers_per_block"),
        ({"motion_num_attention_heads": 7}, "7 heads"),
        ({"motion_norm_num_groups": 33}, "33 groups"),
        ({"motion_max_seq_length": 0}, "motion_max_seq_length"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"use_motion_mid_block": "no"}, "use_motion_mid_block"),
    ],
)
def test_a_config_that_is_not_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        motion_config(RAW | change, "config.json")


QUERY = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.weight"


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    broken = {
        "missing": {name: tensor for name, tensor in tensors().items() if name != QUERY},
        "unexpected": tensors() | {"conv_in.weight": torch.ones(1)},
        "of another shape": tensors() | {QUERY: torch.ones(2, 2)},
        "NaN": tensors() | {QUERY: torch.full((32, 32), torch.nan)},
        "twice": tensors() | {QUERY.replace("attn1", "attention_blocks.0"): torch.ones(32, 32)},
    }
    for message, weights in broken.items():
        with pytest.raises(CheckpointError, match=message):
            load_motion(write(tmp_path / message, weights))


def test_a_file_that_is_something_else(tmp_path: Path) -> None:
    lora = f"unet.{QUERY.removesuffix('weight')}lora_A.weight"
    save_file({lora: torch.ones(4, 32)}, tmp_path / "zoom.safetensors")
    with pytest.raises(CheckpointError, match="looks like a LoRA"):
        load_motion(tmp_path / "zoom.safetensors")
    (tmp_path / "mm_sd_v15.ckpt").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UnsafeFileError):
        load_motion(tmp_path / "mm_sd_v15.ckpt")
    with pytest.raises(ModelNotFoundError):
        load_motion(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        load_motion(tmp_path)


def test_a_hostile_single_file(tmp_path: Path) -> None:
    """The levels that its names claim are bounded before a network is built."""
    names = [f"down_blocks.{level}.motion_modules.0.norm.weight" for level in range(100)]
    save_file({name: torch.ones(32) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="block_out_channels"):
        load_motion(tmp_path / "a.safetensors")
    save_file({names[0]: torch.tensor(1.0)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="block_out_channels"):
        load_motion(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("motion", "unet", "titles"),
    [
        (MotionConfig(), SDXL_UNET, (SD15.title, SDXL.title)),
        (SDXL_MOTION, UNetConfig(), (SDXL.title, SD15.title)),
        (replace(SDXL_MOTION, mid_depth=1), replace(SDXL_UNET, mid_depth=None), (SDXL.title, "SSD-1B", "middle")),
        (replace(MotionConfig(), layers=(2, 2, 2, 1)), UNetConfig(), (SD15.title, "2, 2, 2, 1 layers")),
    ],
)
def test_an_adapter_of_another_family(motion: MotionConfig, unet: UNetConfig, titles: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_motion(motion, unet)
    assert [title for title in titles if title not in str(caught.value)] == []


def test_adapters_that_fit() -> None:
    for motion, unet in (
        (MotionConfig(), UNetConfig()),
        (SDXL_MOTION, SDXL_UNET),
        (SDXL_MOTION, replace(SDXL_UNET, mid_depth=None)),  # SSD-1B
        (replace(SDXL_MOTION, mid_depth=1), SDXL_UNET),
    ):
        check_motion(motion, unet)


def test_a_refused_adapter_leaves_the_network_alone(tmp_path: Path) -> None:
    unet = tiny_unet()
    attach(unet, load_motion(write(tmp_path / "a", tensors())))
    names = list(unet.state_dict())
    with pytest.raises(CheckpointError, match="32, 32 channels, the U-Net has 32, 64"):
        attach(unet, MotionAdapter(replace(TINY, channels=(32, 32))))
    with pytest.raises(CheckpointError, match="32, 64 channels"):
        load_motion(tmp_path / "a", unet=UNetConfig())
    assert list(unet.state_dict()) == names


def test_a_smaller_adapter_takes_the_place_of_another() -> None:
    """Nothing of the first one stays behind, in the middle either."""
    unet = tiny_unet()
    attach(unet, MotionAdapter(TINY))
    attach(unet, MotionAdapter(replace(TINY, mid_depth=None)))
    assert not [name for name in unet.state_dict() if name.startswith("mid_block.motion")]


# ---- the schedule ----


def test_linear_betas() -> None:
    config = {"_class_name": "LCMScheduler", "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
    schedule = NoiseSchedule.from_config(with_betas(config, "linear"))
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0)
    torch.testing.assert_close(schedule.alpha**2, alpha_bar)
    trained = config | {"trained_betas": [0.001] * 1000}
    assert torch.equal(NoiseSchedule.from_config(with_betas(trained, "linear")).alpha, schedule.alpha)
    kept = NoiseSchedule.from_config(with_betas(config, "scaled_linear"))
    assert torch.equal(kept.alpha, NoiseSchedule.from_config(config).alpha)
    assert not torch.allclose(kept.alpha, schedule.alpha, rtol=0.01)


def test_an_adapter_says_which_betas(tmp_path: Path) -> None:
    assert beta_schedule_of(write(tmp_path / "released", tensors())) == "linear"
    assert beta_schedule_of(tmp_path / "released" / "diffusion_pytorch_model.safetensors") == "linear"
    assert beta_schedule_of(write(tmp_path / "own", tensors(), beta_schedule="scaled_linear")) == "scaled_linear"
