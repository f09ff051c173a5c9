"""ControlNets and T2I-Adapters against diffusers: what they give, and what a U-Net makes of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from diffusers.models.adapter import MultiAdapter
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from reference import NETWORK, Agreement
from topologies import ATTENTION, PLAIN
from torch import Tensor

from calotype.nn.controlnet import ControlNet
from calotype.nn.t2i_adapter import T2IAdapter as OurT2IAdapter
from calotype.nn.unet import Conditioning, Residuals, UNet
from calotype.weights.control import load_control
from calotype.weights.load import load_unet
from checkpoints import save

SIZES = [(8, 8), (9, 11)]  # latents; levels of 9 x 11 have odd sides
SDXL: dict[str, Any] = {
    "block_out_channels": (32, 64, 96),
    "cross_attention_dim": 40,
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 24 + 6 * 16,
}
FAMILIES: dict[str, tuple[tuple[bool, ...], dict[str, Any]]] = {  # levels with attention, the rest of the config
    "sd15": ((True, True, True, False), {"block_out_channels": (32, 64, 96, 96), "cross_attention_dim": 32}),
    "sd21": (
        (True, True, True, False),
        {
            "block_out_channels": (32, 64, 96, 96),
            "cross_attention_dim": 64,
            "attention_head_dim": [2, 4, 8, 8],
            "use_linear_projection": True,
        },
    ),
    "sdxl": ((False, True, True), SDXL),
    "ssd1b": (
        (False, True, True),
        SDXL
        | {
            "transformer_layers_per_block": [1, [2, 1], [2, 3]],
            "reverse_transformer_layers_per_block": [[2, 1, 3], [2, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
    ),
}
T2I: dict[str, dict[str, Any]] = {
    "full": {"channels": [32, 64, 96, 96]},
    "light": {"channels": [32, 64, 96], "num_res_blocks": 3, "adapter_type": "light_adapter"},
    "full_xl": {"channels": [32, 64, 96, 96], "downscale_factor": 16, "adapter_type": "full_adapter_xl"},
}


@dataclass(frozen=True)
class Both:
    """One network of random weights in both programs."""

    theirs: Any
    ours: Any


Make = Callable[[], Any]
Keep = Callable[[str, Make], Both]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Keep:
    """A network that diffusers makes, and what we load of its folder; each is made once."""
    made: dict[str, Both] = {}

    def keep(name: str, make: Make) -> Both:
        if name not in made:
            folder = tmp_path_factory.mktemp("controls") / name
            with warnings.catch_warnings(), torch.random.fork_rng():
                warnings.simplefilter("ignore")  # the peers' own
                torch.manual_seed(len(name) + sum(name.encode()))  # not the same weights in two of one kind
                theirs = make().eval()
                save(theirs, folder)
            ours = load_unet(folder) if isinstance(theirs, UNet2DConditionModel) else load_control(folder)
            made[name] = Both(theirs, ours)
        return made[name]

    return keep


def unet(networks: Keep, family: str) -> Both:
    def make() -> Any:
        attention, config = FAMILIES[family]
        levels = [ATTENTION if here else PLAIN for here in attention]
        types = {"down_block_types": [down for down, _ in levels], "up_block_types": [up for _, up in levels[::-1]]}
        return UNet2DConditionModel(**(config | types))

    return networks(f"unet-{family}", make)


def controlnet(networks: Keep, family: str, name: str = "a") -> Both:
    return networks(
        f"controlnet-{family}-{name}",
        lambda: ControlNetModel.from_unet(
            unet(networks, family).theirs, conditioning_embedding_out_channels=(8, 16, 24, 32)
        ),
    )


def t2i(networks: Keep, kind: str, name: str = "a", **config: Any) -> Both:
    return networks(f"{kind}-{name}", lambda: T2IAdapter(**(T2I[kind] | config)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(size: tuple[int, int], *, seed: int, channels: int = 3) -> Tensor:
    """Two control pictures of the size that latents have: patches, so that they differ from afar too, with grain."""
    draws = torch.Generator().manual_seed(seed)
    patches = torch.rand(2, channels, 3, 3, generator=draws)
    grain = torch.rand(2, channels, 8 * size[0], 8 * size[1], generator=draws)
    return 0.7 * torch.nn.functional.interpolate(patches, grain.shape[-2:]) + 0.3 * grain


@dataclass(frozen=True)
class Inputs:
    """Of two pictures that differ in everything."""

    x: Tensor
    t: Tensor
    conditioning: Conditioning

    def arguments(self) -> dict[str, Any]:
        """As diffusers takes them, beside the latents and the timesteps."""
        given: dict[str, Any] = {"encoder_hidden_states": self.conditioning.context}
        if self.conditioning.pooled is not None:
            added = {"text_embeds": self.conditioning.pooled, "time_ids": self.conditioning.time_ids}
            given["added_cond_kwargs"] = added
        return given


def inputs(network: Any, size: tuple[int, int]) -> Inputs:
    config = network.config
    pooled = time_ids = None
    if config.addition_in_dim is not None:
        pooled = normal(2, config.addition_in_dim - 6 * config.addition_time_dim, seed=2)
        time_ids = torch.tensor([[96.0, 96, 0, 0, 96, 96], [72, 88, 8, 16, 72, 88]])
    conditioning = Conditioning(normal(2, 7, config.context_dim, seed=1), pooled, time_ids)
    return Inputs(normal(2, 4, *size), torch.tensor([999, 241]), conditioning)


def run(both: Both, given: Inputs, image: Tensor) -> tuple[Residuals, Any]:
    """A ControlNet's output in both."""
    assert isinstance(both.ours, ControlNet)
    ours = both.ours(given.x, given.t, given.conditioning, both.ours.embed_hint(image))
    return ours, both.theirs(given.x, given.t, controlnet_cond=image, **given.arguments())


