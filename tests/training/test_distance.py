"""The kernel distance against its definition, and what the shipped features make of it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from calotype.errors import UsageError
from calotype.training.distance import Estimate, frechet, kid, mean, paired_distance
from calotype.training.features import SHIPPED, features, load_features

# ---- the statistic ----


def kernel(x: Tensor, y: Tensor) -> float:
    return float((x.double() @ y.double() / len(x) + 1) ** 3)


def kid_by_definition(fx: Tensor, fy: Tensor) -> float:
    m, n = len(fx), len(fy)
    xx = sum(kernel(fx[i], fx[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(kernel(fy[i], fy[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    xy = sum(kernel(fx[i], fy[j]) for i in range(m) for j in range(n)) / (m * n)
    return xx + yy - 2 * xy


def paired_kid_by_definition(fx: Tensor, fy: Tensor) -> float:
    n = len(fx)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    h = (kernel(fx[i], fx[j]) + kernel(fy[i], fy[j]) - kernel(fx[i], fy[j]) - kernel(fx[j], fy[i]) for i, j in pairs)
    return sum(h) / len(pairs)


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_kid_is_its_definition() -> None:
    fx, fy = normal(7, 5, 0), normal(9, 5, 1) + 0.5
    estimate = kid(fx, fy)
    assert estimate.value == pytest.approx(kid_by_definition(fx, fy), rel=1e-12)
    for which, (of_x, of_y) in ((0, (fx[1:], fy)), (1, (fx, fy[1:]))):
        assert float(estimate.without[which][0]) == pytest.approx(kid_by_definition(of_x, of_y), rel=1e-10)


def test_paired_kid_is_its_definition() -> None:
    fx, fy = normal(8, 5, 0), normal(8, 5, 1) + 0.5
    estimate = kid(fx, fy, paired=True)
    assert estimate.value == pytest.approx(paired_kid_by_definition(fx, fy), rel=1e-12)
    assert float(estimate.without[0][0]) == pytest.approx(paired_kid_by_definition(fx[1:], fy[1:]), rel=1e-10)


def test_kid_does_not_depend_on_its_blocks() -> None:
    fx, fy = normal(1030, 4, 0), normal(1500, 4, 1)
    whole = kid(fx, fy).value
    direct = [((a.double() @ b.double().T / 4 + 1) ** 3) for a, b in ((fx, fx), (fy, fy), (fx, fy))]
    xx, yy = ((k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in direct[:2])
    assert whole == pytest.approx(float(xx + yy - 2 * direct[2].mean()), abs=1e-10)


def test_one_source_is_at_zero_on_average_and_not_above() -> None:
    values = torch.tensor([kid(*normal(60, 16, seed).split(30)).value for seed in range(300)])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(300)
    assert (values < 0).float().mean() > 0.3  # a biased distance never is


def test_pairs_that_resemble_each_other_stay_at_zero() -> None:
    """Two sets over the same prompts: fx[i] and fy[i] have most of their features in common."""
    values, unpaired = [], []
    for seed in range(200):
        prompts = normal(30, 16, 3 * seed)
        fx, fy = (prompts + 0.3 * normal(30, 16, 3 * seed + i) for i in (1, 2))
        values.append(kid(fx, fy, paired=True).value)
        unpaired.append(kid(fx, fy).value)
    error = float(np.std(values)) / math.sqrt(200)
    assert abs(np.mean(values)) < 3 * error
    assert np.mean(unpaired) < -10 * error  # what leaving the pairs in would do


def test_the_error_is_the_spread_of_the_estimate() -> None:
    estimates = [kid(normal(50, 8, 2 * seed), normal(50, 8, 2 * seed + 1) + 0.6) for seed in range(200)]
    spread = float(np.std([estimate.value for estimate in estimates]))
    assert np.mean([estimate.error for estimate in estimates]) == pytest.approx(spread, rel=0.15)


def test_a_difference_forgets_what_both_have_in_common() -> None:
    fy = normal(40, 8, 0)
    near, far = kid(fy + 0.3, fy, paired=True), kid(fy + 0.5, fy, paired=True)
    assert (far - near).value == pytest.approx(far.value - near.value)
    assert (far - near).error < math.hypot(far.error, near.error)
    assert (near - near).error == 0


def test_the_paired_distance_is_a_mean_with_its_standard_error() -> None:
    fx, fy = normal(30, 4, 0), normal(30, 4, 1)
    each = (fx - fy).norm(dim=1).double() / 2
    estimate = paired_distance(fx, fy)
    assert estimate.value == pytest.approx(float(each.mean()))
    assert estimate.error == pytest.approx(float(each.std()) / math.sqrt(30), rel=1e-5)


@pytest.mark.parametrize(("m", "n", "paired"), [(2, 9, False), (9, 2, False), (2, 2, True), (4, 5, True)])
def test_too_few_pictures_are_refused(m: int, n: int, paired: bool) -> None:
    with pytest.raises(UsageError, match=f"{m} and {n} pictures"):
        kid(normal(m, 4, 0), normal(n, 4, 1), paired=paired)


def test_a_mean_has_its_standard_error() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    assert mean(values).value == 4
    assert mean(values).error == pytest.approx(float(values.std()) / 2)


def test_frechets_distance_of_a_set_to_itself_is_zero() -> None:
    for n, d in ((300, 20), (10, 60), (300, 1)):  # the second has singular covariances
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
        assert 0 <= frechet(x, x) < 1e-5
        assert frechet(x, x.flip(0)) < 1e-5


def test_frechets_distance_of_normal_distributions_is_the_formula() -> None:
    """Sets whose mean and covariance are what they should be, to the last digit: no chance in the comparison."""

    def exactly(mean: Tensor, deviations: Tensor, seed: int) -> Tensor:
        x = torch.randn(100, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x = x - x.mean(0)
        return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T) * deviations + mean

    here, there = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, -2.0])
    one, two = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.5, 0.1, 0.5])
    x, y = exactly(here, one, 1), exactly(there, two, 2)
    assert frechet(x, x + 2) == pytest.approx(3 * 4)
    expected = float((here - there).square().sum() + (one - two).square().sum())  # axes agree: deviations subtract
    assert frechet(x, y) == pytest.approx(expected)
    assert frechet(x, y) == pytest.approx(frechet(y, x))
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    assert frechet(x @ turn, y @ turn) == pytest.approx(expected)
    # Axes that do not agree: against the matrix square root of A B by its eigenvalues, which are real and positive.
    a, b = torch.cov(x.T), torch.cov((y @ turn).T)
    root = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    between = (x.mean(0) - (y @ turn).mean(0)).square().sum()
    assert frechet(x, y @ turn) == pytest.approx(float(between + a.trace() + b.trace() - 2 * root))


def test_frechets_distance_needs_two_pictures_of_each() -> None:
    with pytest.raises(UsageError, match="1 and 5 pictures"):
        frechet(torch.zeros(1, 4), torch.zeros(5, 4))


# ---- the shipped features, on drawings that they have never seen ----


def drawing(seed: int, outlined: bool) -> Image.Image:
    """A few bright shapes on white; in the other style they have a black outline and no filling."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (256, 256), "white")
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(2, 6))):
        x, y, w, h = (int(number) for number in (*rng.integers(10, 150, 2), *rng.integers(30, 95, 2)))
        colour = f"hsv({rng.integers(0, 90)}, {rng.integers(50, 100)}%, {rng.integers(60, 100)}%)"  # red to green
        style = {"outline": "black", "width": 6} if outlined else {"fill": colour}
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)((x, y, x + w, y + h), **style)
    return picture.resize((128, 128), Image.Resampling.LANCZOS)


