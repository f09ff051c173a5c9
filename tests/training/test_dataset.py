"""Pictures and captions encoded once, the teacher's own drawings, and the order in which training sees them."""

from __future__ import annotations

import itertools
import json
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_sources import jpeg, members, write_tar

from calotype.errors import CalotypeWarning, CheckpointError, UsageError
from calotype.images import to_tensor
from calotype.parts import Parts
from calotype.prepare import condition
from calotype.training import cache as cache_module
from calotype.training import drawn, shards
from calotype.training.cache import CaptionCache, Encoding, PictureCache, distinct, unit_of
from calotype.training.dataset import Dataset, Samples, pick, prepare, set_aside
from calotype.training.pictures import fit
from calotype.training.ranks import Ranks
from calotype.training.settings import Settings
from calotype.training.sources import Source, open_source
from calotype.weights.load import load_parts
from checkpoints import write_model, write_unet

SQUARE = Encoding(64, 16, buckets=False)


@pytest.fixture(scope="module")
def sd15(tiny_sd15: Path) -> Parts:
    return load_parts(tiny_sd15)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path) -> Parts:
    return load_parts(tiny_sdxl)


@pytest.fixture(scope="module")
def inpainting(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = write_model(tmp_path_factory.mktemp("models") / "inpainting")
    torch.manual_seed(0)
    write_unet(folder / "unet", in_channels=9)
    return load_parts(folder)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures or captions a file."""
    for module in (shards, cache_module):
        monkeypatch.setattr(module, "SHARD", 2)


def write_pictures(folder: Path, sizes: list[tuple[int, int]]) -> Source:
    """Noise of the given (width, height)."""
    folder.mkdir(exist_ok=True)
    for i, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"a fox {i}")
    return open_source(folder)


SIZES = [(64, 64), (128, 64), (64, 100), (70, 70), (90, 64), (64, 128), (200, 100)]


def made(parts: Parts, source: Source, cache: Path, ranks: Ranks | None = None, **settings: Any) -> Dataset:
    chosen = Settings(**({"resolution": 64, "validation_samples": 0, "validation_steps": 0} | settings))
    *_, dataset = prepare(parts, source, chosen, cache, ranks)
    assert isinstance(dataset, Dataset)
    return dataset


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- the order ----

LAYOUTS = [(1,), (7,), (1, 1), (3, 5), (1, 10, 4), (2, 2, 2, 2, 9), tuple(range(1, 12))]


@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_round_sees_each_picture_as_often(counts: tuple[int, ...], batch: int) -> None:
    total = sum(counts)
    for turn in range(3):
        seen: Counter[tuple[int, int]] = Counter()
        for step in range(turn * total, (turn + 1) * total):
            bucket, places = pick(counts, 5, step, batch)
            assert len(places) == batch
            seen.update((bucket, int(place)) for place in places)
        assert seen == {(b, i): batch for b, count in enumerate(counts) for i in range(count)}


def test_one_bucket_is_epoch_after_epoch() -> None:
    for size, batch in itertools.product((1, 2, 7, 10), (1, 3, 10, 25)):
        seen = np.concatenate([pick((size,), 7, step, batch)[1] for step in range(40)])
        laps = seen[: len(seen) // size * size].reshape(-1, size)
        assert (np.sort(laps, axis=1) == np.arange(size)).all()
        if size == 10:
            assert len({tuple(lap) for lap in laps.tolist()}) == len(laps)  # each lap, also of later rounds, is new


def test_the_order_is_a_function_of_seed_and_step() -> None:
    first = [pick((6, 4), 1, step, 3) for step in range(30)]
    for step in reversed(range(30)):
        bucket, places = pick((6, 4), 1, step, 3)
        assert bucket == first[step][0]
        assert places.tolist() == first[step][1].tolist()
    other = [pick((6, 4), 2, step, 3) for step in range(30)]
    assert [bucket for bucket, _ in first] != [bucket for bucket, _ in other]
    assert [bucket for bucket, _ in first[:10]] != [bucket for bucket, _ in first[10:20]]


# ---- pictures ----


def test_latents_are_the_autoencoders(sd15: Parts, tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "data", SIZES)
    dataset = made(sd15, source, tmp_path / "cache", random_flip=True)
    assert sum(dataset.pictures.counts) == len(SIZES)
    assert len(dataset.pictures.counts) == 3
    vae = sd15.vae.config
    for bucket, (h, w) in enumerate(dataset.pictures.sizes):
        for place, view in itertools.product(range(dataset.pictures.counts[bucket]), (0, 1)):
            example = source.examples[dataset.pictures.example(bucket, place)]
            picture, cut = fit(Image.open(example.file), (8 * h, 8 * w), bool(view))
            with torch.inference_mode():
                mean, _ = sd15.vae.encode(to_tensor(picture))
            latents, sizes, masked = dataset.pictures.row(bucket, place, view)
            assert masked is None
            assert sizes.tolist() == [*cut.original, *cut.crop]
            wanted = (mean[0] - vae.shift_factor) * vae.scaling_factor
            torch.testing.assert_close(latents.float(), wanted, atol=2e-3, rtol=2e-3)


def test_samples(sd15: Parts, tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "data", SIZES)
    dataset = made(sd15, source, tmp_path / "cache")
    assert len(dataset) == len(SIZES)
    for step in range(8):
        samples = dataset.samples(3, step, 4, slice(None))
        bucket, places = pick(dataset.pictures.counts, 3, step, 4)
        h, w = dataset.pictures.sizes[bucket]
        assert samples.latents.shape == (4, 4, h, w)
        assert samples.latents.dtype == torch.float32
        captions = []
        for i in range(4):
            number = dataset.pictures.example(bucket, int(places[i]))
            assert samples.names[i] == source.examples[number].name
            captions += source.examples[number].captions
            assert torch.equal(samples.latents[i], dataset.pictures.row(bucket, int(places[i]), 0)[0].float())
        wanted, null = condition(sd15, captions, "", 7.5, (64, 64))
        assert null is not None
        torch.testing.assert_close(samples.conditioning.context, wanted.context, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(samples.null.context, null.context, atol=2e-3, rtol=2e-3)
        assert samples.conditioning.pooled is samples.conditioning.time_ids is samples.masked is None


def equal(a: Samples, b: Samples) -> bool:
    pairs = [(a.latents, b.latents), (a.conditioning.context, b.conditioning.context), (a.null.context, b.null.context)]
    return a.names == b.names and all(torch.equal(one, other) for one, other in pairs)


def test_the_ranks_share_a_batch(sd15: Parts, tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "data", SIZES)
    for i in range(len(SIZES)):
        (tmp_path / "data" / f"{i:03}.txt").unlink()
    rows = [{"file_name": f"{i:03}.png", "text": [f"a fox {i}", f"a cat {i}"]} for i in range(len(SIZES))]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(tmp_path / "data")
    dataset = made(sd15, source, tmp_path / "cache", random_flip=True)
    for step in range(5):
        whole = dataset.samples(1, step, 12, slice(None))
        assert equal(whole, dataset.samples(1, step, 12))
        for world in (1, 2, 3, 4):
            share = 12 // world
            parts = [dataset.samples(1, step, 12, slice(r * share, (r + 1) * share)) for r in range(world)]
            assert tuple(name for part in parts for name in part.names) == whole.names
            assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
            assert torch.equal(torch.cat([part.conditioning.context for part in parts]), whole.conditioning.context)


def test_captions_and_mirrors_alternate(sd15: Parts, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / "data/a.png"
    )
    (tmp_path / "data/metadata.jsonl").write_text('{"file_name": "a.png", "text": ["a fox", "a cat"]}')
    dataset = made(sd15, open_source(tmp_path / "data"), tmp_path / "cache", random_flip=True)
    samples = dataset.samples(0, 0, 64)
    kinds = Counter((float(samples.latents[i].sum()), float(samples.conditioning.context[i].sum())) for i in range(64))
    assert len(kinds) == 4
    assert min(kinds.values()) > 5
    assert not equal(dataset.samples(0, 1, 64), samples)
    still = made(sd15, open_source(tmp_path / "data"), tmp_path / "cache").samples(0, 0, 64)
    assert len({float(each.sum()) for each in still.latents}) == 1


def test_sdxl_is_told_the_sizes(sdxl: Parts, tmp_path: Path) -> None:
    dataset = made(sdxl, write_pictures(tmp_path / "data", [(200, 100), (64, 96)]), tmp_path / "cache")
    assert unit_of(sdxl) == 16
    found = {}
    for step in range(2):
        samples = dataset.samples(0, step, 2)
        assert samples.conditioning.time_ids is not None
        assert samples.null.time_ids is not None
        assert torch.equal(samples.conditioning.time_ids, samples.null.time_ids)
        found[samples.names[0]] = samples.conditioning.time_ids[0].tolist()
        assert samples.conditioning.pooled is not None
        assert samples.null.pooled is not None
        assert samples.conditioning.pooled.shape == samples.null.pooled.shape == (2, 32)
        assert samples.null.context.abs().max() == samples.null.pooled.abs().max() == 0
        wanted, _ = condition(sdxl, [f"a fox {int(name[:3])}" for name in samples.names], "", 1.0, (64, 64))
        assert wanted.pooled is not None
        torch.testing.assert_close(samples.conditioning.context, wanted.context, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(samples.conditioning.pooled, wanted.pooled, atol=2e-3, rtol=2e-3)
    assert found["000.png"][:2] == [100, 200]
    h, w = found["000.png"][4:]
    assert h < w
    assert h * w <= 64 * 64
    scaled = max(h / 100, w / 200)
    assert found["000.png"][2:4] == pytest.approx([(100 * scaled - h) / 2, (200 * scaled - w) / 2], abs=1)
    kept = made(replace(sdxl, zero_empty_negative=False), open_source(tmp_path / "data"), tmp_path / "cache")
    assert kept.samples(0, 0, 2).null.context.abs().max() > 0


def test_inpainting_sees_a_mask_and_what_is_left(inpainting: Parts, tmp_path: Path) -> None:
    dataset = made(inpainting, write_pictures(tmp_path / "data", [(64, 64)] * 6), tmp_path / "cache", random_flip=True)
    shares = set()
    for place, view in itertools.product(range(6), (0, 1)):
        latents, _, masked = dataset.pictures.row(0, place, view)
        assert masked is not None
        assert masked.shape == (5, 8, 8)
        assert set(masked[0].unique().tolist()) <= {0.0, 1.0}
        shares.add(float(masked[0].mean()))
        assert not torch.allclose(latents, masked[1:], atol=1e-2)
    assert len(shares) > 3
    samples = dataset.samples(0, 0, 4)
    assert samples.masked is not None
    assert samples.masked.shape == (4, 5, 8, 8)
    x = torch.cat([samples.latents, samples.masked], dim=1)
    assert inpainting.unet(x, torch.full((4,), 500), samples.conditioning).shape == samples.latents.shape
    again = made(inpainting, open_source(tmp_path / "data"), tmp_path / "elsewhere", random_flip=True)
    second = again.samples(0, 0, 4).masked
    assert second is not None
    assert torch.equal(second, samples.masked)


def test_the_masked_picture_is_grey_where_it_is_hidden(
    inpainting: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = np.zeros((64, 64), dtype=bool)
    mask[:32, 16:] = True
    monkeypatch.setattr(cache_module, "hole", lambda key, size: mask)
    source = write_pictures(tmp_path / "data", [(64, 64)])
    dataset = made(inpainting, source, tmp_path / "cache")
    _, _, masked = dataset.pictures.row(0, 0, 0)
    assert masked is not None
    pixels = to_tensor(Image.open(source.examples[0].file))
    pixels[:, :, :32, 16:] = 0
    vae = inpainting.vae.config
    with torch.inference_mode():
        wanted = (inpainting.vae.encode(pixels)[0][0] - vae.shift_factor) * vae.scaling_factor
    torch.testing.assert_close(masked[1:].float(), wanted, atol=2e-3, rtol=2e-3)
    assert masked[0, :4, 2:].min() == 1
    assert masked[0].sum() == 4 * 6


def test_other_inputs_are_refused(sd15: Parts, tmp_path: Path) -> None:
    config = replace(sd15.unet.config, in_channels=8)
    odd = replace(sd15, unet=type("Odd", (), {"config": config})())
    with pytest.raises(CheckpointError, match="takes 8 channels: must be 4, or 9 for inpainting"):
        PictureCache(odd, [], SQUARE, tmp_path)
    with pytest.raises(UsageError, match="resolution is 8: must be at least 16"):
        made(sd15, write_pictures(tmp_path / "data", [(64, 64)]), tmp_path / "cache", resolution=8)


# ---- the cache ----


@pytest.mark.usefixtures("small_shards")
def test_what_is_there_is_not_encoded_again(sd15: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = write_pictures(tmp_path / "data", SIZES), tmp_path / "cache"
    first = made(sd15, source, cache)
    assert len(list((cache / "latents").iterdir())) == len(list((cache / "captions").iterdir())) == 4
    before = files(cache)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_encode", lambda *_: pytest.fail("pictures encoded again"))
        patch.setattr(cache_module, "_encode_texts", lambda *_: pytest.fail("captions encoded again"))
        patch.setattr("calotype.training.sources.Example.read", lambda _: pytest.fail("pictures read again"))
        second = made(sd15, open_source(tmp_path / "data"), cache)
    assert files(cache) == before
    assert all(equal(first.samples(0, step, 3), second.samples(0, step, 3)) for step in range(7))


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("change", ["picture", "flip", "buckets", "resolution", "weights", "added"])
def test_what_changed_is_encoded(change: str, tiny_sd15: Path, tmp_path: Path) -> None:
    parts, cache = load_parts(tiny_sd15), tmp_path / "cache"
    made(parts, write_pictures(tmp_path / "data", SIZES), cache)
    before = set((cache / "latents").iterdir())
    settings: dict[str, Any] = {}
    if change == "picture":
        Image.new("RGB", (64, 64), "red").save(tmp_path / "data" / "003.png")
    elif change == "added":
        Image.new("RGB", (64, 64), "red").save(tmp_path / "data" / "zzz.png")
        (tmp_path / "data" / "zzz.txt").write_text("new")
    elif change == "weights":
        with torch.no_grad():
            next(parts.vae.encoder.parameters()).add_(0.1)
    else:
        settings = {"flip": {"random_flip": True}, "buckets": {"aspect_buckets": False}}.get(change, {"resolution": 80})
    made(parts, open_source(tmp_path / "data"), cache, **settings)
    new = set((cache / "latents").iterdir()) - before
    assert len(new) == (1 if change in ("picture", "added") else 4)


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_run_goes_on(sd15: Parts, tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "data", SIZES)
    whole = made(sd15, source, tmp_path / "whole")
    running = PictureCache(sd15, source.examples, Encoding(64, 16), tmp_path / "parts").fill()
    assert next(count for count in running if count == 5)
    running.close()
    assert len(list((tmp_path / "parts" / "latents").iterdir())) == 2
    assert len(made(sd15, source, tmp_path / "parts")) == len(whole)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kind", ["latents", "captions"])
@pytest.mark.parametrize("spoil", [lambda data: data[:-7], lambda data: b"", lambda data: b"\xff" * len(data)])
def test_a_truncated_file_is_made_again(
    kind: str, spoil: Callable[[bytes], bytes], sd15: Parts, tmp_path: Path
) -> None:
    source, cache = write_pictures(tmp_path / "data", SIZES), tmp_path / "cache"
    made(sd15, source, cache)
    before = files(cache)
    damaged = sorted((cache / kind).iterdir())[1]
    damaged.write_bytes(spoil(damaged.read_bytes()))
    with pytest.warns(CalotypeWarning, match="it is made again"):
        made(sd15, source, cache)
    assert files(cache) == before


@pytest.mark.usefixtures("small_shards")
def test_several_processes_fill_one_cache(sd15: Parts, tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "data", SIZES)
    alone = made(sd15, source, tmp_path / "alone")
    texts = distinct(source.examples)
    for world in (2, 3, 5):
        cache = tmp_path / f"of {world}"
        counts = []
        for rank in reversed(range(world)):
            *_, done = [0, *PictureCache(sd15, source.examples, Encoding(64, 16), cache).fill(rank, world)]
            counts.append(done)
            list(CaptionCache(sd15, texts, cache).fill(rank, world))
        assert sum(counts) == len(SIZES)
        assert files(cache) == files(tmp_path / "alone")
        assert equal(made(sd15, source, cache).samples(0, 3, 4), alone.samples(0, 3, 4))


@pytest.mark.usefixtures("small_shards")
def test_all_wait_between_writing_and_reading(sd15: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = write_pictures(tmp_path / "data", SIZES), tmp_path / "cache"

    def others(ranks: Ranks) -> None:
        list(PictureCache(sd15, source.examples, Encoding(64, 16), cache).fill(0, 2))
        list(CaptionCache(sd15, distinct(source.examples), cache).fill(0, 2))

    monkeypatch.setattr(Ranks, "barrier", others)
    assert len(made(sd15, source, cache, Ranks(1, 2))) == len(SIZES)


def test_progress_is_told(sd15: Parts, tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "data", [(64, 64)] * 40)
    settings = Settings(resolution=64, validation_samples=3)
    *counts, dataset = prepare(sd15, source, settings, tmp_path / "cache")
    assert isinstance(dataset, Dataset)
    assert list(dict.fromkeys(counts)) == [16, 32, 40]


# ---- broken pictures ----


def test_broken_pictures_are_left_out(sd15: Parts, tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [*members(*range(199)), ("x\udcff.jpg", jpeg()[:300]), ("x\udcff.txt", b"broken")])
    source = open_source(tmp_path / "s.tar")
    for _ in range(2):  # the second time, the cache knows
        with pytest.warns(
            CalotypeWarning, match=r"^1 of 200 pictures are broken: s\.tar:x.\.jpg is damaged.*: left out$"
        ):
            dataset = made(sd15, source, tmp_path / "cache", aspect_buckets=False)
        assert len(dataset) == 199
        assert 199 not in {dataset.pictures.example(0, place) for place in range(199)}


@pytest.mark.usefixtures("small_shards")
def test_too_many_broken_pictures(sd15: Parts, tmp_path: Path) -> None:
    write_pictures(tmp_path / "data", [(64, 64)] * 8)
    for i in range(6):
        (tmp_path / "data" / f"{i:03}.png").write_bytes(b"nothing")
    source = open_source(tmp_path / "data")
    (tmp_path / "data" / "006.png").unlink()
    with pytest.raises(
        UsageError, match=r"^7 of 8 pictures are broken: 000.png is not a picture in .*; and 2 more \("
    ) as said:
        made(sd15, source, tmp_path / "cache")
    assert "005.png" not in str(said.value)


def test_latents_that_are_not_finite_are_broken(sd15: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pictures(tmp_path / "data", [(64, 64)] * 3)
    Image.new("RGB", (64, 64), "white").save(tmp_path / "data" / "001.png")
    encode = sd15.vae.encode

    def overflowing(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        mean, logvar = encode(pixels)
        return torch.where((pixels == 1).flatten(1).all(dim=1).view(-1, 1, 1, 1), torch.inf, mean), logvar

    monkeypatch.setattr(sd15.vae, "encode", overflowing)
    store = PictureCache(sd15, source.examples, SQUARE, tmp_path / "cache")
    list(store.fill())
    pictures = store.read()
    assert pictures.counts == (2,)
    assert [(one.position, one.reason) for one in pictures.broken] == [
        (1, "001.png encodes to numbers that are not finite")
    ]


# ---- captions ----


def test_long_and_empty_captions(sd15: Parts, tmp_path: Path) -> None:
    """A caption is cut to one chunk, whatever stands beside it; 20,000 words are no error."""
    texts = ("", "a fox", "a red fox in the snow " * 5000, "")
    store = CaptionCache(sd15, texts, tmp_path)
    list(store.fill())
    context, pooled = store.read().take(texts)
    assert context.shape == (4, 77, 32)
    assert pooled is None
    for i, text in enumerate(("", "a fox", "a red fox in the snow " * 30)):
        wanted, _ = sd15.text.encode([text])
        torch.testing.assert_close(context[i], wanted[0, :77], atol=2e-3, rtol=2e-3)


def test_embeddings_beyond_float16_are_kept(sd15: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = sd15.text.encode

    def large(prompts: list[str]) -> tuple[torch.Tensor, None]:
        return encode(prompts)[0] * 1e6, None

    monkeypatch.setattr(sd15.text, "encode", large)
    store = CaptionCache(sd15, ["a fox"], tmp_path)
    list(store.fill())
    context, _ = store.read().take(["a fox"])
    assert torch.isfinite(context).all()
    assert context.abs().max() > 70_000


# ---- held out ----


def test_some_are_held_out(sd15: Parts, tmp_path: Path) -> None:
    source, cache = write_pictures(tmp_path / "data", [(64, 64)] * 30), tmp_path / "cache"
    dataset = made(sd15, source, cache, validation_samples=3)
    assert not dataset.held_out_is_seen
    assert len(dataset.held_out) == 3
    assert len(dataset) == 27
    seen = {name for step in range(27) for name in dataset.samples(0, step, 1).names}
    unseen = {one.name for one in source.examples} - seen
    assert {one.captions[0] for one in source.examples if one.name in unseen} == set(dataset.held_out)
    before = files(cache)
    dataset = made(sd15, source, cache, validation_samples=4)  # 30 are too few to spare 4
    assert dataset.held_out_is_seen
    assert (len(dataset.held_out), len(dataset)) == (4, 30)
    assert files(cache) == before
    few = made(sd15, source, cache, validation_samples=99)
    assert len(few.held_out) == 30


def test_more_data_changes_few_of_the_held_out() -> None:
    names = [f"{i}.png" for i in range(2000)]
    first, seen = set_aside(names, 50)
    assert not seen
    second, _ = set_aside([*names, *(f"new {i}.png" for i in range(200))], 50)
    assert len(set(first) & set(second)) > 35
    assert set_aside(names, 0) == ((), False)


# ---- the teacher's own pictures ----


def prompts(tmp_path: Path, *lines: str) -> Source:
    (tmp_path / "p.txt").write_text("\n".join(lines))
    return open_source(tmp_path / "p.txt")


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_the_teacher_draws(model: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any) -> None:
    from calotype import generate as loop
    from calotype.prepare import prepare as ready
    from calotype.request import Request
    from calotype.resolve import resolve

    parts, cache = request.getfixturevalue(model), tmp_path / "cache"
    source = prompts(tmp_path, "a fox", "a cat")
    settings: dict[str, Any] = {"samples": 5, "teacher_steps": 3, "seed": 11, "validation_steps": 0}
    dataset = made(parts, source, cache, random_flip=True, **settings)
    assert dataset.pictures.counts == (5,)
    teacher = replace(parts, schedule=replace(parts.schedule, spacing="trailing"))
    for place in range(5):
        number = dataset.pictures.example(0, place)
        text = ("a fox", "a cat")[number % 2]
        assert dataset.examples[number].captions == (text,)
        asked = Request(prompt=text, seed=11 + number, steps=3, sampler="ddim", width=64, height=64)
        *_, last = loop.generate(teacher.unet, ready(teacher, resolve(teacher, asked)[0]))
        latents, sizes, _ = dataset.pictures.row(0, place, 1)
        assert sizes.tolist() == [64, 64, 0, 0]
        torch.testing.assert_close(latents.float(), last.x[0], atol=5e-3, rtol=5e-3)
    assert dataset.samples(0, 0, 3).latents.shape == (3, 4, 8, 8)
    before = files(cache)
    with monkeypatch.context() as patch:
        patch.setattr(drawn.DrawnCache, "_draw", lambda *_: pytest.fail("drawn again"))
        made(parts, source, cache, **settings)
    made(parts, source, cache, **settings | {"teacher_steps": 2})
    assert files(cache).keys() > before.keys()


def test_a_long_prompt_beside_others_changes_nothing(sd15: Parts, tmp_path: Path) -> None:
    long = "a red fox in the snow " * 30
    settings: dict[str, Any] = {"teacher_steps": 2, "validation_steps": 0}
    both = made(sd15, prompts(tmp_path, "a cat", long), tmp_path / "both", **settings)
    alone = made(sd15, prompts(tmp_path, "a cat"), tmp_path / "alone", **settings)
    one, other = (each.pictures.row(0, 0, 0)[0].float() for each in (both, alone))
    torch.testing.assert_close(one, other, atol=5e-3, rtol=5e-3)


def test_held_out_prompts_are_not_drawn(sd15: Parts, tmp_path: Path) -> None:
    lines = [f"a fox {i}" for i in range(30)]
    source = prompts(tmp_path, *lines, *lines)
    dataset = made(sd15, source, tmp_path / "cache", validation_samples=3, samples=40, teacher_steps=1)
    assert len(dataset) == 40
    drawn_texts = {example.captions[0] for example in dataset.examples}
    assert len(drawn_texts) == 27
    assert drawn_texts | set(dataset.held_out) == set(lines)
    assert not dataset.held_out_is_seen


def test_prompts_cannot_train_inpainting(inpainting: Parts, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prompts alone cannot train an inpainting model"):
        made(inpainting, prompts(tmp_path, "a fox"), tmp_path / "cache")


def test_nothing_is_warned_of_without_cause(sd15: Parts, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(sd15, write_pictures(tmp_path / "data", SIZES), tmp_path / "cache")
