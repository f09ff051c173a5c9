"""An optimizer for short trainings: Adam for vectors, and for matrices momentum whose singular values are made equal.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the scale that makes its steps as
long as Adam's is of Liu et al. 2025 (arXiv 2502.16982, Equation 4). Convolutions count as matrices of output channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from calotype.precision import multiplies_bfloat16

QUINTIC = (3.4445, -4.7750, 2.0315)  # drives singular values towards 1, most of the way in five rounds
LEAST = 3  # rows and columns: what a picture's colours are made of; smaller matrices are Adam's


class Muon(torch.optim.Optimizer):
    """Groups of parameters with `"matrix": False` are Adam's whatever their shape: embeddings, of which a step sees few
    rows, and what stands at a network's very ends.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "betas": betas, "matrix": True})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                if group["matrix"] and parameter.ndim > 1 and min(len(parameter), parameter[0].numel()) >= LEAST:
                    update = self._matrix(parameter.grad, state["mean"], group["momentum"])
                else:
                    update = self._vector(parameter.grad, state, group["betas"])
                parameter.sub_(update, alpha=group["lr"])

    @staticmethod
    def _matrix(grad: Tensor, mean: Tensor, momentum: float) -> Tensor:
        mean.lerp_(grad, 1 - momentum)
        matrix = grad.lerp(mean, momentum).flatten(1)  # Nesterov's look ahead
        return (0.2 * max(matrix.shape) ** 0.5 * orthogonal(matrix)).view_as(grad)

    @staticmethod
    def _vector(grad: Tensor, state: dict[str, Tensor], betas: tuple[float, float]) -> Tensor:
        if "square" not in state:
            state["square"], state["count"] = torch.zeros_like(grad), torch.zeros(())
        state["count"] += 1
        count = float(state["count"])
        state["mean"].lerp_(grad, 1 - betas[0])
        state["square"].lerp_(grad.square(), 1 - betas[1])
        return (state["mean"] / (1 - betas[0] ** count)) / ((state["square"] / (1 - betas[1] ** count)).sqrt() + 1e-8)


def groups(model: nn.Module, others: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """A model's parameters as Muon takes them: `others` are Adam's."""
    known = {id(each) for each in others}
    parts = [[each for each in model.parameters() if (id(each) in known) == wanted] for wanted in (False, True)]
    return [{"params": parts[0]}, {"params": parts[1], "matrix": False}]


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The matrix with its singular values near 1, by an iteration that needs products alone.

    So bfloat16 will do, where the device multiplies it; where PyTorch emulates it, a step would take a minute.
    """
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    if multiplies_bfloat16(x.device):
        x = x.bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)
