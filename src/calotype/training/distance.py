"""Distances between two sets of features: unbiased, and with an error bar.

docs/notes/eval.md shows what they see. Shapes: features (n, d) of n pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calotype.errors import UsageError


@dataclass(frozen=True, eq=False)
class Estimate:
    """A statistic, and what it would be without each of the pictures that it was computed from."""

    value: float
    without: tuple[Tensor, ...]  # for each independent sample, (n,) values with one picture left out

    @property
    def error(self) -> float:
        """One standard error, by the jackknife (Efron & Stein 1981): too large if anything."""
        variances = [(len(w) - 1) / len(w) * (w - w.mean()).square().sum() for w in self.without]
        return float(torch.stack(variances).sum().sqrt())

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference of two estimates over the same prompts, whose common chance cancels in the error too."""
        differences = [a - b for a, b in zip(self.without, other.without, strict=True)]
        return Estimate(self.value - other.value, tuple(differences))


def kid(fx: Tensor, fy: Tensor, *, paired: bool = False) -> Estimate:
    """The kernel distance of features (m, d) and (n, d): its average is 0, and not above, if both are from one source.

    The unbiased squared maximum mean discrepancy (Gretton et al. 2012, JMLR 13, Equation 3) under the kernel
    (x . y / d + 1)^3 of Binkowski et al. 2018, arXiv 1801.01401, section 4.

    paired: fx[i] and fy[i] are of the same prompt, so they resemble each other more than chance would have it. Those n
    pairs are left out then (Equation 4), or the distance would come out too small.
    """
    m, n = len(fx), len(fy)
    if min(m, n) < 3 or (paired and m != n):
        rule = "equally many, at least 3 of each" if paired else "at least 3 of each"
        raise UsageError(f"{m} and {n} pictures to compare: allowed are {rule}")
    xx, _ = _kernel_sums(fx, fx)
    yy, _ = _kernel_sums(fy, fy)
    xy, yx = _kernel_sums(fx, fy)
    xx, yy = xx - _kernel_of_pairs(fx, fx), yy - _kernel_of_pairs(fy, fy)
    if paired:
        pairs = _kernel_of_pairs(fx, fy)
        h = xx + yy - (xy - pairs) - (yx - pairs)
        return Estimate(float(h.sum() / (n * (n - 1))), ((h.sum() - 2 * h) / ((n - 1) * (n - 2)),))
    within_x, within_y, between = xx.sum() / (m * (m - 1)), yy.sum() / (n * (n - 1)), xy.sum() / (m * n)
    without_x = (xx.sum() - 2 * xx) / ((m - 1) * (m - 2)) + within_y - 2 * (xy.sum() - xy) / ((m - 1) * n)
    without_y = within_x + (yy.sum() - 2 * yy) / ((n - 1) * (n - 2)) - 2 * (xy.sum() - yx) / (m * (n - 1))
    return Estimate(float(within_x + within_y - 2 * between), (without_x, without_y))


def _kernel_sums(fx: Tensor, fy: Tensor, block: int = 1024) -> tuple[Tensor, Tensor]:
    """For each x the sum (m,) of its kernel with all y, for each y the sum (n,) over all x: float64, block by block."""
    fx, fy = fx.double(), fy.double()
    rows, columns = [], torch.zeros(len(fy), dtype=torch.float64)
    for chunk in torch.split(fx, block):
        kernel = (chunk @ fy.T / fx.shape[1] + 1) ** 3
        rows.append(kernel.sum(1))
        columns += kernel.sum(0)
    return torch.cat(rows), columns


def _kernel_of_pairs(fx: Tensor, fy: Tensor) -> Tensor:
    """The kernel (n,) of fx[i] with fy[i]."""
    return ((fx.double() * fy.double()).sum(1) / fx.shape[1] + 1) ** 3


def paired_distance(fx: Tensor, fy: Tensor) -> Estimate:
    """The mean over i of |fx[i] - fy[i]| / sqrt(d): how much each single picture differs from its counterpart."""
    return mean((fx.double() - fy.double()).square().mean(1).sqrt())


def mean(values: Tensor) -> Estimate:
    """The mean of values (n,), one for each picture."""
    return Estimate(float(values.mean()), ((values.sum() - values) / (len(values) - 1),))


def frechet(fx: Tensor, fy: Tensor) -> float:
    """The squared Frechet distance of the normal distributions that fit features (m, d) and (n, d).

    |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) of their covariances A and B (Heusel et al. 2017, arXiv 1706.08500,
    Equation 6). A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2), so two symmetric decompositions give the
    trace, in float64, with no complex numbers where a covariance is singular, as it is for less than d pictures.

    It is above 0 for two sets from one source, by an amount that falls with their size: docs/notes/eval.md.
    """
    if min(len(fx), len(fy)) < 2:
        raise UsageError(f"{len(fx)} and {len(fy)} pictures to compare: allowed are at least 2 of each")
    fx, fy = fx.double(), fy.double()
    a, b = torch.cov(fx.T).view(fx.shape[1], -1), torch.cov(fy.T).view(fy.shape[1], -1)
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    between = (fx.mean(0) - fy.mean(0)).square().sum()
    return float((between + a.trace() + b.trace() - 2 * both).clamp(min=0))
