"""What the measure of `calotype eval` says about pictures whose distance we know: the tables of docs/notes/eval.md.

    python recipes/icons/check_features.py ICONS

All of it with held-out concepts, which the feature network has never seen, in two disjoint halves: one stays as it is,
the other is damaged, more and more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import train_features as recipe
from torch import Tensor

from calotype.training.distance import kid
from calotype.training.features import FeatureNet, features, load_features

Damage = Callable[[Tensor, float], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("icons", type=Path)
    torch.manual_seed(0)
    rows, pictures = recipe.read_icons(parser.parse_args().icons)
    unseen = pictures[[i for i, row in enumerate(rows) if recipe.is_held_out(row)]]
    net = load_features()
    clean = features(net, unseen)
    print(f"{len(clean)} held-out pictures, {clean.shape[1]} features; kernel distances x 1000\n")
    print_null(clean)
    print_damage(net, unseen, clean)
    print_mixture(net, rows, pictures)


def halves(n: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(n)
    return order[: n // 2], order[n // 2 :]


def print_null(clean: Tensor, splits: int = 200) -> None:
    """Disjoint halves of one set: the truth is 0."""
    estimates = [kid(clean[a], clean[b]) for a, b in (halves(len(clean)) for _ in range(splits))]
    values = torch.tensor([estimate.value for estimate in estimates]) * 1000
    errors = torch.tensor([estimate.error for estimate in estimates]) * 1000
    within = (values.abs() <= 2 * errors).float().mean()
    print(f"same set, {splits} random halvings: mean {values.mean():+.3f}, deviation {values.std():.3f}, ")
    print(f"mean error bar {errors.mean():.3f}, {within:.0%} of the values within two error bars of 0\n")


def each(x: Tensor, amount: float) -> Tensor:
    return torch.full((len(x),), float(amount))


DAMAGES: dict[str, tuple[Damage, tuple[float, ...]]] = {
    "blur, sigma in pixels": (lambda x, a: recipe.blur(x, each(x, a)), (0.4, 0.6, 1, 1.5, 2, 4)),
    "noise, sigma of 255": (lambda x, a: recipe.noise(x, each(x, a / 127.5)), (2, 5, 10, 20, 40)),
    "hue, degrees": (lambda x, a: recipe.turn_hue(x, each(x, a).deg2rad()), (5, 10, 20, 45, 90)),
    "JPEG, quality": (lambda x, a: recipe.jpeg(x, each(x, a)), (90, 70, 50, 30, 10, 5)),
    "ghost of another, share": (lambda x, a: recipe.ghost(x, each(x, a)), (0.05, 0.1, 0.2, 0.3, 0.5)),
    "warp, pixels": (lambda x, a: recipe.warp(x, each(x, a / 64)), (0.5, 1, 2, 4, 8)),
    "never trained on: pixelated, block": (lambda x, a: pixelate(x, int(a)), (2, 4, 8, 16)),
    "never trained on: faded, contrast": (lambda x, a: 1 - a * (1 - x), (0.95, 0.9, 0.8, 0.6, 0.4)),
    "never trained on: greyed, share": (lambda x, a: x.lerp(x.mean(1, keepdim=True), a), (0.1, 0.2, 0.4, 0.7, 1)),
    "never trained on: squeezed, width": (lambda x, a: squeeze(x, a), (0.95, 0.9, 0.8, 0.6)),
    "never trained on: quarters swapped, share": (lambda x, a: swap_quarters(x, a), (0.05, 0.1, 0.25, 0.5, 1)),
}


def pixelate(x: Tensor, block: int) -> Tensor:
    return F.interpolate(F.avg_pool2d(x, block), scale_factor=block, mode="nearest")


def squeeze(x: Tensor, width: float) -> Tensor:
    theta = torch.tensor([[1 / width, 0.0, 0.0], [0.0, 1.0, 0.0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1


def swap_quarters(x: Tensor, share: float) -> Tensor:
    """In some pictures the quarters change places: every detail is right, the whole is nonsense."""
    swapped = x.roll((x.shape[2] // 2, x.shape[3] // 2), (2, 3))
    return torch.where(torch.rand(len(x), 1, 1, 1) < share, swapped, x)


def print_damage(net: FeatureNet, pictures: Tensor, clean: Tensor) -> None:
    a, b = halves(len(clean))
    none = kid(clean[a], clean[b])
    print(f"halves for all that follows, undamaged: {1000 * none.value:.2f} ± {1000 * none.error:.2f}\n")
    for name, (damage, amounts) in DAMAGES.items():
        print(f"{name}:", end=" ")
        for amount in amounts:
            damaged = [damage(x.float() / 127.5 - 1, amount) for x in pictures[b].split(64)]
            uint8 = torch.cat(damaged).add(1).mul(127.5).round().clamp(0, 255).byte()
            estimate = kid(clean[a], features(net, uint8))
            print(f"{amount:g} -> {1000 * estimate.value:.1f}", end="; ", flush=True)
        print()


def print_mixture(net: FeatureNet, rows: list[dict[str, str]], pictures: Tensor) -> None:
    """Flat icons, of which a growing share is replaced by icons in another style. All icons: the unseen are too few."""
    others = ("gradient", "noto", "3d")
    of = {
        name: features(net, pictures[[i for i, row in enumerate(rows) if row["style"] == name]])
        for name in ("flat", *others)
    }
    flat = of["flat"]
    a, b = halves(len(flat))
    print("\nall pictures of these styles, trained on or not:")
    for name in others:
        print(f"flat with a share of {name}:", end=" ")
        for share in (0, 0.1, 0.25, 0.5, 1):
            count = round(share * len(b))
            estimate = kid(flat[a], torch.cat([flat[b[count:]], of[name][:count]]))
            print(f"{share:g} -> {1000 * estimate.value:.1f} ± {1000 * estimate.error:.1f}", end="; ")
        print()


if __name__ == "__main__":
    main()
