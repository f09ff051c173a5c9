"""Motion modules inside the U-Net against diffusers' UNetMotionModel, with random weights everywhere."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.unets.unet_motion_model import MotionAdapter as TheirAdapter
from diffusers.models.unets.unet_motion_model import UNetMotionModel
from reference import NETWORK, Agreement
from torch import Tensor

from calotype.nn import motion
from calotype.nn.call import Call
from calotype.nn.motion import attach, detach
from calotype.nn.unet import Conditioning, Residuals, UNet
from calotype.nn.windows import by_windows, context_windows
from calotype.weights.load import load_unet
from calotype.weights.motion import load_motion
from checkpoints import randomise

SIZE = (12, 10)  # latents; the deepest level of four is 2 x 2, of 1.5 on one side
POOLED = 40
MAX_FRAMES = 8

SD15: dict[str, Any] = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "layers_per_block": 2,
    "cross_attention_dim": 80,
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": POOLED + 6 * 16,
}
# Version 2 has a module in the middle, 1 and 3 have not; SDXL's has not either. The last has what none of them has.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd15-v2": (SD15, {}),
    "sd15-v3": (SD15, {"use_motion_mid_block": False}),
    "sdxl": (SDXL, {"use_motion_mid_block": False}),
    "sdxl-lcm": (SDXL | {"time_cond_proj_dim": 32}, {"use_motion_mid_block": False}),
    "odd": (
        SDXL | {"layers_per_block": [1, 2, 1]},
        {
            "motion_layers_per_block": [1, 2, 1],
            "motion_transformer_layers_per_block": [2, 1, 3],
            "motion_transformer_layers_per_mid_block": 2,
            "motion_num_attention_heads": [4, 8, 2],
        },
    ),
}


@dataclass(frozen=True)
class Animated:
    """The same U-Net and adapter twice: ours, and theirs made into one."""

    name: str
    folder: Path
    ours: UNet
    theirs: Any


@pytest.fixture(scope="module")
def animated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda name: write(name, tmp_path_factory.mktemp(name)))


def write(name: str, folder: Path) -> Animated:
    config, changes = CASES[name]
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # the peers' own
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**config, norm_num_groups=8, sample_size=12)
        defaults = {
            "block_out_channels": config["block_out_channels"],
            "motion_layers_per_block": 2,
            "motion_num_attention_heads": 8,
            "motion_norm_num_groups": 8,
            "motion_max_seq_length": MAX_FRAMES,
        }
        adapter = TheirAdapter(**(defaults | changes))
        for part, each in (("unet", unet), ("motion_adapter", adapter)):
            randomise(each)
            each.save_pretrained(folder / part)
        theirs = UNetMotionModel.from_unet2d(unet, adapter).eval()
        if unet.config.addition_embed_type is not None:  # they leave this one as it was initialised
            theirs.add_embedding.load_state_dict(unet.add_embedding.state_dict())
    ours = load_unet(folder / "unet")
    attach(ours, load_motion(folder, unet=ours.config))
    return Animated(name, folder, ours, theirs)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Inputs:
    """Those of n clips, as we take them: a row for each frame."""

    x: Tensor
    t: Tensor
    conditioning: Conditioning
    frames: int

    @property
    def clips(self) -> int:
        return len(self.x) // self.frames

    def theirs(self, tensor: Tensor) -> Tensor:
        """(n F, C, h, w) -> (n, C, F, h, w)."""
        return tensor.view(self.clips, self.frames, *tensor.shape[1:]).transpose(1, 2)


def inputs(unet: UNet, clips: int, frames: int) -> Inputs:
    """Clips that differ in their text and, where the U-Net takes these, sizes and guidance."""
    rows = clips * frames
    config = unet.config
    context = normal(clips, 7, config.context_dim, seed=1).repeat_interleave(frames, dim=0)
    pooled = time_ids = w = None
    if config.addition_in_dim is not None:
        pooled = normal(clips, POOLED, seed=2).repeat_interleave(frames, dim=0)
        time_ids = (normal(clips, 6, seed=3).abs() * 100).round().repeat_interleave(frames, dim=0)
    if config.guidance_dim is not None:
        w = torch.arange(clips).float().mul(3).repeat_interleave(frames)
    return Inputs(normal(rows, 4, *SIZE), torch.full((rows,), 501), Conditioning(context, pooled, time_ids, w), frames)


def run_theirs(case: Animated, given: Inputs, residuals: Residuals | None = None) -> Tensor:
    """As the AnimateDiff pipelines call it: one row a clip for all but the latents and the text."""
    conditioning = given.conditioning.select(torch.arange(0, len(given.x), given.frames))
    arguments: dict[str, Any] = {}
    if conditioning.pooled is not None:
        arguments["added_cond_kwargs"] = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
    if conditioning.w is not None:
        from diffusers import LatentConsistencyModelPipeline

        width = case.ours.config.guidance_dim
        arguments["timestep_cond"] = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            None, conditioning.w, width
        )
    if residuals is not None:
        arguments["down_block_additional_residuals"] = residuals.down
        arguments["mid_block_additional_residual"] = residuals.mid
    out = case.theirs(given.theirs(given.x), 501, given.conditioning.context, **arguments).sample
    return out.transpose(1, 2).flatten(0, 1)  # type: ignore[no-any-return]


BATCHES = [(1, 1), (2, 5), (1, MAX_FRAMES)]  # clips, frames; two clips are what guidance makes of one
MORE = [(1, 2), (3, 2)]


@pytest.mark.parametrize(
    ("name", "clips", "frames"), [(n, *b) for n in CASES for b in (BATCHES + MORE if n == "sd15-v2" else BATCHES)]
)
@torch.inference_mode()
def test_the_network_agrees(animated: Any, agree: Agreement, name: str, clips: int, frames: int) -> None:
    case = animated(name)
    given = inputs(case.ours, clips, frames)
    made = case.ours(given.x, given.t, given.conditioning, None, frames)
    agree.tensors(name, "motion", made, run_theirs(case, given), NETWORK)


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_the_motion_modules_matter(animated: Any, name: str) -> None:
    """Otherwise the agreement would prove little."""
    unet = animated(name).ours
    given = inputs(unet, 1, 2)
    moving = unet(given.x, given.t, given.conditioning, None, 2)
    still = unet(given.x, given.t, given.conditioning)
    assert ((moving - still).norm() / moving.norm()).item() > 1e-2


def residuals_for(unet: UNet, given: Inputs) -> Residuals:
    """What a ControlNet would add, in the shapes of the maps that the way up takes in."""
    shapes: list[tuple[int, ...]] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, out: shapes.append(tuple(out.shape)))
        for block in unet.down_blocks
        for module in [*block.resnets, *(block.downsamplers or ())]  # type: ignore[union-attr, misc]
    ]
    unet(given.x, given.t, given.conditioning)
    for hook in hooks:
        hook.remove()
    shapes = [(len(given.x), unet.config.channels[0], *SIZE), *shapes]
    down = tuple(normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return Residuals(down, normal(*shapes[-1], seed=100))


@pytest.mark.parametrize("name", ["sd15-v2", "sdxl"])
@torch.inference_mode()
def test_controls_reach_every_frame(animated: Any, agree: Agreement, name: str) -> None:
    case = animated(name)
    given = inputs(case.ours, 2, 3)
    residuals = residuals_for(case.ours, given)
    made = case.ours(given.x, given.t, given.conditioning, residuals, 3)
    agree.tensors(name, "controlled", made, run_theirs(case, given, residuals), NETWORK)
    without = case.ours(given.x, given.t, given.conditioning, None, 3)
    assert ((made - without).norm() / made.norm()).item() > 1e-2


@torch.inference_mode()
def test_a_picture_is_what_it_was(animated: Any) -> None:
    """Attached modules take part only where `frames` are given, and leave nothing behind."""
    case = animated("sd15-v2")
    given = inputs(case.ours, 3, 1)
    plain = load_unet(case.folder / "unet")
    before = plain(given.x, given.t, given.conditioning)
    assert torch.equal(case.ours(given.x, given.t, given.conditioning), before)
    names = list(plain.state_dict())
    attach(plain, load_motion(case.folder))
    assert len(plain.state_dict()) > len(names)
    detach(plain)
    assert list(plain.state_dict()) == names
    assert torch.equal(plain(given.x, given.t, given.conditioning, None, 3), before)


@torch.inference_mode()
def test_clips_of_a_batch_do_not_know_each_other(animated: Any) -> None:
    case = animated("sd15-v2")
    given = inputs(case.ours, 3, 4)
    together = case.ours(given.x, given.t, given.conditioning, None, 4)
    rows = torch.arange(4, 8)
    alone = case.ours(given.x[rows], given.t[rows], given.conditioning.select(rows), None, 4)
    torch.testing.assert_close(together[rows], alone, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_many_pixels_are_attended_in_parts(animated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's kernels do not take as many sequences as a large picture has pixels."""
    case = animated("sd15-v2")
    given = inputs(case.ours, 2, 3)
    whole = case.ours(given.x, given.t, given.conditioning, None, 3)
    monkeypatch.setattr(motion, "MAX_SEQUENCES", 50)
    parts = case.ours(given.x, given.t, given.conditioning, None, 3)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_windows_of_the_network(animated: Any) -> None:
    """Each window is a clip for the network, controls included; their outputs are averaged frame by frame."""
    case = animated("sdxl-lcm")
    frames, clips = 11, 2
    given = inputs(case.ours, clips, frames)
    residuals = residuals_for(case.ours, given)
    windows = context_windows(frames, MAX_FRAMES, 5)
    assert windows == [range(8), range(3, 11)]
    asking = by_windows(Call(given.x, given.t, given.conditioning, residuals, frames), windows)
    calls = [next(asking)]
    calls.append(asking.send(calls[0].answered_by(case.ours)))
    with pytest.raises(StopIteration) as end:
        asking.send(calls[1].answered_by(case.ours))
    made = end.value.value
    first = torch.cat([torch.arange(0, 8), torch.arange(11, 19)])
    second = first + 3
    outs = [
        case.ours(given.x[rows], given.t[rows], given.conditioning.select(rows), residuals.select(rows), 8)
        for rows in (first, second)
    ]
    a, b = (out.view(clips, 8, *out.shape[1:]) for out in outs)
    made = made.view(clips, frames, *made.shape[1:])
    assert torch.equal(made[:, :3], a[:, :3])
    assert torch.equal(made[:, 8:], b[:, 5:])
    # Frame 5 is the sixth of the first window, which weighs 3, and the third of the second, which weighs 3.
    torch.testing.assert_close(made[:, 5], (a[:, 5] + b[:, 2]) / 2)
    # Frame 3 weighs 4 in the first window and 1 in the second.
    torch.testing.assert_close(made[:, 3], (4 * a[:, 3] + b[:, 0]) / 5)
