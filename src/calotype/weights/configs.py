"""The config.json of diffusers and transformers -> our dataclasses: misnomers corrected, what we do not build refused.

Bounds come before networks: a config with a billion layers is refused by arithmetic. They leave room above SDXL, the
largest model here (channels to 1280, 10 transformer blocks a layer, 2.6e9 parameters).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from calotype.errors import CheckpointError
from calotype.nn.clip import CLIPTextConfig
from calotype.nn.clip_vision import CLIPVisionConfig
from calotype.nn.tiny_vae import TinyVAEConfig
from calotype.nn.unet import Depths, UNetConfig
from calotype.nn.vae import VAEConfig
from calotype.rules import shown
from calotype.weights.fields import Fields

Config = UNetConfig | VAEConfig | TinyVAEConfig | CLIPTextConfig

MAX_LEVELS, MAX_LAYERS, MAX_DEPTH, MAX_BLOCKS = 8, 8, 24, 512
MAX_CHANNELS, MAX_WIDTH = 8192, 16384
MAX_SIDE = 4096
MAX_PARAMETERS = 20e9

MOTION_UNET = "UNetMotionModel"  # what AnimateDiff's pipelines save: a U-Net with motion modules between its layers
DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # -> whether it has transformers
UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
MID = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")

# Fields of UNet2DConditionModel that change the network, and the only values that Stable Diffusion's family uses.
# The others (dropout, upcast_attention, addition_embed_type_num_heads) change no float32 result of these networks.
UNET_FIXED: dict[str, tuple[object, ...]] = {
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1, 1.0),
    "act_fn": ("silu", "swish"),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "class_embeddings_concat": (False,),
    "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}
VAE_FIXED: dict[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
}
TINY_FIXED: dict[str, tuple[object, ...]] = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}


def check_class(raw: Mapping[str, Any], allowed: Sequence[str], where: str) -> str:
    """The config's class name, which must be on the list; nothing outside it is built or imported."""
    name = raw.get("_class_name")
    if name is None:  # transformers has another spelling
        architectures = raw.get("architectures")
        name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or name not in allowed:
        raise CheckpointError(f"{where}: the class is {shown(name)}; supported here are {', '.join(allowed)}")
    return name


def names_class(raw: Mapping[str, Any]) -> bool:
    """Whether a config says which class it is of."""
    return raw.get("_class_name") is not None or raw.get("architectures") is not None


# ---- U-Net ----


def unet_config(raw: Mapping[str, Any], where: str = "config.json") -> UNetConfig:
    """UNet2DConditionModel's config as ours; absent fields have diffusers' defaults. Raises CheckpointError."""
    if check_class(raw, ("UNet2DConditionModel", MOTION_UNET), where) == MOTION_UNET:
        raw = _without_motion(raw, where)
    fields = Fields(raw, where)
    for name, allowed in UNET_FIXED.items():
        fields.only(name, *allowed)
    _check_only_cross_attention(fields)

    channels = fields.integers("block_out_channels", (320, 640, 1280, 1280), 8, MAX_CHANNELS, (1, MAX_LEVELS))
    levels = len(channels)
    layers = fields.each_level("layers_per_block", 2, 1, MAX_LAYERS, levels)
    context = fields.each_level("cross_attention_dim", 1280, 1, MAX_WIDTH, levels)
    if len(set(context)) > 1:
        raise fields.refuse("cross_attention_dim", "one width for all levels is supported")
    # diffusers' attention_head_dim is the number of heads, by a mistake too widespread to be corrected there
    # (huggingface/diffusers issue 2011); num_attention_heads, its right name, wins where it is given.
    heads_field = "num_attention_heads" if fields.given("num_attention_heads") else "attention_head_dim"
    heads = fields.each_level(heads_field, 8, 1, 1024, levels)
    down_depths, up_depths, mid_depth = _depths(fields, layers)
    has_mid = "mid_block_type" not in raw or fields.given("mid_block_type")

    text_time = fields.given("addition_embed_type")
    config = UNetConfig(
        in_channels=fields.integer("in_channels", 4, 1, 64),
        out_channels=fields.integer("out_channels", 4, 1, 64),
        channels=channels,
        heads=heads,
        down_depths=down_depths,
        mid_depth=mid_depth,
        has_mid=has_mid,
        up_depths=up_depths,
        context_dim=context[0],
        linear_projection=fields.flag("use_linear_projection", False),
        guidance_dim=fields.integer("time_cond_proj_dim", 0, 2, 4096) if fields.given("time_cond_proj_dim") else None,
        addition_time_dim=fields.integer("addition_time_embed_dim", 0, 2, 4096) if text_time else None,
        addition_in_dim=fields.integer("projection_class_embeddings_input_dim", 0, 1, MAX_WIDTH) if text_time else None,
        norm_groups=fields.integer("norm_num_groups", 32, 1, 1024),
        norm_eps=fields.number("norm_eps", 1e-5, 1e-12, 1.0),
        flip_sin_to_cos=fields.flag("flip_sin_to_cos", True),
        freq_shift=fields.number("freq_shift", 0.0, 0.0, 1.0),
        sample_size=_side(fields, UNetConfig().sample_size),
    )
    _check_unet(fields, config, heads_field)
    return config