def compare(agree: Agreement, name: str, ours: Residuals, theirs: Any) -> None:
    assert len(ours.down) == len(theirs.down_block_res_samples)
    assert ours.mid is not None
    agree.tensors(name, "controlnet", ours.mid, theirs.mid_block_res_sample, NETWORK)
    for made, found in zip(ours.down, theirs.down_block_res_samples, strict=True):
        agree.tensors(name, "controlnet", made, found, NETWORK)


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ---- the networks alone ----


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_controlnet(networks: Keep, agree: Agreement, family: str, size: tuple[int, int]) -> None:
    both = controlnet(networks, family)
    given = inputs(both.ours, size)
    ours, theirs = run(both, given, picture(size, seed=3))
    compare(agree, family, ours, theirs)
    others, _ = run(both, given, picture(size, seed=4))
    differences = [apart(a, b) for a, b in zip(ours.down, others.down, strict=True)]
    assert min(differences) > 100 * NETWORK, "the picture does not matter: this proves little"


@pytest.mark.parametrize(
    "config",
    [
        {"controlnet_conditioning_channel_order": "bgr"},
        {"global_pool_conditions": True},
        {"layers_per_block": 1, "norm_eps": 1e-3, "norm_num_groups": 8, "flip_sin_to_cos": False, "freq_shift": 1},
        # as the small ones for SDXL: no attention anywhere
        {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"},
        {"transformer_layers_per_block": [0, 0, 1]},
    ],
    ids=lambda config: next(iter(config)),
)
@torch.inference_mode()
def test_what_configs_vary(networks: Keep, agree: Agreement, config: dict[str, Any]) -> None:
    types = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]}
    hint = {"conditioning_embedding_out_channels": (8, 16, 24, 32)}
    both = networks(f"sdxl-{next(iter(config))}", lambda: ControlNetModel(**(SDXL | types | hint | config)))
    ours, theirs = run(both, inputs(both.ours, (8, 8)), picture((8, 8), seed=3))
    compare(agree, "sdxl, varied", ours, theirs)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("kind", T2I)
