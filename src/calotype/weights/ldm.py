"""The names that single-file checkpoints use (those of LDM, github.com/CompVis/latent-diffusion), made from configs.

LDM numbers what a U-Net does in the order of its forward pass: input_blocks.0 is conv_in, then every residual block
(with its transformer) and every change of size has a number; the middle; output_blocks. Ours are diffusers' names, by
level. OpenCLIP's text encoders are named by OpenCLIP, and hold q, k and v in one tensor; CLIP L's as transformers does.

A table has each of a network's names -> the file's, without the prefix that the network has there. It is one to one,
but for OpenCLIP's q, k and v.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from calotype.nn.unet import UNetConfig
from calotype.nn.vae import VAEConfig

Table = dict[str, str]

UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    # LDM has no guidance embedding: diffusers' own converter leaves this name as it is, others make it time_embed's.
    "time_embedding.cond_proj": "time_embedding.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_TOP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
TRANSPOSED = "text_projection"  # under this name: OpenCLIP multiplies from the other side

# What else a file may call a tensor -> its name in our tables.
OTHER_NAMES = {
    "time_embed.cond_proj.weight": "time_embedding.cond_proj.weight",
    "text_projection.weight": "text_projection",
}
VAE_ATTENTION_OTHER = re.compile(r"(?<=\.attn_1\.)(to_q|to_k|to_v|to_out\.0)(?=\.)")


# ---- U-Nets ----


def unet_table(names: Iterable[str], config: UNetConfig) -> Table:
    """The table of a U-Net's tensors `names`, which are ours."""
    blocks = {ours: ldm for ldm, ours in unet_blocks(config).items()}
    return _table(names, blocks | UNET_TOP, UNET_RESNET)


def unet_blocks(config: UNetConfig) -> dict[str, str]:
    """The modules of a U-Net's way down, middle and way up: LDM's prefix -> ours, such as
    "input_blocks.4.1" -> "down_blocks.1.attentions.0". None is the beginning of another.
    """
    return {"input_blocks.0.0": "conv_in", **dict(_down(config)), **dict(_middle(config)), **dict(_up(config))}


def _down(config: UNetConfig) -> Iterator[tuple[str, str]]:
    number = 1
    for level, depths in enumerate(config.down_depths):
        attention = 0
        for layer, depth in enumerate(depths):
            yield f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{layer}"
            if depth is not None:
                yield f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{attention}"
                attention += 1
            number += 1
        if level < len(config.channels) - 1:
            yield f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            number += 1


def _middle(config: UNetConfig) -> Iterator[tuple[str, str]]:
    if not config.has_mid:
        return
    yield "middle_block.0", "mid_block.resnets.0"
    if config.mid_depth is not None:
        yield "middle_block.1", "mid_block.attentions.0"
        yield "middle_block.2", "mid_block.resnets.1"


def _up(config: UNetConfig) -> Iterator[tuple[str, str]]:
    number = 0
    for block, depths in enumerate(config.up_depths):
        attention = 0
        for layer, depth in enumerate(depths):
            inside = 0
            yield f"output_blocks.{number}.{inside}", f"up_blocks.{block}.resnets.{layer}"
            if depth is not None:
                inside += 1
                yield f"output_blocks.{number}.{inside}", f"up_blocks.{block}.attentions.{attention}"
                attention += 1
            if layer == len(depths) - 1 and block < len(config.up_depths) - 1:
                inside += 1
                yield f"output_blocks.{number}.{inside}.conv", f"up_blocks.{block}.upsamplers.0.conv"
            number += 1


# ---- ControlNets ----


def control_table(names: Iterable[str], config: UNetConfig) -> Table:
    """The table of a ControlNet's tensors `names` (ours): a U-Net's way down and middle, and what reads the picture."""
    names = [*names]
    hints = {name.split(".")[2] for name in names if name.startswith(HINT)}
    return _table(names, _control_blocks(config, len(hints)), UNET_RESNET)


def control_names(names: Iterable[str]) -> dict[str, str]:
    """A ControlNet's tensors in a file, without their prefix -> our names, by the names alone: no config is needed.

    Names that LDM does not use are left out.
    """
    names = [*names]
    hints = {name.split(".")[1] for name in names if name.startswith("input_hint_block.")}
    blocks = {ldm: ours for ours, ldm in _control_blocks(_structure(names), len(hints) - 2).items()}
    within = {ldm: ours for ours, ldm in UNET_RESNET.items()}
    found = {name: _renamed(OTHER_NAMES.get(name, name), blocks, within) for name in names}
    return {name: ours for name, ours in found.items() if ours is not None}


HINT = "controlnet_cond_embedding.blocks."


