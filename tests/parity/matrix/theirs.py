"""The diffusers side: a cell through the pipeline that diffusers has for it, out of parts that are loaded once."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import (
    ControlNetModel,
    MotionAdapter,
    MultiAdapter,
    StableDiffusionPipeline,
    T2IAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from torch import Tensor, nn

from matrix.cells import GUIDANCES, Cell
from matrix.world import FRAMES, HEIGHT, WIDTH, World, peers

SEED, PROMPT, STEPS = 7, "a red fox in the snow", 3
CUT_STEPS = 4  # of which a strength of 0.75 leaves three
SCALES, STARTS, ENDS = (0.8, 0.5), (0.0, 0.3), (1.0, 0.7)  # of the controls; the second acts in the middle step alone
GAMMA = 0.3  # of "tcd"
KINDS = {"lcm": "LCM", "tcd": "TCD", "ddim": "DDIM", "euler": "EulerDiscrete"}
Deltas = dict[str, tuple[Tensor, Tensor, float]]  # parameter -> down, up, and what their product is multiplied by


class Theirs:
    """diffusers, asked one cell at a time."""

    def __init__(self, world: World) -> None:
        self.world = world
        for name in ("parts", "unet", "control", "t2i", "deltas", "pristine"):
            setattr(self, name, cache(getattr(self, name)))

    @torch.inference_mode()
    def __call__(self, cell: Cell) -> Tensor:
        """Final latents (1, 4, h, w); of a clip (F, 4, h, w)."""
        with peers():
            pipeline = self.pipeline(cell)
            result = pipeline(**self.arguments(cell))
        if cell.moves:
            return result.frames.transpose(1, 2).flatten(0, 1)  # (1, C, F, h, w)
        return result.images

    def pipeline(self, cell: Cell) -> Any:
        """Built anew from parts, which takes no time."""
        assert cell.pipeline is not None
        parts = dict(self.parts(cell.family))
        unet = self.unet(cell.family, cell.model, cell.channels, cell.moves, cell.folded)
        texts = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
        self.set_loras(cell, {"unet": unet, **texts})
        parts |= {"unet": unet, "scheduler": self.scheduler(cell)}
        if "control" in cell.adapter:
            controls = [self.control(cell.family, number) for number in cell.controls]
            parts["controlnet"] = controls if len(controls) > 1 else controls[0]
        if cell.adapter.startswith("t2i"):
            adapters = [self.t2i(cell.family, number) for number in cell.controls]
            parts["adapter"] = MultiAdapter(adapters) if len(adapters) > 1 else adapters[0]
        if cell.moves:
            parts["motion_adapter"] = None  # the U-Net has it in already
        elif cell.family == "sd15":
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = getattr(diffusers, cell.pipeline)(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def arguments(self, cell: Cell) -> dict[str, Any]:
        guidance, negative = GUIDANCES[cell.guidance]
        guidance = 1.0 if cell.folded else guidance
        arguments: dict[str, Any] = {
            "prompt": PROMPT,
            "num_inference_steps": CUT_STEPS if cell.cuts else STEPS,
            "guidance_scale": guidance,
            "generator": torch.Generator("cpu").manual_seed(SEED),
            "output_type": "latent",
        }
        if negative:
            arguments["negative_prompt"] = negative
        if cell.sampler == "tcd":
            arguments["eta"] = GAMMA
        if not (cell.task == "image" and cell.adapter in ("none", "style", "styles")):  # these take the picture's size
            arguments |= {"width": WIDTH, "height": HEIGHT}
        if cell.strength is not None:
            arguments["strength"] = cell.strength
            source = self.world.pictures[:FRAMES] if cell.moves else self.world.pictures[0]
            arguments["video" if cell.moves else "image"] = source
        if cell.task.startswith("inpaint"):
            arguments["mask_image"] = self.world.mask
        if cell.moves and cell.task == "text":
            arguments["num_frames"] = FRAMES
        return arguments | self.control_arguments(cell)

    def control_arguments(self, cell: Cell) -> dict[str, Any]:
        hints = self.world.hints(cell)
        if cell.adapter.startswith("t2i"):
            several = cell.adapter == "t2is"
            scale = list(SCALES) if several else SCALES[0]
            return {"image": hints if several else hints[0], "adapter_conditioning_scale": scale}
        if "control" not in cell.adapter:
            return {}
        name = "conditioning_frames" if cell.moves else "image" if cell.task == "text" else "control_image"
        if cell.adapter != "controls":
            return {name: hints[0], "controlnet_conditioning_scale": SCALES[0]}
        return {
            name: hints,
            "controlnet_conditioning_scale": list(SCALES),
            "control_guidance_start": list(STARTS),
            "control_guidance_end": list(ENDS),
        }

    def scheduler(self, cell: Cell) -> Any:
        """The sampler's, with the betas of the model; AnimateDiff's were trained with linear ones."""
        config = dict(self.parts(cell.family)["scheduler"].config)
        config |= {"beta_schedule": "linear"} if cell.moves else {}
        return getattr(diffusers, f"{KINDS[cell.sampler]}Scheduler").from_config(config)

    def grid(self, cell: Cell) -> tuple[int, ...]:
        """The timesteps that the pipeline runs through."""
        scheduler = self.scheduler(cell)
        scheduler.set_timesteps(CUT_STEPS if cell.cuts else STEPS)
        skipped = 0
        if cell.cuts:
            assert cell.strength is not None
            skipped = CUT_STEPS - int(CUT_STEPS * cell.strength)
        return tuple(int(t) for t in scheduler.timesteps[skipped:])

    # ---- parts ----

    def parts(self, family: str) -> dict[str, Any]:
        """Text, autoencoder and scheduler of the base model; the pipelines of one family share them."""
        found = diffusers.DiffusionPipeline.from_pretrained(self.world.model(family, "lora", 4)).components
        names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
        return {name: found[name] for name in names if name in found}

    def unet(self, family: str, model: str, channels: int, moves: bool, folded: bool) -> nn.Module:
        unet: Any = UNet2DConditionModel.from_pretrained(self.world.model(family, model, channels) / "unet")
        if folded:
            fold(unet, GUIDANCES["embedded"][0])
        if moves:
            pictures = unet
            unet = UNetMotionModel.from_unet2d(pictures, MotionAdapter.from_pretrained(self.world.motion(family)))
            if pictures.config.addition_embed_type:  # diffusers forgets this one and leaves it at random
                unet.add_embedding.load_state_dict(pictures.add_embedding.state_dict())
        return unet.eval()  # type: ignore[no-any-return]

    def control(self, family: str, number: int) -> Any:
        return ControlNetModel.from_pretrained(self.world.control(family, number))

    def t2i(self, family: str, number: int) -> Any:
        return T2IAdapter.from_pretrained(self.world.t2i(family, number))

    # ---- LoRAs: the file is read by diffusers; what it means is W + scale (alpha / r) up down ----

    def set_loras(self, cell: Cell, networks: dict[str, nn.Module]) -> None:
        """Writes the weights that the cell's stack makes of the pristine ones."""
        for part, network in networks.items():
            pristine = self.pristine(network)
            named = dict(network.named_parameters())
            for parameter, value in named.items():
                value.copy_(pristine[parameter])
            for name, scale in cell.stack.items():
                deltas = self.deltas(cell.family, name, naming_of(name, cell)).get(part, {})
                for parameter, (down, up, ratio) in deltas.items():
                    if part != "unet" and not hasattr(network, "text_model"):
                        parameter = parameter.removeprefix("text_model.")
                    value = named[parameter]
                    value += scale * ratio * (up.flatten(1) @ down.flatten(1)).view(value.shape)

    def pristine(self, network: nn.Module) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in network.named_parameters()}

    def deltas(self, family: str, name: str, naming: str) -> dict[str, Deltas]:
        """What a LoRA adds to each part's weights, from its file as diffusers reads it."""
        path = self.world.lora(family, name, naming)
        state, alphas, config = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
            str(path.parent), weight_name=path.name, return_lora_metadata=True
        )
        made: dict[str, Deltas] = {}
        for part in ("unet", "text_encoder", "text_encoder_2"):
            own = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
            if not own:
                continue
            if part == "unet":
                own = convert_unet_state_dict_to_peft(own)
            else:
                own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
            made[part] = {}
            for key in [key for key in own if key.endswith(".lora_A.weight")]:
                down, up = own[key], own[key.replace(".lora_A.", ".lora_B.")]
                alpha = (config or {}).get(f"{part}.lora_alpha", len(down))
                if alphas:
                    (alpha,) = set(alphas.values())
                made[part][key.replace(".lora_A.", ".")] = down, up, alpha / len(down)
        return made


def fold(unet: Any, guidance: float) -> None:
    """Makes a U-Net with a guidance embedding into one without, for a single guidance.

    linear_1(t + cond_proj(w)) = linear_1(t) + linear_1.weight cond_proj(w): with w fixed, the last term is a bias.
    """
    embedding, width = unet.time_embedding, unet.config.time_cond_proj_dim
    w = StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.tensor([guidance - 1]), embedding_dim=width)
    embedding.linear_1.bias += embedding.linear_1.weight @ embedding.cond_proj(w)[0]
    embedding.cond_proj = None
    unet.register_to_config(time_cond_proj_dim=None)


def naming_of(lora: str, cell: Cell) -> str:
    """In which of the three ways a LoRA of the cell is written."""
    return {"lcm": cell.naming, "style": "kohya", "other": "diffusers", "motion": "diffusers"}[lora]
