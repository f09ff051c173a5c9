"""The families of models that calotype knows by name, as data. What matches none is "custom", and runs all the same."""

from __future__ import annotations

from dataclasses import dataclass

from calotype.nn.unet import UNetConfig


@dataclass(frozen=True)
class Family:
    """How to recognise a family by its U-Net, and what its makers suggest."""

    name: str
    title: str  # for sentences
    width: int  # channels of the U-Net's first level
    context_dim: int  # width of the text embeddings
    pooled: bool  # whether the U-Net takes pooled text, sizes and crops as well
    mid_attention: bool
    steps: int = 25  # without consistency distillation
    guidance: float = 7.5


SD15 = Family("sd15", "Stable Diffusion 1.x", 320, 768, False, True)
SD21 = Family("sd21", "Stable Diffusion 2.x", 320, 1024, False, True)
SDXL = Family("sdxl", "SDXL", 320, 2048, True, True, guidance=5.0)
SSD1B = Family("ssd1b", "SSD-1B", 320, 2048, True, False, guidance=5.0)
CUSTOM = Family("custom", "a model of its own kind", 0, 0, False, False)

FAMILIES = (SD15, SD21, SDXL, SSD1B)

LCM_STEPS = 4
LCM_GUIDANCE = 8.5  # for a U-Net that embeds it: diffusers' LCM pipelines
PLAIN_LCM_GUIDANCE = 1.0  # a consistency model without the embedding had its guidance distilled in
# The LCM paper (arXiv 2310.04378, section 5) draws w from [2, 14]; guidance is w + 1.
LCM_GUIDANCE_RANGE = (3.0, 15.0)


def recognise(width: int, context_dim: int, pooled: bool, mid_attention: bool) -> Family:
    """The family whose U-Net has these properties, or CUSTOM."""
    signature = (width, context_dim, pooled, mid_attention)
    for family in FAMILIES:
        if (family.width, family.context_dim, family.pooled, family.mid_attention) == signature:
            return family
    return CUSTOM


def family_of(config: UNetConfig) -> Family:
    """The family of a U-Net's config."""
    mid_attention = config.has_mid and config.mid_depth is not None
    return recognise(config.channels[0], config.context_dim, config.addition_in_dim is not None, mid_attention)
