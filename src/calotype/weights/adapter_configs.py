"""The configs of ControlNets and T2I-Adapters as ours; and, for files without one, what config.json would have said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from calotype.nn.controlnet import ControlNetConfig
from calotype.nn.t2i_adapter import T2IAdapterConfig
from calotype.weights.configs import MAX_CHANNELS, MAX_LAYERS, MAX_LEVELS, check_class, unet_config
from calotype.weights.detect import Shapes
from calotype.weights.fields import Fields

KINDS: dict[str, Literal["full", "full_xl", "light"]] = {
    "full_adapter": "full",
    "full_adapter_xl": "full_xl",
    "light_adapter": "light",
}
# Input channels of a T2I-Adapter's first layer -> the picture's, and pixels to one of the first map in each direction.
FIRST_LAYERS = {channels * factor**2: (channels, factor) for channels in (1, 3) for factor in (8, 16)}


def controlnet_config(raw: Mapping[str, Any], where: str = "config.json") -> ControlNetConfig:
    """ControlNetModel's config as ours; absent fields have diffusers' defaults. Raises CheckpointError.

    Its fields are those of a U-Net's encoder, and a few more. There is no way up: what it would be does not matter.
    """
    check_class(raw, ("ControlNetModel",), where)
    fields = Fields(raw, where)
    if fields.integer("conditioning_channels", 3, 1, 64) != 3:
        raise fields.refuse(
            "conditioning_channels", "3 are needed, the colours of one picture: no mask, no second picture"
        )
    encoder = {**raw, "_class_name": "UNet2DConditionModel", "up_block_types": None}
    depths = raw.get("transformer_layers_per_block")
    if isinstance(depths, list) and any(isinstance(depth, list) for depth in depths):
        encoder["reverse_transformer_layers_per_block"] = [1] * len(depths)
    return ControlNetConfig(
        **vars(unet_config(encoder, where)),
        hint_channels=fields.integers(
            "conditioning_embedding_out_channels", ControlNetConfig.hint_channels, 1, MAX_CHANNELS, (1, MAX_LEVELS)
        ),
        bgr=fields.one_of("controlnet_conditioning_channel_order", "rgb", ("rgb", "bgr")) == "bgr",
        global_pool=fields.flag("global_pool_conditions", False),
    )


def t2i_adapter_config(raw: Mapping[str, Any], where: str = "config.json") -> T2IAdapterConfig:
    """T2IAdapter's config as ours; absent fields have diffusers' defaults. Raises CheckpointError."""
    check_class(raw, ("T2IAdapter",), where)
    fields = Fields(raw, where)
    in_channels = fields.integer("in_channels", 3, 1, 3)
    if in_channels == 2:
        raise fields.refuse("in_channels", "3 (colour) or 1 (grey) is needed")
    return T2IAdapterConfig(
        kind=KINDS[fields.one_of("adapter_type", "full_adapter", tuple(KINDS))],
        in_channels=in_channels,
        channels=fields.integers("channels", T2IAdapterConfig.channels, 4, MAX_CHANNELS, (1, MAX_LEVELS)),
        layers=fields.integer("num_res_blocks", 2, 1, MAX_LAYERS),
        downscale=fields.integer("downscale_factor", 8, 1, 64),
    )


# ---- files without a config ----


def raw_controlnet(shapes: Shapes) -> dict[str, Any]:
    """ControlNetModel's config by its tensors, which show all but the number of heads and the order of colours.

    Heads are 8 in Stable Diffusion 1.x, and 64 wide in those that have linear projections; colours are taken for RGB.
    """
    resnet = "down_blocks.{}.resnets.{}.conv1.weight"
    projection, block = "attentions.{}.proj_in.weight", "attentions.{}.transformer_blocks.{}.norm1.weight"
    levels = range(_count(shapes, resnet.format("{}", 0)))
    layers = [_count(shapes, resnet.format(level, "{}")) for level in levels]
    channels = [_side(shapes, resnet.format(level, 0), 0) for level in levels]
    attention = [f"down_blocks.{level}.{projection.format(0)}" in shapes for level in levels]
    middle_attends = "mid_block." + projection.format(0) in shapes
    middle = _count(shapes, "mid_block." + block.format(0, "{}"))
    depths: list[Any] = [middle] * len(levels)
    for level in levels:
        if attention[level]:
            depths[level] = [
                _count(shapes, f"down_blocks.{level}.{block.format(i, '{}')}") for i in range(layers[level])
            ]
    linear = any(len(shape) == 2 for name, shape in shapes.items() if name.endswith("proj_in.weight"))
    contexts = [shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and shape]
    pooled = "add_embedding.linear_1.weight" in shapes
    return {
        "_class_name": "ControlNetModel",
        "in_channels": _side(shapes, "conv_in.weight", 1),
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attention],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle_attends else "UNetMidBlock2D",
        "layers_per_block": layers,
        "transformer_layers_per_block": depths,
        "cross_attention_dim": max(contexts, default=1),
        "num_attention_heads": [max(1, width // 64) for width in channels] if linear else 8,
        "use_linear_projection": linear,
        "addition_embed_type": "text_time" if pooled else None,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": _side(shapes, "add_embedding.linear_1.weight", 1),
        **raw_hint(shapes),
    }


def raw_hint(shapes: Shapes, hint: str = "controlnet_cond_embedding.") -> dict[str, Any]:
    """Of ControlNetModel's config what is said of the picture that it reads."""
    below = range(_count(shapes, hint + "blocks.{}.weight") // 2)
    channels = [_side(shapes, f"{hint}blocks.{2 * i + 1}.weight", 0) for i in below]
    return {
        "conditioning_channels": _side(shapes, hint + "conv_in.weight", 1),
        "conditioning_embedding_out_channels": [_side(shapes, hint + "conv_in.weight", 0), *channels],
    }


def raw_t2i_adapter(shapes: Shapes) -> dict[str, Any]:
    """T2IAdapter's config by its tensors."""
    light = "adapter.conv_in.weight" not in shapes
    first, last = ("body.0.in_conv", "out_conv") if light else ("conv_in", "resnets.0.block1")
    in_channels, factor = FIRST_LAYERS.get(_side(shapes, f"adapter.{first}.weight", 1), (0, 0))
    levels = range(_count(shapes, "adapter.body.{}.resnets.0.block1.weight"))
    channels = [_side(shapes, f"adapter.body.{level}.{last}.weight", 0) for level in levels]
    kind = "full_adapter_xl" if factor == 16 else "full_adapter"  # all known ones: SDXL's levels begin at 16 pixels
    return {
        "_class_name": "T2IAdapter",
        "adapter_type": "light_adapter" if light else kind,
        "in_channels": in_channels,
        "channels": channels[:-1] if light else channels,
        "num_res_blocks": _count(shapes, "adapter.body.0.resnets.{}.block1.weight"),
        "downscale_factor": factor,
    }


def _count(shapes: Shapes, pattern: str) -> int:
    """How many of the names pattern.format(0), pattern.format(1), ... there are."""
    found = 0
    while pattern.format(found) in shapes:
        found += 1
    return found


def _side(shapes: Shapes, name: str, axis: int) -> int:
    """One side of a tensor; 0, which no config may say, where there is none."""
    return next(iter(shapes.get(name, ())[axis:]), 0)