@torch.inference_mode()
def test_a_t2i_adapter(networks: Keep, agree: Agreement, kind: str, channels: int, size: tuple[int, int]) -> None:
    if kind == "full_xl":
        size = (2 * size[0], 2 * size[1])  # diffusers needs multiples of 16 pixels; 18 x 22 is odd one level down
    both = t2i(networks, kind, str(channels), in_channels=channels)
    assert isinstance(both.ours, OurT2IAdapter)
    image = picture(size, seed=3, channels=channels)
    ours, theirs = both.ours(image), both.theirs(image)
    assert (len(ours.level), ours.down, ours.mid) == (4, (), None)
    for made, found in zip(ours.level, theirs, strict=True):
        agree.tensors(kind, "t2i-adapter", made, found, NETWORK)
    if size[0] % 8 == 0:
        sides = [(made.shape[1], image.shape[-1] // made.shape[-1]) for made in ours.level]
        assert sides == list(both.ours.config.maps())


# ---- inside a U-Net ----


def expected(network: Both, given: Inputs, controls: Any = None, levels: list[Tensor] | None = None) -> Tensor:
    """diffusers' U-Net with a ControlNet's (down, mid) and a T2I-Adapter's maps."""
    down, mid = controls or (None, None)
    return network.theirs(  # type: ignore[no-any-return]
        given.x,
        given.t,
        **given.arguments(),
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        down_intrablock_additional_residuals=None if levels is None else [level.clone() for level in levels],
    ).sample


def made(network: Both, given: Inputs, residuals: Residuals | None) -> Tensor:
    assert isinstance(network.ours, UNet)
    return network.ours(given.x, given.t, given.conditioning, residuals)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_unet_with_two_controlnets(networks: Keep, agree: Agreement, family: str, size: tuple[int, int]) -> None:
    """Each with its scale; the scale is a number or one for each row."""
    network, a, b = unet(networks, family), controlnet(networks, family), controlnet(networks, family, "b")
    given, images, scales = inputs(network.ours, size), [picture(size, seed=3), picture(size, seed=4)], [0.8, 0.35]
    both = MultiControlNetModel([a.theirs, b.theirs])
    found = expected(
        network,
        given,
        both(
            given.x, given.t, controlnet_cond=images, conditioning_scale=scales, return_dict=False, **given.arguments()
        ),
    )
    first, second = run(a, given, images[0])[0], run(b, given, images[1])[0]
    ours = made(network, given, first.scaled(0.8) + second.scaled(torch.tensor([0.35, 0.35])))
    agree.tensors(family, "with two", ours, found, NETWORK)
    assert apart(ours, made(network, given, first.scaled(0.8))) > 1e-2
    assert apart(ours, made(network, given, None)) > 1e-2


CASES = [("sd15", "full"), ("sd15", "light"), ("sd21", "full"), ("sdxl", "full_xl"), ("ssd1b", "full_xl")]


@pytest.mark.parametrize("size", [(8, 8), (10, 14)], ids=str)
@pytest.mark.parametrize(("family", "kind"), CASES)
@torch.inference_mode()
def test_a_unet_with_t2i_adapters(
    networks: Keep, agree: Agreement, family: str, kind: str, size: tuple[int, int]
) -> None:
    """One, two with weights, and one beside a ControlNet."""
    network, a, b = unet(networks, family), t2i(networks, kind), t2i(networks, kind, "b")
    given, images = inputs(network.ours, size), [picture(size, seed=3), picture(size, seed=4)]
    first, second = a.ours(images[0]), b.ours(images[1])

    ours = made(network, given, first.scaled(0.6))
    agree.tensors(family, kind, ours, expected(network, given, levels=[0.6 * x for x in a.theirs(images[0])]), NETWORK)
    assert apart(ours, made(network, given, None)) > 1e-2
    for level in range(len(first.level)):  # each map arrives
        part = Residuals(level=tuple(x * (i != level) for i, x in enumerate(first.level)))
        assert apart(ours, made(network, given, part.scaled(0.6))) > 1e-4

    together = MultiAdapter([a.theirs, b.theirs])(images, [0.6, 0.3])
    ours = made(network, given, first.scaled(0.6) + second.scaled(0.3))
    agree.tensors(family, kind, ours, expected(network, given, levels=together), NETWORK)

    control = controlnet(networks, family)
    residuals, found = run(control, given, images[1])
    ours = made(network, given, first.scaled(0.6) + residuals)
    pair = (found.down_block_res_samples, found.mid_block_res_sample)
    theirs = expected(network, given, pair, [0.6 * x for x in a.theirs(images[0])])
    agree.tensors(family, f"{kind} and net", ours, theirs, NETWORK)


@pytest.mark.parametrize("pooled", [False, True])
@torch.inference_mode()
def test_a_pooled_residual_is_the_same_everywhere(networks: Keep, agree: Agreement, pooled: bool) -> None:
    """ControlNet Shuffle's: (B, C, 1, 1), alone and added to another's."""
    network, plain = unet(networks, "sdxl"), controlnet(networks, "sdxl")
    types = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]}
    hint = {"conditioning_embedding_out_channels": (8, 16, 24, 32), "global_pool_conditions": True}
    shuffle = networks("sdxl-global_pool_conditions", lambda: ControlNetModel(**(SDXL | types | hint)))
    given, image = inputs(network.ours, (8, 8)), picture((8, 8), seed=3)
    residuals, found = run(shuffle, given, image)
    assert {tuple(x.shape[-2:]) for x in residuals.down} == {(1, 1)}
    down, mid = found.down_block_res_samples, found.mid_block_res_sample
    if pooled:
        other, theirs = run(plain, given, image)
        residuals = residuals + other
        down = [a + b for a, b in zip(down, theirs.down_block_res_samples, strict=True)]
        mid = mid + theirs.mid_block_res_sample
    agree.tensors(
        "sdxl, varied", "pooled", made(network, given, residuals), expected(network, given, (down, mid)), NETWORK
    )


