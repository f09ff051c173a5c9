"""What distillation trains: a whole U-Net with a guidance embedding, or a LoRA on the teacher's own."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from calotype.errors import CheckpointError
from calotype.lora import LoRA, LowRank, Stack
from calotype.nn.unet import Conditioning, UNet
from calotype.parts import Parts
from calotype.training.loss import Network

# What LCM-LoRA (Luo et al. 2023, arXiv 2311.05556) changes: attention and feed-forward, the projections around them,
# the convolutions of residual blocks and samplers, and their projections of the timestep. Text is left alone.
LCM_LORA = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)

Files = dict[str, dict[str, Tensor]]  # a checkpoint's files, by name: what they hold


class Student(ABC):
    """The three networks of the loss, and the numbers that are trained."""

    network: Network  # gradients flow through this one
    target: Network  # what it must agree with
    teacher: Network

    @property
    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """What the optimizer changes."""

    @abstractmethod
    def follow(self, decay: float) -> None:
        """Lets the target follow by one update."""

    @abstractmethod
    def files(self) -> Files:
        """All that an interrupted run needs of it."""

    @abstractmethod
    def restore(self, files: Files) -> None:
        """Becomes what `files` were taken from."""


class FullStudent(Student):
    """A whole network of its own, and a moving average of it as the target and the result (the paper's theta-)."""

    network: UNet
    target: UNet
    teacher: UNet

    def __init__(self, teacher: UNet, first: UNet | None = None) -> None:
        """`first` is what it starts as, an LCM of this teacher; None: the teacher itself."""
        student = student_of(teacher)
        if first is not None:
            if first.config != student.config:
                raise CheckpointError(
                    "the student is no latent consistency model of this teacher: their U-Nets differ",
                    hint="give a folder that calotype distill made from the same teacher, or none",
                )
            student.load_state_dict(first.state_dict())
        self.network, self.teacher = student, teacher.requires_grad_(False)
        self.target = copy.deepcopy(student).requires_grad_(False)

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.network.parameters())

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        torch._foreach_lerp_(list(self.target.parameters()), self.parameters, 1 - decay)

    def files(self) -> Files:
        return {"student": self.network.state_dict(), "ema": self.target.state_dict()}

    def restore(self, files: Files) -> None:
        self.network.load_state_dict(files["student"])
        self.target.load_state_dict(files["ema"])


class LoraStudent(Student):
    """A LoRA on the teacher: one network in memory, which is the teacher with the adapter off.

    There is no guidance embedding, and the target is the student itself, without gradients, as the released adapters
    were trained. The change starts as nothing: `down` is drawn as a layer's weight is, `up` is zero.
    """

    def __init__(self, parts: Parts, rank: int, seed: int = 0) -> None:
        self.unet = parts.unet.requires_grad_(False)
        self.lora = LoRA("student", None, {"unet": _low_rank(parts.unet, rank, seed)})
        self._stack = Stack(parts)
        self._stack.add("student", self.lora, 0.0)  # known, and not merged
        self.target = self.network

    def network(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The teacher with the adapter on."""
        with self._stack.live({"student": 1.0}):
            return self.unet(x, t, replace(conditioning, w=None))  # type: ignore[no-any-return]

    def teacher(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.unet(x, t, conditioning)  # type: ignore[no-any-return]

    @property
    def parameters(self) -> list[Tensor]:
        return list(self._named().values())

    def follow(self, decay: float) -> None:
        """The target is the student."""

    def files(self) -> Files:
        return {"student": {name: tensor.detach() for name, tensor in self._named().items()}}

    @torch.no_grad()
    def restore(self, files: Files) -> None:
        for name, tensor in self._named().items():
            tensor.copy_(files["student"][name])

    def _named(self) -> dict[str, Tensor]:
        return {
            f"{parameter}.{i}": tensor
            for parameter, delta in self.lora.deltas["unet"].items()
            for i, tensor in enumerate(delta.tensors())
        }


def student_of(teacher: UNet) -> UNet:
    """A trainable copy of the teacher with a guidance embedding, which is zero at first: it starts as the teacher."""
    student = UNet(replace(teacher.config, guidance_dim=256))
    state = {name: tensor.detach().clone().float() for name, tensor in teacher.state_dict().items()}
    state["time_embedding.cond_proj.weight"] = torch.zeros_like(student.time_embedding.cond_proj.weight)  # type: ignore[union-attr]
    student.load_state_dict(state, assign=True)
    return student.requires_grad_(True).to(next(teacher.parameters()).device)


def _low_rank(unet: UNet, rank: int, seed: int) -> Mapping[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(tuple(f".{each}" for each in LCM_LORA)):
            out, *ins = module.weight.shape
            bound = torch.Size(ins).numel() ** -0.5
            down = (torch.rand(rank, *ins, generator=generator) * 2 - 1) * bound
            up = torch.zeros(out, rank, *[1] * (len(ins) - 1))
            down, up = (factor.to(module.weight.device).requires_grad_() for factor in (down, up))
            deltas[f"{name}.weight"] = LowRank(down, up)
    return deltas
