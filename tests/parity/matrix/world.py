"""What the cells are made of: small random models, LoRAs, controls, motion and pictures, on disk for both sides."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import topologies
import torch
from diffusers import AutoPipelineForText2Image, ControlNetModel, MotionAdapter, T2IAdapter, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoints import save
from matrix.cells import Cell

WIDTH, HEIGHT, FRAMES = 96, 64, 3
# What LCM-LoRA has a part for: attention, feed-forward, projections; residual blocks, samplers, time projections.
EVERYWHERE = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
RANK, ALPHA = 4, 3.0

Layers = dict[str, tuple[Tensor, Tensor]]  # name -> down (r, in, ...), up (out, r, ...)


class World:
    """Everything under one folder, each thing written when it is first asked for, the same one every time."""

    def __init__(self, root: Path, *, full: bool = False) -> None:
        """`full`: in the real ones' sizes, gigabytes each."""
        self.root, self.full = root, full
        once = ("model", "lora", "control", "t2i", "motion")
        for name in once if full else (*once, "modules"):  # networks of full size do not stay in memory
            setattr(self, name, cache(getattr(self, name)))

    def model(self, family: str, model: str, channels: int) -> Path:
        """A whole model folder. "lora": the base model that an LCM-LoRA is for."""
        path = self.root / f"{family} {model} {channels}"
        if (model, channels) == ("lcm", 4):
            return topologies.write(f"{family}-lcm{'-full' if self.full else ''}", path)
        source = self.model(family, "lcm", 4)
        if model == "lcm":
            topologies.with_scheduler(source, path, "LCM")
        elif family == "sd15":
            topologies.with_scheduler(source, path, "DDIM")
        else:
            topologies.with_scheduler(source, path, "EulerDiscrete", timestep_spacing="leading")
            file = path / "scheduler/scheduler_config.json"  # SDXL's has fields of DDIM's too
            both = json.loads(file.read_text()) | {"clip_sample": False, "set_alpha_to_one": False}
            file.write_text(json.dumps(both))
        config = json.loads((source / "unet/config.json").read_text())
        config |= {"in_channels": channels} | ({} if model == "lcm" else {"time_cond_proj_dim": None})
        shutil.rmtree(path / "unet")  # its files are links to the source's
        with seeded(path.name):
            save(UNet2DConditionModel.from_config(config), path / "unet")
        return path

    def lora(self, family: str, name: str, naming: str) -> Path:
        """A LoRA's file: "lcm" everywhere in the U-Net, "motion" in motion modules, "style" and "other" with text."""
        path = self.root / f"{family} {name} {naming}.safetensors"
        with seeded(f"{family} {name}"):
            if name == "lcm":
                parts = {"unet": layers(self.modules(family)["unet"], EVERYWHERE)}
            elif name == "motion":
                motion = MotionAdapter.from_pretrained(self.motion(family))
                parts = {"unet": layers(motion, ATTENTION)}
            else:
                names = {"unet": ATTENTION, "text_encoder": TEXT, "text_encoder_2": TEXT}
                parts = {part: layers(module, names[part]) for part, module in self.modules(family).items()}
        NAMING[naming](parts, path)
        return path

    def modules(self, family: str) -> dict[str, nn.Module]:
        """The networks of the base model that LoRAs change."""
        with peers():
            pipeline = AutoPipelineForText2Image.from_pretrained(self.model(family, "lora", 4))
        parts = ("unet", "text_encoder", "text_encoder_2")
        return {part: getattr(pipeline, part) for part in parts if getattr(pipeline, part, None) is not None}

    def control(self, family: str, number: int) -> Path:
        """A ControlNet. SSD-1B has none of its own: those of SDXL fit it."""
        family = "sdxl" if family == "ssd1b" else family
        path = self.root / f"{family} control {number}"
        unet: Any = UNet2DConditionModel.from_pretrained(self.model(family, "lora", 4) / "unet")
        widths = (16, 32, 96, 256) if self.full else (8, 16, 16, 32)
        with seeded(path.name):
            network = ControlNetModel.from_unet(
                unet, load_weights_from_unet=False, conditioning_embedding_out_channels=widths
            )
            save(network, path)
        return path

    def t2i(self, family: str, number: int) -> Path:
        """A T2I-Adapter; the second takes grey pictures, as canny ones do, and is a light one with Stable Diffusion."""
        family = "sdxl" if family == "ssd1b" else family
        path = self.root / f"{family} t2i {number}"
        channels = json.loads((self.model(family, "lora", 4) / "unet/config.json").read_text())["block_out_channels"]
        config: dict[str, Any] = {"in_channels": 3 if number == 1 else 1}
        if family == "sdxl":
            config |= {"adapter_type": "full_adapter_xl", "downscale_factor": 16}
        elif number == 2:
            config |= {"adapter_type": "light_adapter", "num_res_blocks": 4}
        with seeded(path.name):
            if family == "sdxl":  # three levels, and its adapters have four features all the same
                channels = [*channels, channels[-1]]
            elif number == 2:  # its last width is of two features
                channels = channels[:-1]
            save(T2IAdapter(channels=channels, **config), path)
        return path

    def motion(self, family: str) -> Path:
        """A motion adapter: for Stable Diffusion with one in the middle, as version 2 has it; for SDXL without."""
        path = self.root / f"{family} motion"
        channels = json.loads((self.model(family, "lora", 4) / "unet/config.json").read_text())["block_out_channels"]
        with seeded(path.name):
            network = MotionAdapter(
                block_out_channels=channels,
                motion_num_attention_heads=4,
                motion_max_seq_length=8,
                use_motion_mid_block=family == "sd15",
            )
            save(network, path)
        return path

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """Several, in colour: one to start from, one a control, or one a frame."""
        return [picture(i) for i in range(6)]

    @cached_property
    def mask(self) -> Image.Image:
        """With edges off the latents' grid, and greys on both sides of one half."""
        grey = np.zeros((HEIGHT, WIDTH), np.uint8)
        grey[10:50, 20:70] = 255
        grey[40:64, 60:90] = 150
        grey[:20, :30] = 100
        return Image.fromarray(grey)

    def hints(self, cell: Cell) -> list[Any]:
        """What a cell's controls look at: a picture each, or a list of frames."""
        if cell.adapter == "t2is":
            return [self.pictures[1], self.pictures[2].convert("L")]
        if cell.moves:
            return [self.pictures[3 : 3 + FRAMES]]
        return self.pictures[1:3]


