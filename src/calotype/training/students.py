"""What distillation trains: a whole U-Net with a guidance embedding, or a LoRA on the teacher's own."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from calotype.errors import CheckpointError
from calotype.lora import LoRA, LowRank
from calotype.lora.live import term
from calotype.nn.attention import Transformer2D
from calotype.nn.blocks import ResnetBlock
from calotype.nn.unet import Conditioning, UNet, UNetConfig
from calotype.parts import Parts
from calotype.training.loss import Denoiser

# What LCM-LoRA (Luo et al. 2023, arXiv 2311.05556) changes: attention and feed-forward, the projections around them,
# the convolutions of residual blocks and samplers, and their projections of the timestep. Text is left alone.
LCM_LORA = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)

GUIDANCE_DIM = 256  # of the released models

Forward = Callable[..., Tensor]  # of a module
Files = dict[str, dict[str, Tensor]]  # what a checkpoint holds, by kind and name


class Student(ABC):
    """The three networks of the loss, and the numbers that are trained."""

    module: nn.Module  # gradients flow through this one, called as a Denoiser; what wants them is trained
    network: Denoiser  # the same, or what wraps it to train in many processes
    target: Denoiser  # what it must agree with
    teacher: Denoiser
    result: Denoiser  # what it has become, to draw with; without gradients
    config: UNetConfig  # of the result

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimizer changes."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @abstractmethod
    def follow(self, decay: float) -> None:
        """Lets the target follow by one update."""

    @abstractmethod
    def files(self) -> Files:
        """All that an interrupted run needs of it: the tensors themselves, so writing to them restores it."""

    @abstractmethod
    def outcome(self) -> UNet | LoRA:
        """The result, to be written. Where networks are cut up, all processes must call it."""

    @abstractmethod
    def checkpoint_activations(self) -> None:
        """From now on activations are not kept for the gradients, but computed anew (Chen et al. 2016, 1604.06174)."""

    @abstractmethod
    def compile(self) -> None:
        """torch.compile for all three networks."""


class FullStudent(Student):
    """A whole network of its own, and a moving average of it as the target and the result (the paper's theta-)."""

    module: UNet
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
        self.module = self.network = student
        self.teacher = teacher.requires_grad_(False)
        self.result = self.target = copy.deepcopy(student).requires_grad_(False)
        self.config = student.config

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        ours, theirs = (_local(list(network.parameters())) for network in (self.target, self.module))
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    def files(self) -> Files:
        return {
            "student": {name: parameter.detach() for name, parameter in self.module.named_parameters()},
            "ema": {name: parameter.detach() for name, parameter in self.target.named_parameters()},
        }

    def checkpoint_activations(self) -> None:
        _recompute(self.module, lambda forward: forward)

    def compile(self) -> None:
        for network in (self.module, self.target, self.teacher):
            network.compile()

    def shard(self) -> None:
        """Cuts the networks into pieces over the processes (FSDP2), before an optimizer gets to know the parameters."""
        for network in (self.module, self.target, self.teacher):
            for layer in network.modules():
                if isinstance(layer, ResnetBlock | Transformer2D):
                    fully_shard(layer)
            fully_shard(network, reshard_after_forward=True)  # also where no backward pass would do it

    @torch.no_grad()
    def outcome(self) -> UNet:
        state = {name: whole(parameter) for name, parameter in self.target.state_dict().items()}
        with torch.device("meta"):
            unet = UNet(self.config)
        unet.load_state_dict(state, assign=True)
        return unet.eval().requires_grad_(False)


class LoraStudent(Student):
    """A LoRA on the teacher: one network in memory, which is the teacher with the adapter off.

    There is no guidance embedding. The target is the student itself, without gradients, as the released adapters were
    trained; or, `averaged`, target and result are a moving average of the factors, as a full student's are of its
    weights. Without one, rates that teach a LoRA in some hundred updates leave its pictures blotched
    (docs/notes/shipped-model.md). The change starts as nothing: `down` is drawn as a layer's weight is, `up` is zero.
    """

    module: Adapted

    def __init__(self, parts: Parts, rank: int, seed: int = 0, averaged: bool = False) -> None:
        self._unet = parts.unet.requires_grad_(False)
        self.module = self.network = Adapted(parts.unet, rank, seed)
        self._averaged = averaged
        if averaged:
            for layer in self.module.layers.values():
                layer.average = (layer.down.detach().clone(), layer.up.detach().clone())
        self.result = self.target = partial(self.module.run, Mode.MERGED)
        self.teacher = partial(self.module.run, Mode.OFF)
        self.config = parts.unet.config

    def outcome(self) -> LoRA:
        deltas = {f"{name}.weight": LowRank(*layer.merged) for name, layer in self.module.layers.items()}
        return LoRA("student", None, {"unet": deltas})

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        if self._averaged:  # else the target is the student
            torch._foreach_lerp_(self._averages(), self.parameters, 1 - decay)

    def files(self) -> Files:
        files = {"student": {name: parameter.detach() for name, parameter in self.module.named_parameters()}}
        if self._averaged:
            files["ema"] = dict(zip(files["student"], self._averages(), strict=True))
        return files

    def _averages(self) -> list[Tensor]:
        """In the order of the parameters."""
        return [each for layer in self.module.layers.values() for each in layer.merged]

    def checkpoint_activations(self) -> None:
        _recompute(self._unet, self.module.bound)

    def compile(self) -> None:
        self._unet.compile()


# ---- a network with a LoRA that can be trained, and switched off ----


class Mode:
    """Which network an adapted one is in a call."""

    OFF = "off"  # what it was
    ON = "on"  # with the adapter: gradients reach the factors
    MERGED = "merged"  # the same without gradients; of a student with an average, that


class Adapted(nn.Module):
    """A frozen U-Net whose layers have an adapter: gradients reach the factors `down` and `up` alone.

    The mode is that of one call (`run`): outside of it the U-Net is what it was, for everybody else.
    """

    def __init__(self, unet: UNet, rank: int, seed: int) -> None:
        super().__init__()
        self._mode: str = Mode.OFF
        self._unet = (unet,)  # in a tuple: no submodule of this one, whose parameters are the factors
        self.layers: dict[str, AdaptedLayer] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, layer in unet.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(tuple(f".{each}" for each in LCM_LORA)):
                self.layers[name] = AdaptedLayer(layer, rank, generator, lambda: self._mode)
        for name, adapted in self.layers.items():
            self.register_module(name.replace(".", "/"), adapted)  # modules' names have no dots

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.run(Mode.ON, x, t, conditioning)

    def run(self, mode: str, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The output in a mode."""
        if mode == Mode.OFF:  # the teacher is guided by real evaluations
            conditioning = replace(conditioning, w=None)
        return self._within(mode, self._unet[0], x, t, conditioning)

    def bound(self, forward: Forward) -> Forward:
        """`forward` in the mode of now, whenever it is called: a backward pass may compute activations anew."""
        return partial(self._within, self._mode, forward)

    def _within(self, mode: str, forward: Forward, *inputs: object) -> Tensor:
        before, self._mode = self._mode, mode
        try:
            return forward(*inputs)
        finally:
            self._mode = before


class AdaptedLayer(nn.Module):
    """The factors of one layer's change; it takes the place of the layer's forward.

    A hook, as live adapters are (calotype.lora.live), comes when the layer's own product is done: too late to merge,
    which spares 4 % of an update of the shipped model at rank 64, and 11 % at 128.
    """

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, rank: int, generator: torch.Generator, mode: Callable[[], str]
    ) -> None:
        super().__init__()
        weight = layer.weight
        out, *ins = weight.shape
        bound = torch.Size(ins).numel() ** -0.5
        down = (torch.rand(rank, *ins, generator=generator) * 2 - 1) * bound
        kind = torch.promote_types(weight.dtype, torch.float32)  # trained in float32 on a bfloat16 base
        self.down = nn.Parameter(down.to(weight.device, kind))
        self.up = nn.Parameter(torch.zeros(out, rank, *[1] * (len(ins) - 1), device=weight.device, dtype=kind))
        self.average: tuple[Tensor, Tensor] | None = None
        self._layer, self._mode, self._plain = (layer,), mode, layer.forward
        layer.forward = self.forward  # type: ignore[method-assign,assignment]

    @property
    def merged(self) -> tuple[Tensor, Tensor]:
        """The factors down and up that others see: their average where there is one."""
        return (self.down, self.up) if self.average is None else self.average

    def forward(self, x: Tensor) -> Tensor:
        (layer,), mode = self._layer, self._mode()
        if mode == Mode.OFF:
            return self._plain(x)
        down, up = self.merged if mode == Mode.MERGED else (self.down, self.up)
        if self._is_shorter_merged(x, gradients=mode == Mode.ON and torch.is_grad_enabled()):
            weight = layer.weight + (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
            if isinstance(layer, nn.Linear):
                return F.linear(x, weight, layer.bias)
            return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
        return self._plain(x) + term(layer, "weight", LowRank(down, up), lambda: layer.weight)(x)

    def _is_shorter_merged(self, x: Tensor, gradients: bool) -> bool:
        """Whether up @ down, added to the weight, takes fewer multiplications than passing x through the factors.

        With gradients that costs the whole weight's gradient as well, of which the factors' follow, but spares three
        passes through them: it pays where the rank is large beside the layer's width. Never in bfloat16, where a small
        change would be rounded away in the sum.
        """
        layer = self._layer[0]
        if layer.weight.dtype == torch.bfloat16 or torch.is_autocast_enabled(x.device.type):
            return False
        places = x.numel() // x.shape[-1] if isinstance(layer, nn.Linear) else x.numel() // x.shape[1]
        if isinstance(layer, nn.Conv2d):
            places //= layer.stride[0] * layer.stride[1]
        rank, ins, out = len(self.down), self.down[0].numel(), len(self.up)
        if gradients:
            return ins * out * (places + 3 * rank) < 3 * rank * places * (ins + out)
        return ins * out < places * (ins + out)


# ---- a network of its own ----


def student_of(teacher: UNet) -> UNet:
    """A trainable copy of the teacher with a guidance embedding, which is zero at first: it starts as the teacher."""
    own = teacher.config.guidance_dim  # one that is a consistency model already has it
    student = UNet(replace(teacher.config, guidance_dim=GUIDANCE_DIM if own is None else own))
    kind = torch.promote_types(next(teacher.parameters()).dtype, torch.float32)
    state = {name: tensor.detach().clone().to(kind) for name, tensor in teacher.state_dict().items()}
    projection = student.time_embedding.cond_proj
    assert projection is not None
    state.setdefault("time_embedding.cond_proj.weight", torch.zeros_like(projection.weight, dtype=kind))
    student.load_state_dict(state, assign=True)
    return student.requires_grad_(True).to(next(teacher.parameters()).device)


def _recompute(network: nn.Module, bound: Callable[[Forward], Forward]) -> None:
    """Wraps the forward of each residual block and transformer: only their inputs are kept for the gradients.

    `bound` makes of a forward what computes the same when it is called again later.
    """
    for layer in network.modules():
        if isinstance(layer, ResnetBlock | Transformer2D):
            layer.forward = partial(_recomputed, layer.forward, bound)  # type: ignore[method-assign]


def _recomputed(forward: Forward, bound: Callable[[Forward], Forward], *inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    output: Tensor = checkpoint(bound(forward), *inputs, use_reentrant=False, preserve_rng_state=False)
    return output


def _local(tensors: list[Tensor]) -> list[Tensor]:
    """Of tensors that are cut up over the processes, this process' pieces."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be cut up, in one piece. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