def _without_motion(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of the U-Net that a UNetMotionModel was made of: its blocks without their motion modules."""
    fields = Fields(raw, where)
    fields.only("mid_block_layers", 1)
    depths = raw.get("transformer_layers_per_block", 1)
    fields.only("transformer_layers_per_mid_block", None, depths[-1] if isinstance(depths, list) and depths else depths)
    plain = {**raw, "_class_name": "UNet2DConditionModel"}
    for name in ("down_block_types", "up_block_types"):
        if isinstance(raw.get(name), list):
            plain[name] = [kind.replace("Motion", "2D") if isinstance(kind, str) else kind for kind in raw[name]]
    return plain


def _check_only_cross_attention(fields: Fields) -> None:
    value = fields.raw.get("only_cross_attention", False)
    if any(entry is not False for entry in (value if isinstance(value, list) else [value])):
        raise fields.refuse("only_cross_attention", "only false is supported")


def _side(fields: Fields, default: int) -> int:
    """sample_size is an integer, a (height, width) or null; ours is one side, the larger."""
    if isinstance(fields.raw.get("sample_size"), list):
        return max(fields.integers("sample_size", (), 1, MAX_SIDE, (2, 2)))
    return fields.integer("sample_size", default, 1, MAX_SIDE)


def _depths(fields: Fields, layers: Sequence[int]) -> tuple[Depths, Depths, int | None]:
    """Transformer blocks behind each residual block: on the way down, on the way up, and in the middle."""
    levels = len(layers)
    default_down = ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",)
    default_up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1)
    down_types = fields.names("down_block_types", default_down, tuple(DOWN), levels)
    up_types = fields.names("up_block_types", default_up, tuple(UP), levels)
    mid_type = fields.one_of("mid_block_type", MID[0], MID)

    name, reverse = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    given = fields.raw.get(name)
    if isinstance(given, list):
        down = fields.items(name, (), levels, levels)
    else:
        down = (1 if given is None else given,) * levels
    if fields.given(reverse):
        up = fields.items(reverse, (), levels, levels)
    elif any(isinstance(depth, list) for depth in down):
        raise fields.refuse(name, f"lists inside it need {reverse} as well")
    else:
        up = down[::-1]

    def level(field: str, entry: object, count: int, attention: bool) -> tuple[int | None, ...]:
        if not attention:
            return (None,) * count
        depths: tuple[Any, ...] = tuple(entry) if isinstance(entry, list) else (entry,) * count
        if len(depths) != count or not all(type(depth) is int and 0 <= depth <= MAX_DEPTH for depth in depths):
            raise fields.refuse(field, f"integers from 0 to {MAX_DEPTH} are needed, one for each level or each layer")
        return depths

    up_field = reverse if fields.given(reverse) else name
    down_depths = tuple(level(name, down[i], layers[i], DOWN[down_types[i]]) for i in range(levels))
    up_depths = tuple(level(up_field, up[i], layers[-1 - i] + 1, UP[up_types[i]]) for i in range(levels))
    # The middle has one transformer; of a list diffusers uses the first entry.
    middle = down[-1][:1] if isinstance(down[-1], list) else down[-1]
    mid_depth = level(name, middle, 1, mid_type == MID[0])[0]
    return down_depths, up_depths, mid_depth


def _check_unet(fields: Fields, config: UNetConfig, heads_field: str) -> None:
    """What must hold between fields, and an upper bound on the network's size."""
    groups = config.norm_groups
    if any(channels % groups for channels in config.channels):
        raise fields.refuse("norm_num_groups", f"it must divide every entry of block_out_channels {config.channels}")
    levels = len(config.channels)
    blocks, parameters = 0, 0.0
    everywhere = [*enumerate(config.down_depths)]
    everywhere += [(levels - 1 - i, depths) for i, depths in enumerate(config.up_depths)]
    if config.has_mid:
        everywhere.append((levels - 1, (config.mid_depth, None)))
    for level, depths in everywhere:
        channels, blocks_here = config.channels[level], sum(depth for depth in depths if depth is not None)
        if any(depth is not None for depth in depths) and channels % config.heads[level]:
            raise fields.refuse(heads_field, f"the number of heads must divide block_out_channels {config.channels}")
        blocks += blocks_here
        # a residual block: two 3x3 convolutions, of perhaps doubled input; a transformer block: 16 C^2 + 2 C * context
        parameters += len(depths) * 27.0 * channels * max(config.channels)
        parameters += blocks_here * 2.0 * channels * (8 * channels + config.context_dim)
    if blocks > MAX_BLOCKS:
        raise fields.refuse(
            "transformer_layers_per_block", f"that makes {blocks} blocks; at most {MAX_BLOCKS} are built"
        )
    if parameters > MAX_PARAMETERS:
        raise fields.refuse(
            "block_out_channels", f"that makes {parameters:.0e} parameters; the limit is {MAX_PARAMETERS:.0e}"
        )


# ---- autoencoders ----


def vae_config(raw: Mapping[str, Any], where: str = "config.json") -> VAEConfig:
    """AutoencoderKL's config as ours; absent fields have diffusers' defaults. Raises CheckpointError."""
    check_class(raw, ("AutoencoderKL",), where)
    fields = Fields(raw, where)
    for name, allowed in VAE_FIXED.items():
        fields.only(name, *allowed)
    channels = fields.integers("block_out_channels", (64,), 8, MAX_CHANNELS, (1, MAX_LEVELS))
    levels = len(channels)
    fields.names("down_block_types", ("DownEncoderBlock2D",) * levels, ("DownEncoderBlock2D",), levels)
    fields.names("up_block_types", ("UpDecoderBlock2D",) * levels, ("UpDecoderBlock2D",), levels)
    groups = fields.integer("norm_num_groups", 32, 1, 1024)
    if any(channel % groups for channel in channels):
        raise fields.refuse("norm_num_groups", f"it must divide every entry of block_out_channels {channels}")
    return VAEConfig(
        in_channels=fields.integer("in_channels", 3, 3, 3),
        out_channels=fields.integer("out_channels", 3, 3, 3),
        latent_channels=fields.integer("latent_channels", 4, 1, 64),
        channels=channels,
        layers=fields.integer("layers_per_block", 1, 1, MAX_LAYERS),
        norm_groups=groups,
        mid_attention=fields.flag("mid_block_add_attention", True),
        quant_conv=fields.flag("use_quant_conv", True),
        post_quant_conv=fields.flag("use_post_quant_conv", True),
        scaling_factor=fields.number("scaling_factor", 0.18215, 1e-6, 1e6),
        shift_factor=fields.number("shift_factor", 0.0, -1e6, 1e6),
        force_upcast=fields.flag("force_upcast", True),
        sample_size=_side(fields, 32),
    )


def tiny_vae_config(raw: Mapping[str, Any], where: str = "config.json") -> TinyVAEConfig:
    """AutoencoderTiny's config as ours; absent fields have diffusers' defaults. Raises CheckpointError.

    Its latent_magnitude and latent_shift only matter for storing latents as bytes, which nothing here does.
    """
    check_class(raw, ("AutoencoderTiny",), where)
    fields = Fields(raw, where)
    for name, allowed in TINY_FIXED.items():
        fields.only(name, *allowed)
    default = TinyVAEConfig()

    def side(
        name: str, channels: Sequence[int], blocks: Sequence[int], levels: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        counts = fields.integers(f"num_{name}_blocks", blocks, 0, MAX_LAYERS, (levels, MAX_LEVELS))
        widths = fields.integers(f"{name}_block_out_channels", channels, 1, MAX_CHANNELS, (len(counts), len(counts)))
        if len(set(widths)) > 1:
            raise fields.refuse(f"{name}_block_out_channels", "one width for all levels is needed")
        return widths, counts

    encoder_channels, encoder_blocks = side("encoder", default.encoder_channels, default.encoder_blocks, 0)
    decoder_channels, decoder_blocks = side("decoder", default.decoder_channels, default.decoder_blocks, 1)
    return TinyVAEConfig(
        in_channels=fields.integer("in_channels", 3, 3, 3),
        out_channels=fields.integer("out_channels", 3, 3, 3),
        latent_channels=fields.integer("latent_channels", 4, 1, 64),
        encoder_channels=encoder_channels,
        decoder_channels=decoder_channels,
        encoder_blocks=encoder_blocks,
        decoder_blocks=decoder_blocks,
        scaling_factor=fields.number("scaling_factor", 1.0, 1e-6, 1e6),
        shift_factor=fields.number("shift_factor", 0.0, -1e6, 1e6),
        force_upcast=fields.flag("force_upcast", False),
    )


# ---- CLIP ----

TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")


def text_config(raw: Mapping[str, Any], where: str = "config.json") -> CLIPTextConfig:
    """The config of a CLIP text encoder (or the text half of a whole CLIP's) as ours. Raises CheckpointError.

    Only CLIPTextModelWithProjection projects its pooled output; every CLIPTextModel's config has a projection_dim too.
    A config that names no class is a CLIPTextModel's.
    """
    kind = check_class(raw, TEXT_CLASSES, where) if names_class(raw) else "CLIPTextModel"
    if kind == "CLIPModel":
        nested = raw.get("text_config")
        if not isinstance(nested, dict):
            raise CheckpointError(f"{where}: a CLIPModel needs text_config")
        raw = nested
    fields = Fields(raw, where)
    width, heads = _heads(fields, 512, 8)
    projection = fields.integer("projection_dim", 512, 1, MAX_WIDTH) if kind == "CLIPTextModelWithProjection" else None
    config = CLIPTextConfig(
        vocab_size=fields.integer("vocab_size", 49408, 1, 1_000_000),
        width=width,
        intermediate=fields.integer("intermediate_size", 2048, 1, 4 * MAX_WIDTH),
        layers=fields.integer("num_hidden_layers", 12, 1, 128),
        heads=heads,
        positions=fields.integer("max_position_embeddings", 77, 3, 4096),
        activation=fields.one_of("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
        projection_dim=projection,
        eos_token_id=fields.integer("eos_token_id", 49407, 0, 1_000_000),
        eps=fields.number("layer_norm_eps", 1e-5, 1e-12, 1.0),
    )
    parameters = config.layers * (4.0 * width + 2.0 * config.intermediate) * width + config.vocab_size * width
    if parameters > MAX_PARAMETERS:
        raise fields.refuse("hidden_size", f"that makes {parameters:.0e} parameters; the limit is {MAX_PARAMETERS:.0e}")
    return config


def clip_config(raw: Mapping[str, Any], where: str = "config.json") -> tuple[CLIPTextConfig, CLIPVisionConfig]:
    """The configs of a whole CLIPModel's two halves, for texts and for pictures. Raises CheckpointError."""
    check_class(raw, ("CLIPModel",), where)
    vision = raw.get("vision_config")
    if not isinstance(vision, dict):
        raise CheckpointError(f"{where}: a CLIPModel needs vision_config")
    projection = Fields(raw, where).integer("projection_dim", 512, 1, MAX_WIDTH)  # the halves' own ones do not count
    return replace(text_config(raw, where), projection_dim=projection), _vision_config(Fields(vision, where))


def _vision_config(fields: Fields) -> CLIPVisionConfig:
    width, heads = _heads(fields, 768, 12)
    patch = fields.integer("patch_size", 32, 1, MAX_SIDE)
    config = CLIPVisionConfig(
        width=width,
        intermediate=fields.integer("intermediate_size", 3072, 1, 4 * MAX_WIDTH),
        layers=fields.integer("num_hidden_layers", 12, 1, 128),
        heads=heads,
        channels=fields.integer("num_channels", 3, 3, 3),
        size=fields.integer("image_size", 224, patch, MAX_SIDE),
        patch=patch,
        activation=fields.one_of("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
        eps=fields.number("layer_norm_eps", 1e-5, 1e-12, 1.0),
    )
    places = config.patches + 3.0 * patch**2
    parameters = (config.layers * (4.0 * width + 2.0 * config.intermediate) + places) * width
    if parameters > MAX_PARAMETERS:
        raise fields.refuse("hidden_size", f"that makes {parameters:.0e} parameters; the limit is {MAX_PARAMETERS:.0e}")
    return config


def _heads(fields: Fields, width: int, heads: int) -> tuple[int, int]:
    """The width of a transformer and its number of heads; `width` and `heads` are what an absent field means."""
    width = fields.integer("hidden_size", width, 1, MAX_WIDTH)
    heads = fields.integer("num_attention_heads", heads, 1, 1024)
    if width % heads:
        raise fields.refuse("num_attention_heads", f"it must divide hidden_size {width}")
    return width, heads
