"""Each network alone against diffusers and transformers, for every topology."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import topologies
import torch
from reference import NETWORK, SHIPPED, Agreement, Pair
from torch import Tensor, nn

from calotype.nn.unet import Conditioning

MODELS = [SHIPPED, *topologies.REDUCED]
PROMPTS = ["a red fox in the snow", "", "an astronaut's portrait, dogs & cats!"]
SIZES = [(12, 12), (9, 11), (16, 10)]  # latents; levels of 9 x 11 have odd sides

pytestmark = pytest.mark.parametrize("model", MODELS)
Pairs = Callable[[str], Pair]


@pytest.fixture
def pair(pairs: Pairs, model: str) -> Pair:
    return pairs(model)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("clip_skip", [None, 1, 2])
@torch.inference_mode()
def test_text(pair: Pair, agree: Agreement, clip_skip: int | None) -> None:
    context, pooled = pair.engine.parts.text.encode(PROMPTS, clip_skip=clip_skip)
    arguments: dict[str, Any] = {"do_classifier_free_guidance": False, "clip_skip": clip_skip, "device": "cpu"}
    found = pair.pipeline.encode_prompt(PROMPTS, num_images_per_prompt=1, **arguments)
    agree.tensors(pair.name, "text", context, found[0], NETWORK)
    assert (pooled is not None) == (len(found) == 4)
    if pooled is not None:
        agree.tensors(pair.name, "text", pooled, found[2], NETWORK)


def test_norms(pair: Pair) -> None:
    """Their groups and epsilons, which are too small to show in the numbers below."""
    parts, pipeline = pair.engine.parts, pair.pipeline
    encoders = zip(parts.text.models, (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)), strict=False)
    for ours, theirs in ((parts.unet, pipeline.unet), (parts.vae, pipeline.vae), *encoders):
        wanted, made = norms(theirs), norms(ours)
        assert len(made) > 6
        assert made == wanted


def norms(network: nn.Module) -> dict[str, tuple[int, float]]:
    found = {name: each for name, each in network.named_modules() if isinstance(each, nn.GroupNorm | nn.LayerNorm)}
    groups = {name: getattr(each, "num_groups", 1) for name, each in found.items()}
    return {name.removeprefix("text_model."): (groups[name], each.eps) for name, each in found.items()}


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_unet(pair: Pair, agree: Agreement, size: tuple[int, int]) -> None:
    """One call for three pictures that differ in everything."""
    ours, theirs = pair.engine.parts.unet, pair.pipeline.unet
    config = ours.config
    x, t, context = normal(3, 4, *size), torch.tensor([999, 501, 0]), normal(3, 77, config.context_dim, seed=1)
    w = torch.tensor([0.0, 3.0, 7.5]) if config.guidance_dim is not None else None
    pooled = time_ids = None
    arguments: dict[str, Any] = {}
    if config.addition_in_dim is not None:
        assert config.addition_time_dim is not None
        pooled = normal(3, config.addition_in_dim - 6 * config.addition_time_dim, seed=2)
        time_ids = torch.tensor([[96, 96, 0, 0, 96, 96], [72, 88, 8, 16, 72, 88], [1024, 512, 0, 0, 1024, 512]]).float()
        arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    if w is not None:
        assert theirs.config.time_cond_proj_dim == config.guidance_dim
        arguments["timestep_cond"] = pair.pipeline.get_guidance_scale_embedding(w, config.guidance_dim)
    found = theirs(x, t, context, **arguments).sample
    made = ours(x, t, Conditioning(context, pooled, time_ids, w))
    agree.tensors(pair.name, "unet", made, found, NETWORK)
    others = ours(x, t, Conditioning(context.roll(1, 0), pooled, time_ids, w))
    assert ((made - others).norm() / made.norm()).item() > 1e-3, "the text does not matter: this proves little"


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_decode(pair: Pair, agree: Agreement, size: tuple[int, int]) -> None:
    latents = normal(2, 4, *size)
    found = pair.pipeline.vae.decode(latents).sample
    agree.tensors(pair.name, "decode", pair.engine.parts.vae.decode(latents), found, NETWORK)


@pytest.mark.parametrize("size", [(96, 96), (72, 88), (75, 93)], ids=str)
@torch.inference_mode()
def test_encode(pair: Pair, agree: Agreement, size: tuple[int, int]) -> None:
    """Mean and deviation. The last size is no multiple of 8."""
    images = normal(2, 3, *size).clamp(-1, 1)
    found = pair.pipeline.vae.encode(images).latent_dist
    mean, logvar = pair.engine.parts.vae.encode(images)
    assert logvar is not None
    agree.tensors(pair.name, "encode", mean, found.mean, NETWORK)
    agree.tensors(pair.name, "encode", (logvar / 2).exp(), found.std, NETWORK)


@torch.inference_mode()
def test_what_can_be_computed_once_is_the_same(pair: Pair) -> None:
    """A text's keys and values, the embedding of the timesteps and each block's projection of it, bit for bit."""
    unet = pair.engine.parts.unet
    config, size = unet.config, (3, unet.config.in_channels, 16, 12)
    x, t, context = normal(*size), torch.tensor([999, 500, 0]), normal(3, 77, config.context_dim, seed=1)
    pooled = time_ids = w = None
    if config.addition_in_dim is not None and config.addition_time_dim is not None:
        pooled = normal(3, config.addition_in_dim - 6 * config.addition_time_dim, seed=2)
        time_ids = torch.tensor([128.0, 96.0, 0.0, 0.0, 128.0, 96.0]).expand(3, 6)
    if config.guidance_dim is not None:
        w = torch.tensor([3.0, 7.0, 0.0])
    conditioning = Conditioning(context, pooled, time_ids, w)
    wanted = unet(x, t, conditioning)

    temb = unet.embed(t, conditioning, x.dtype)
    assert torch.equal(unet.run(x, temb, context), wanted)
    assert torch.equal(unet.run(x, unet.shifts(temb), unet.keys_values(context)), wanted)
    others = unet.run(x, unet.shifts(temb.roll(1, 0)), unet.keys_values(context.roll(1, 0)))
    assert ((wanted - others).norm() / wanted.norm()).item() > 1e-3, "neither matters: this proves little"