def tensor(pictures: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


@dataclass(frozen=True)
class Halves:
    """Drawings in two halves, the first of which only its features are asked for."""

    first: Tensor
    second: Tensor
    pictures: list[Image.Image]  # of the second

    def distance(self, pictures: list[Image.Image]) -> Estimate:
        """Of these pictures to the first half."""
        return kid(self.first, features(NET, tensor(pictures)))


NET = load_features()
N = 80  # drawings a half


@pytest.fixture(scope="module")
def halves() -> Halves:
    pictures = [drawing(seed, outlined=False) for seed in range(2 * N)]
    first, second = features(NET, tensor(pictures)).split(N)
    return Halves(first, second, pictures[N:])


def noisy(picture: Image.Image, sigma: float) -> Image.Image:
    pixels = np.asarray(picture) + np.random.default_rng(0).normal(0, sigma, (128, 128, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def hue_turned(picture: Image.Image, degrees: float) -> Image.Image:
    hue, *others = picture.convert("HSV").split()
    turned = hue.point(lambda value: int(value + degrees / 360 * 256) % 256)
    return Image.merge("HSV", (turned, *others)).convert("RGB")


def compressed(picture: Image.Image, quality: float) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(quality))
    return Image.open(file).convert("RGB")


DAMAGES: dict[str, tuple[Callable[[Image.Image, float], Image.Image], tuple[float, ...]]] = {
    "blur": (lambda picture, sigma: picture.filter(ImageFilter.GaussianBlur(sigma)), (1, 2, 4)),
    "noise": (noisy, (6, 15, 40)),
    "hue": (hue_turned, (30, 60, 120)),
    "jpeg": (compressed, (40, 10, 4)),
}


def test_halves_of_one_set_are_at_zero(halves: Halves) -> None:
    whole = torch.cat([halves.first, halves.second])
    generator = torch.Generator().manual_seed(0)
    estimates = [kid(*whole[torch.randperm(2 * N, generator=generator)].split(N)) for _ in range(40)]
    values, errors = ([getattr(e, name) for e in estimates] for name in ("value", "error"))
    assert abs(np.mean(values)) < 0.5 * np.mean(errors)
    assert np.mean(np.abs(values) < 2 * np.array(errors)) > 0.85


@pytest.mark.parametrize("name", DAMAGES)
def test_the_distance_grows_with_damage(name: str, halves: Halves) -> None:
    damage, amounts = DAMAGES[name]
    series = [halves.distance([damage(picture, amount) for picture in halves.pictures]) for amount in amounts]
    values = [kid(halves.first, halves.second).value, *(estimate.value for estimate in series)]
    assert values == sorted(values)
    assert series[-1].value > 5 * series[-1].error


def test_the_distance_grows_with_the_share_of_another_style(halves: Halves) -> None:
    others = features(NET, tensor([drawing(seed, outlined=True) for seed in range(1000, 1000 + N)]))
    mixtures = [torch.cat([others[:count], halves.second[count:]]) for count in (0, N // 8, N // 4, N // 2, N)]
    values = [kid(halves.first, mixture).value for mixture in mixtures]
    assert values == sorted(values)


def test_a_stronger_blur_is_farther_for_nearly_every_single_picture(halves: Halves) -> None:
    pictures, clean = halves.pictures[:40], halves.second[:40]
    weak, strong = (tensor([p.filter(ImageFilter.GaussianBlur(sigma)) for p in pictures]) for sigma in (1, 2.5))
    nearer = (features(NET, weak) - clean).norm(dim=1) < (features(NET, strong) - clean).norm(dim=1)
    assert nearer.float().mean() > 0.9


# ---- the network ----


def test_the_shipped_network_is_small_and_documented_in_its_config() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 1_000_000
    assert NET.config.dim == len(NET.mean) <= 256
    assert not any(parameter.requires_grad for parameter in NET.parameters())


def test_features_do_not_depend_on_the_batch() -> None:
    pictures = tensor([drawing(seed, outlined=False) for seed in range(9)])
    together, alone = features(NET, pictures), features(NET, pictures, batch=2)
    assert together.shape == (9, NET.config.dim)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_other_sizes_are_brought_to_its_own() -> None:
    pictures = tensor([drawing(seed, outlined=False) for seed in range(9)])
    large = F.interpolate(pictures.float(), scale_factor=2, mode="nearest").byte()
    own = features(NET, pictures)
    near, far = (features(NET, large) - own).norm(dim=1), (own.roll(1, 0) - own).norm(dim=1)
    assert near.mean() < 0.2 * far.mean()
