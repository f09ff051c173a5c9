"""The kernel distance against its definition, and what the shipped features make of it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from calotype.errors import UsageError
from calotype.training.distance import Estimate, kid, paired_distance
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


# ---- the shipped features, on drawings that they have never seen ----


def drawing(seed: int, outlined: bool) -> Image.Image:
    """A few bright shapes on white; in the other style they have a black outline and no filling."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (512, 512), "white")
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(2, 6))):
        x, y, w, h = rng.integers(20, 300), rng.integers(20, 300), rng.integers(60, 190), rng.integers(60, 190)
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        style = {"outline": "black", "width": 12} if outlined else {"fill": colour}
        box = [int(x), int(y), int(x + w), int(y + h)]
        shape = (pen.ellipse, pen.rectangle, lambda b, **s: pen.regular_polygon((b[0] + 70, b[1] + 70, 70), 3, **s))
        shape[int(rng.integers(3))](box, **style)
    return picture.resize((128, 128), Image.Resampling.LANCZOS)


def tensor(pictures: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


@pytest.fixture(scope="module")
def halves() -> tuple[Tensor, list[Image.Image]]:
    """Features of one half of the drawings, and the other half itself."""
    pictures = [drawing(seed, outlined=False) for seed in range(240)]
    return features(load_features(), tensor(pictures[:120])), pictures[120:]


def distance(halves: tuple[Tensor, list[Image.Image]], pictures: list[Image.Image]) -> Estimate:
    return kid(halves[0], features(load_features(), tensor(pictures)))


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


def test_halves_of_one_set_are_at_zero(halves: tuple[Tensor, list[Image.Image]]) -> None:
    estimate = distance(halves, halves[1])
    assert abs(estimate.value) < 2 * estimate.error


@pytest.mark.parametrize("name", DAMAGES)
def test_the_distance_grows_with_damage(name: str, halves: tuple[Tensor, list[Image.Image]]) -> None:
    damage, amounts = DAMAGES[name]
    series = [distance(halves, [damage(picture, amount) for picture in halves[1]]) for amount in amounts]
    values = [distance(halves, halves[1]).value, *(estimate.value for estimate in series)]
    assert values == sorted(values)
    assert series[-1].value > 5 * series[-1].error


def test_the_distance_grows_with_the_share_of_another_style(halves: tuple[Tensor, list[Image.Image]]) -> None:
    others = [drawing(seed, outlined=True) for seed in range(1000, 1120)]
    mixed = [distance(halves, others[:count] + halves[1][count:]).value for count in (0, 12, 30, 60, 120)]
    assert mixed == sorted(mixed)


def test_each_defect_is_told_from_every_single_picture(halves: tuple[Tensor, list[Image.Image]]) -> None:
    """The paired distance: a stronger blur is farther for nearly every picture, not only on average."""
    net, pictures = load_features(), halves[1][:40]
    clean = features(net, tensor(pictures))
    blurred = [
        (features(net, tensor([p.filter(ImageFilter.GaussianBlur(s)) for p in pictures])) - clean).norm(dim=1)
        for s in (0.7, 1.5, 3)
    ]
    assert (blurred[0] < blurred[1]).float().mean() > 0.9
    assert (blurred[1] < blurred[2]).float().mean() > 0.9


# ---- the network ----


def test_the_shipped_network_is_small_and_documented_in_its_config() -> None:
    net = load_features()
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 1_000_000
    assert net.config.dim == len(net.mean) <= 256
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_features_do_not_depend_on_the_batch() -> None:
    pictures = tensor([drawing(seed, outlined=False) for seed in range(9)])
    net = load_features()
    together, alone = features(net, pictures), features(net, pictures, batch=2)
    assert together.shape == (9, net.config.dim)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_other_sizes_are_brought_to_its_own() -> None:
    net = load_features()
    pictures = tensor([drawing(seed, outlined=False) for seed in range(20)])
    large = F.interpolate(pictures.float(), scale_factor=2, mode="nearest").byte()
    far = (features(net, pictures) - features(net, pictures.roll(1, 0))).norm(dim=1).mean()
    assert (features(net, large) - features(net, pictures)).norm(dim=1).mean() < 0.2 * far