def picture(number: int) -> Image.Image:
    """Soft blobs of colour under a little noise."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
    soft = np.asarray(small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray((soft + rng.integers(-20, 21, soft.shape)).clip(0, 255).astype(np.uint8))


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """Random numbers that depend on the name of what is made, not on what was made before."""
    with torch.random.fork_rng(), peers():
        torch.manual_seed(zlib.crc32(name.encode()))
        yield


@contextmanager
def peers() -> Iterator[None]:
    """Without the peers' own warnings."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- LoRA files ----


def layers(network: nn.Module, names: Iterable[str]) -> Layers:
    """A random low-rank change of about a third of each weight whose name ends so."""
    made: Layers = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(tuple(f".{each}" for each in names)):
            out, *ins = module.weight.shape
            down = torch.randn(RANK, *ins) * torch.Size(ins).numel() ** -0.5
            up = torch.randn(out, RANK, *(1,) * (len(ins) - 1)) * 0.3 * RANK**-0.5 * RANK / ALPHA
            made[name] = down, up
    assert made
    return made


def text_name(part: str, name: str) -> str:
    """Files spell out what transformers no longer has in its names."""
    return name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"


def write_kohya(parts: dict[str, Layers], path: Path) -> None:
    """As kohya's trainer and LCM-LoRA have it: underscores, and an alpha for each layer."""
    two = "text_encoder_2" in parts
    prefixes = {"unet": "unet", "text_encoder": "te1" if two else "te", "text_encoder_2": "te2"}
    tensors = {}
    for part, found in parts.items():
        for name, (down, up) in found.items():
            key = f"lora_{prefixes[part]}_{text_name(part, name).replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)


def write_peft(parts: dict[str, Layers], path: Path) -> None:
    """As diffusers saves what PEFT trained: lora_A and lora_B, the alpha in the file's metadata."""
    tensors, config = {}, {}
    for part, found in parts.items():
        config |= {f"{part}.r": RANK, f"{part}.lora_alpha": ALPHA, f"{part}.target_modules": sorted(found)}
        for name, (down, up) in found.items():
            key = f"{part}.{text_name(part, name)}"
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})


def write_diffusers(parts: dict[str, Layers], path: Path) -> None:
    """As diffusers and AnimateDiff's converter wrote it before PEFT: no alpha, which is then the rank."""
    tensors = {}
    for part, found in parts.items():
        for name, (down, up) in found.items():
            key = f"{part}.{text_name(part, name)}"
            if part != "unet":
                key = f"{key}.lora_linear_layer"
            elif name.endswith(ATTENTION):
                block, leaf = key.rsplit(".to_", 1)
                key = f"{block}.processor.to_{leaf.removesuffix('.0')}_lora"
            else:
                key = f"{key}.lora"
            tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up * ALPHA / RANK}
    save_file(tensors, path)


NAMING: dict[str, Callable[[dict[str, Layers], Path], None]] = {
    "kohya": write_kohya,
    "peft": write_peft,
    "diffusers": write_diffusers,
}