def _control_blocks(config: UNetConfig, hints: int) -> dict[str, str]:
    """Our prefixes -> LDM's. `hints` is the number of convolutions between the first and the last that read the
    picture: there the activations have numbers, too.
    """
    blocks = {ours: ldm for ldm, ours in unet_blocks(config).items()} | UNET_TOP
    skips = 1 + sum(len(depths) for depths in config.down_depths) + len(config.down_depths) - 1
    blocks |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(skips)}
    blocks |= {f"{HINT}{i}": f"input_hint_block.{2 * i + 2}" for i in range(hints)}
    return blocks | {
        "controlnet_mid_block": "middle_block_out.0",
        "controlnet_cond_embedding.conv_in": "input_hint_block.0",
        "controlnet_cond_embedding.conv_out": f"input_hint_block.{2 * hints + 2}",
    }


def _structure(names: Iterable[str]) -> UNetConfig:
    """A config that has the levels and layers that a file's names show on the way down; its widths mean nothing."""
    names = set(names)
    attentions = {name.removesuffix(".proj_in.weight") for name in names if name.endswith(".proj_in.weight")}
    down: list[tuple[int | None, ...]] = [()]
    number = 1
    while True:
        if f"input_blocks.{number}.0.op.weight" in names:  # the next level
            down.append(())
        elif f"input_blocks.{number}.0.in_layers.0.weight" in names:
            down[-1] += (1 if f"input_blocks.{number}.1" in attentions else None,)
        else:
            break
        number += 1
    return UNetConfig(
        channels=(1,) * len(down),
        down_depths=tuple(down),
        mid_depth=1 if "middle_block.1" in attentions else None,
        up_depths=(),
    )


# ---- autoencoders ----


def vae_table(names: Iterable[str], config: VAEConfig) -> Table:
    """The table of an autoencoder's tensors `names`, which are ours. Its decoder's levels count from the widest up."""
    last = len(config.channels) - 1
    blocks = {}
    for level in range(last + 1):
        for side, ours, theirs in (
            ("encoder", f"encoder.down_blocks.{level}", f"encoder.down.{level}"),
            ("decoder", f"decoder.up_blocks.{level}", f"decoder.up.{last - level}"),
        ):
            for layer in range(config.layers + (side == "decoder")):
                blocks[f"{ours}.resnets.{layer}"] = f"{theirs}.block.{layer}"
        blocks[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        blocks[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.up.{last - level}.upsample"
    for side in ("encoder", "decoder"):
        blocks |= {f"{side}.mid_block.resnets.{i}": f"{side}.mid.block_{i + 1}" for i in range(2)}
        blocks[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        blocks[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        blocks[f"{side}.conv_in"], blocks[f"{side}.conv_out"] = f"{side}.conv_in", f"{side}.conv_out"
    blocks |= {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    return _table(names, blocks, VAE_RESNET | VAE_ATTENTION)


# ---- text encoders ----


def open_clip_table(names: Iterable[str]) -> Table:
    """The table of an OpenCLIP text encoder's tensors `names`, which are ours: q, k and v, in this order, share one."""
    names = sorted(names, key=lambda name: (".k_proj." in name) + 2 * (".v_proj." in name))
    return {name: OPEN_CLIP_TOP.get(name) or _open_clip_layer(name) for name in names}


def _open_clip_layer(name: str) -> str:
    _, number, rest = re.split(r"text_model\.encoder\.layers\.(\d+)\.", name)
    fused = re.sub(r"self_attn\.[qkv]_proj\.", "attn.in_proj_", rest)
    if fused == rest:
        module, parameter = rest.rsplit(".", 1)
        fused = f"{OPEN_CLIP_LAYER[module]}.{parameter}"
    return f"transformer.resblocks.{number}.{fused}"


# ---- renaming ----


def _renamed(name: str, blocks: Mapping[str, str], inside: Mapping[str, str]) -> str | None:
    """`name` with its block's prefix replaced, and the module's in the block; what is not in `inside` keeps its name.

    None where it is in no block.
    """
    head, _, parameter = name.rpartition(".")
    rest = ""
    while head not in blocks:
        head, _, last = head.rpartition(".")
        if not head:
            return None
        rest = f"{last}.{rest}" if rest else last
    parts = [blocks[head], inside.get(rest, rest), parameter]
    return ".".join(part for part in parts if part)


def _table(names: Iterable[str], blocks: Mapping[str, str], inside: Mapping[str, str]) -> Table:
    table = {}
    for name in names:
        theirs = _renamed(name, blocks, inside)
        assert theirs is not None, f"{name} is in no block"
        table[name] = theirs
    return table