# ---- what diffusers cannot show ----


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@torch.inference_mode()
def test_a_scale_of_zero_is_no_control(networks: Keep, family: str) -> None:
    network, control = unet(networks, family), controlnet(networks, family)
    adapter = t2i(networks, "full_xl" if family == "sdxl" else "full")
    given, image = inputs(network.ours, (8, 8)), picture((8, 8), seed=3)
    residuals = run(control, given, image)[0] + adapter.ours(image)
    assert torch.equal(made(network, given, residuals.scaled(0.0)), made(network, given, None))
    # and a scale of its own for each row: the first row is as without
    some = made(network, given, residuals.scaled(torch.tensor([0.0, 1.0])))
    assert torch.equal(some[0], made(network, given, residuals.scaled(0.0))[0])
    assert apart(some[1], made(network, given, residuals)[1]) < 1e-5


@torch.inference_mode()
def test_an_adapter_for_sdxl_takes_any_size(networks: Keep) -> None:
    """Latents of odd height or width are no multiple of its 16 pixels."""
    network, adapter = unet(networks, "sdxl"), t2i(networks, "full_xl")
    given, image = inputs(network.ours, (9, 11)), picture((9, 11), seed=3)
    maps = adapter.ours(image)
    assert [tuple(x.shape[-2:]) for x in maps.level] == [(5, 6), (5, 6), (3, 3), (3, 3)]
    assert apart(made(network, given, maps), made(network, given, None)) > 1e-2
    filled = torch.nn.functional.pad(image, (0, 8, 0, 8), mode="replicate")
    assert all(torch.equal(a, b) for a, b in zip(maps.level, adapter.theirs(filled), strict=True))


@torch.inference_mode()
def test_a_picture_is_the_same_alone_and_in_a_batch(networks: Keep) -> None:
    both = controlnet(networks, "sdxl")
    given, image = inputs(both.ours, (8, 8)), picture((8, 8), seed=3)
    together = run(both, given, image)[0]
    alone = both.ours(given.x[1:], given.t[1:], given.conditioning.select(slice(1, 2)), both.ours.embed_hint(image[1:]))
    assert max(apart(a, b[1:]) for a, b in zip(alone.down, together.down, strict=True)) < 1e-5


def test_norms(networks: Keep) -> None:
    """Their groups and epsilons, which are too small to show in the numbers above."""
    both = controlnet(networks, "sdxl")
    ours, theirs = (
        {
            name: (getattr(each, "num_groups", 1), each.eps)
            for name, each in network.named_modules()
            if isinstance(each, torch.nn.GroupNorm | torch.nn.LayerNorm)
        }
        for network in (both.ours, both.theirs)
    )
    assert len(ours) > 20
    assert ours == theirs


def test_folders_are_written_as_the_real_ones(networks: Keep, tmp_path: Path) -> None:
    """The names in the files are the networks' own."""
    for both in (controlnet(networks, "sdxl"), t2i(networks, "light")):
        assert set(both.ours.state_dict()) == set(both.theirs.state_dict())
