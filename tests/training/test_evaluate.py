"""`calotype eval` on tiny random models: the pictures it draws, the cache, the table, the command."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapters
import calotype
from calotype import cli
from calotype.errors import OutputError, UsageError
from calotype.parts import Parts
from calotype.sampling import grid_for
from calotype.training import draw as drawing
from calotype.training import evaluate as module
from calotype.training.clip import Judge
from calotype.training.draw import Series, cached, draw, fingerprint
from calotype.training.evaluate import Progress, Table, evaluate
from calotype.training.memory import PEAK_RESET, peak
from calotype.weights.load import load_parts
from checkpoints import write_clip

PROMPTS = ("a fox", "red cat in the snow", "", "a dog", "astronaut")


@pytest.fixture(scope="module")
def teacher(tiny_sd15: Path) -> Parts:
    return load_parts(tiny_sd15)


@pytest.fixture(scope="module")
def student(tiny_sd15_lcm: Path) -> Parts:
    return load_parts(tiny_sd15_lcm)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher of 4 steps instead of 50, shards of 2 pictures."""
    monkeypatch.setattr(module, "TEACHER_STEPS", 4)
    monkeypatch.setattr(drawing, "SHARD", 2)


# ---- drawing many prompts at a time ----


@pytest.mark.parametrize(
    ("model", "sampler", "guidance"),
    [
        ("tiny_sd15_lcm", "lcm", 6.0),
        ("tiny_sd15", "ddim", 5.0),
        ("tiny_sd15", "ddim", 1.0),
        ("tiny_sdxl", "euler", 5.0),
    ],
)
def test_each_picture_is_the_engines(model: str, sampler: str, guidance: float, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    engine = calotype.load(folder)
    grid = grid_for(sampler, engine.parts.schedule, 3)
    drawn = draw(engine.parts, PROMPTS, range(5), sampler, grid, guidance)
    for i, prompt in enumerate(PROMPTS):
        alone = engine(prompt, seed=i, steps=3, sampler=sampler, guidance=guidance).image
        difference = np.abs(np.asarray(alone).astype(int) - drawn[i].permute(1, 2, 0).numpy())
        assert difference.max() <= 1
    assert len({picture.numpy().tobytes() for picture in drawn}) == 5


def test_a_prompt_of_two_chunks_may_stand_beside_a_short_one(teacher: Parts) -> None:
    long = "a fox in the snow of the dog " * 20
    grid = grid_for("ddim", teacher.schedule, 2)
    together = draw(teacher, ["a fox", long], [0, 1], "ddim", grid, 4.0)
    alone = draw(teacher, [long], [1], "ddim", grid, 4.0)
    assert (together[1].int() - alone[0].int()).abs().max() <= 1


# ---- the cache ----


def series(parts: Parts, **changes: object) -> Series:
    whole = Series(parts, "ddim", 2, 4.0, PROMPTS, tuple(range(5)))
    return replace(whole, **changes)  # type: ignore[arg-type]


def pictures(of: Series, folder: Path | None, batch: int = 2) -> Tensor:
    return torch.cat([piece.pictures for piece in cached(of, batch, folder, fingerprint(of.parts))])


def count_drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The seeds of each call of `draw` from now on."""
    drawn: list[tuple[int, ...]] = []
    original = Series.draw

    def counted(self: Series) -> Tensor:
        drawn.append(self.seeds)
        return original(self)

    monkeypatch.setattr(Series, "draw", counted)
    return drawn


@pytest.mark.usefixtures("short")
def test_what_was_drawn_is_read_the_second_time(
    teacher: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pictures(series(teacher), tmp_path)
    assert torch.equal(first, pictures(series(teacher), None))
    assert len(list(tmp_path.iterdir())) == 3  # 2 + 2 + 1 pictures
    drawn = count_drawn(monkeypatch)
    assert torch.equal(first, pictures(series(teacher), tmp_path, batch=1))
    assert drawn == []
    longer = series(teacher, prompts=(*PROMPTS[:4], "a fox", "a cat"), seeds=(0, 1, 2, 3, 8, 9))
    pictures(longer, tmp_path)
    assert drawn == [(8, 9)]


@pytest.mark.usefixtures("short")
def test_an_interrupted_run_goes_on(teacher: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cached(series(teacher), 2, tmp_path, fingerprint(teacher))
    next(run)
    next(run)
    run.close()
    drawn = count_drawn(monkeypatch)
    pictures(series(teacher), tmp_path)
    assert drawn == [(4,)]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("damage", [lambda data: data[:-10], lambda data: b"", lambda data: b"x" * 100])
def test_a_damaged_file_is_drawn_anew(damage: Callable[[bytes], bytes], teacher: Parts, tmp_path: Path) -> None:
    first = pictures(series(teacher), tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(damage(file.read_bytes()))
    assert torch.equal(first, pictures(series(teacher), tmp_path))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "changes",
    [{"steps": 3}, {"guidance": 4.5}, {"sampler": "euler"}, {"seeds": (5, 6, 7, 8, 9)}, {"prompts": ("a",) * 5}],
)
def test_other_pictures_have_other_names(changes: dict[str, object], teacher: Parts, tmp_path: Path) -> None:
    pictures(series(teacher), tmp_path)
    pictures(series(teacher, **changes), tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_the_fingerprint_sees_every_weight_and_the_schedule(tiny_sd15: Path) -> None:
    def changed(network: str) -> str:
        parts = load_parts(tiny_sd15)
        module = parts.text.models[0] if network == "text" else getattr(parts, network)
        with torch.no_grad():
            next(iter(module.parameters())).view(-1)[0] += 1
        return fingerprint(parts)

    parts = load_parts(tiny_sd15)
    trailing = replace(parts, schedule=replace(parts.schedule, spacing="trailing"))
    prints = [fingerprint(parts), fingerprint(trailing), *map(changed, ("unet", "vae", "text"))]
    assert len(set(prints)) == 5
    parts.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert fingerprint(parts) == fingerprint(load_parts(tiny_sd15))


def test_networks_with_channels_last_can_be_cached(tiny_sd15: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_sd15)
    parts.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert pictures(series(parts), tmp_path).shape == (5, 3, 64, 64)


def test_a_cache_that_cannot_be_written_is_named(teacher: Parts, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the cache"):
        pictures(series(teacher), tmp_path / "file" / "cache")


@pytest.mark.usefixtures("short")
def test_a_failed_write_leaves_nothing(teacher: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        pictures(series(teacher), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- the table ----


def run(student: Parts, teacher: Parts, **options: object) -> tuple[list[Progress], Table]:
    *events, table = evaluate(student, teacher, PROMPTS, batch=2, **options)  # type: ignore[arg-type]
    assert isinstance(table, Table)
    return [event for event in events if isinstance(event, Progress)], table


@pytest.mark.usefixtures("short")
def test_the_rows_are_the_floor_the_student_and_the_teacher(student: Parts, teacher: Parts, tmp_path: Path) -> None:
    events, table = run(student, teacher, steps=(1, 4), guidances=(3.0,), cache=tmp_path)
    names = ["student, 1 step", "student, 4 steps", "teacher, 1 step", "teacher, 4 steps"]
    assert [row.name for row in table.rows] == ["teacher, other seeds", *names]
    assert [row.sampler for row in table.rows] == ["ddim", "lcm", "lcm", "ddim", "ddim"]
    assert list(table.examples) == ["teacher, 4 steps", *names[:3]]  # here the teacher's aim has 4 steps too
    floor, same = table.rows[0], table.rows[-1]
    assert (floor.above_floor.value, floor.above_floor.error) == (0, 0)
    assert floor.paired.value > 0
    assert same.distance.value == pytest.approx(0, abs=1e-9)  # the same steps and seeds: the same pictures
    assert same.paired.value == pytest.approx(0, abs=1e-3)
    for row in table.rows:
        assert row.above_floor.value == row.distance.value - floor.distance.value
        assert row.seconds > 0
    assert table.rows[1].paired.value > 0
    assert [row.evaluations for row in table.rows] == [8, 1, 4, 2, 8]
    assert [row.model for row in table.rows] == ["floor", "student", "student", "teacher", "teacher"]
    assert {(row.guidance, row.teacher_guidance) for row in table.rows} == {(3.0, 3.0)}
    (target,) = table.targets
    assert (target.name, target.steps, target.guidance, table.samples) == ("teacher, 4 steps", 4, 3.0, 5)
    assert events[0] == Progress("teacher, 4 steps", 0, 5)
    assert [event.done for event in events if event.stage == "student, 1 step"] == [0, 2, 4, 5]


@pytest.mark.usefixtures("short")
def test_the_teacher_has_trailing_spacing_whatever_its_config_says(student: Parts, teacher: Parts) -> None:
    assert teacher.schedule.spacing == "leading"
    _, table = run(student, teacher, steps=(1,), guidances=(3.0,))
    trailing = replace(teacher, schedule=replace(teacher.schedule, spacing="trailing"))
    expected = draw(trailing, PROMPTS, range(5), "ddim", [999], 3.0)
    assert (table.examples["teacher, 1 step"].int() - expected.int()).abs().max() <= 1


@pytest.mark.usefixtures("short")
def test_a_guidance_that_is_left_open_is_the_students(student: Parts, teacher: Parts) -> None:
    own = replace(student, defaults=replace(student.defaults, guidance=2.5))
    assert run(own, teacher, steps=(1,))[1].targets[0].guidance == 2.5


def test_what_cannot_be_compared_is_refused_before_anything_is_drawn(
    student: Parts, teacher: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = count_drawn(monkeypatch)
    large = replace(teacher, defaults=replace(teacher.defaults, width=128))
    with pytest.raises(UsageError, match="64x64 and the teacher 128x64"):
        next(evaluate(student, large, PROMPTS))
    with pytest.raises(UsageError, match="2 prompts"):
        next(evaluate(student, teacher, PROMPTS[:2]))
    with pytest.raises(UsageError, match="steps is 51: allowed are 1 to 50"):
        next(evaluate(student, teacher, PROMPTS, steps=(1, 51)))
    with pytest.raises(UsageError, match="2 guidances of the teacher's for 1 of the model's"):
        next(evaluate(student, teacher, PROMPTS, guidances=(1.0,), teacher_guidances=(4.0, 8.0)))
    with pytest.raises(UsageError, match="2 guidances of the teacher's for 3 of the model's"):
        next(evaluate(student, teacher, PROMPTS, guidances=(1.0, 2.0, 3.0), teacher_guidances=(4.0, 8.0)))
    with pytest.raises(UsageError, match="sampler is 'dpm'"):
        next(evaluate(student, teacher, PROMPTS, samplers=("lcm", "dpm")))
    assert drawn == []


@pytest.mark.usefixtures("short")
def test_every_combination_is_a_row(student: Parts, teacher: Parts, tmp_path: Path) -> None:
    options = {"samplers": ("lcm", "tcd"), "guidances": (2.0, 5.0)}
    _, table = run(student, teacher, steps=(1, 2), cache=tmp_path, **options)
    told = [(row.model, row.sampler, row.guidance, row.steps, row.teacher_guidance) for row in table.rows]
    expected = []
    for g in (2.0, 5.0):
        expected.append(("floor", "ddim", g, 4, g))
        expected += [("student", sampler, g, n, g) for sampler in ("lcm", "tcd") for n in (1, 2)]
        expected += [("teacher", "ddim", g, n, g) for n in (1, 2)]
    assert told == expected
    assert [target.guidance for target in table.targets] == [2.0, 5.0]
    names = [*(target.name for target in table.targets), *(row.name for row in table.rows)]
    assert len(set(names)) == len(names)
    assert table.rows[3].name == "student, tcd, guidance 2, 1 step"
    assert table.rows[7].name == "teacher, guidance 5, other seeds"
    # A row is the same number, whatever stands beside it.
    _, alone = run(student, teacher, steps=(2,), samplers=("tcd",), guidances=(5.0,), cache=tmp_path)
    same = next(row for row in table.rows if row.name == "student, tcd, guidance 5, 2 steps")
    assert alone.rows[1].distance.value == pytest.approx(same.distance.value, abs=1e-6)
    assert alone.rows[1].above_floor.value == pytest.approx(same.above_floor.value, abs=1e-6)


@pytest.mark.usefixtures("short")
def test_a_student_whose_guidance_is_its_own_stands_beside_a_guided_teacher(teacher: Parts, tmp_path: Path) -> None:
    _, table = run(teacher, teacher, steps=(2,), samplers=("lcm",), guidances=(1.0, 2.0), teacher_guidances=(4.0,))
    assert [(row.name, row.guidance, row.teacher_guidance, row.evaluations) for row in table.rows] == [
        ("teacher, other seeds", 4.0, 4.0, 8),
        ("student, guidance 1, 2 steps", 1.0, 4.0, 2),
        ("student, guidance 2, 2 steps", 2.0, 4.0, 4),
        ("teacher, 2 steps", 4.0, 4.0, 4),
    ]
    _, table = run(teacher, teacher, steps=(2,), samplers=("lcm",), guidances=(1.0, 1.0), teacher_guidances=(3.0, 4.0))
    assert [(row.name, row.guidance, row.teacher_guidance) for row in table.rows if row.model == "student"] == [
        ("student, teacher at 3, 2 steps", 1.0, 3.0),
        ("student, teacher at 4, 2 steps", 1.0, 4.0),
    ]


@pytest.mark.parametrize(
    ("model", "guidance", "expected"), [("tiny_sd15", 1.0, 3), ("tiny_sd15", 4.0, 6), ("tiny_sd15_lcm", 4.0, 3)]
)
def test_evaluations_are_those_that_the_network_sees(
    model: str, guidance: float, expected: int, request: pytest.FixtureRequest
) -> None:
    parts, rows = load_parts(request.getfixturevalue(model)), []
    parts.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    three = series(parts, steps=3, guidance=guidance)
    three.draw()
    assert three.evaluations == sum(rows) / len(PROMPTS) == expected


# ---- memory ----


def can_tell() -> bool:
    """Whether this system lets a process reset the peak of its memory."""
    try:
        PEAK_RESET.write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not can_tell(), reason="no /proc/self/clear_refs")
@pytest.mark.parametrize("pieces", [1, 400])
def test_the_peak_of_memory_is_what_was_held_at_once(pieces: int) -> None:
    last = []  # what stays, behind all that is freed: the heap can't shrink by itself, and would hide the next growth
    for _ in range(3):
        with peak(torch.device("cpu")) as memory:
            held = [torch.ones(10_000_000 // pieces) for _ in range(pieces)]
            last.append(torch.ones(1000))
            del held
        assert memory.bytes is not None
        assert 38e6 < memory.bytes < 60e6


def test_memory_that_nobody_can_tell_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("calotype.training.memory.PEAK_RESET", tmp_path / "nowhere" / "clear_refs")
    with peak(torch.device("cpu")) as memory:
        pass
    assert memory.bytes is None


@pytest.mark.skipif(not can_tell(), reason="no /proc/self/clear_refs")
@pytest.mark.usefixtures("short")
def test_rows_have_the_memory_of_drawing_and_the_cache_keeps_it(teacher: Parts, tmp_path: Path) -> None:
    first = run(teacher, teacher, steps=(1,), cache=tmp_path)[1]
    assert all(row.memory is not None and row.memory >= 0 for row in first.rows)
    again = run(teacher, teacher, steps=(1,), cache=tmp_path)[1]
    assert again.targets[0].memory == first.targets[0].memory
    assert again.rows[0].memory == first.rows[0].memory


@pytest.mark.usefixtures("short")
def test_the_cache_of_an_older_version_is_read(teacher: Parts, tmp_path: Path) -> None:
    first = pictures(series(teacher), tmp_path)
    for file in tmp_path.iterdir():
        tensors = {name: t.clone() for name, t in load_file(file).items() if name != "memory"}
        file.unlink()
        save_file(tensors, file)
    pieces = list(cached(series(teacher), 2, tmp_path, fingerprint(teacher)))
    assert [piece.memory for piece in pieces] == [None] * 3
    assert torch.equal(first, torch.cat([piece.pictures for piece in pieces]))


# ---- CLIP ----


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.mark.usefixtures("short")
def test_a_clip_judges_every_set(student: Parts, teacher: Parts, clip: Path, tmp_path: Path) -> None:
    judge = Judge.load(clip, torch.device("cpu"))
    _, plain = run(student, teacher, steps=(1, 4), guidances=(3.0,), cache=tmp_path)
    _, table = run(student, teacher, steps=(1, 4), guidances=(3.0,), cache=tmp_path, judge=judge)
    assert plain.targets[0].clip_score is None
    assert {(row.clip_score, row.fid_clip) for row in plain.rows} == {(None, None)}
    texts, target = judge.texts(PROMPTS), table.targets[0]
    for drawn in (target, *table.rows):
        assert drawn.clip_score is not None
        assert 0 <= drawn.clip_score.value <= 100
        pixels = table.examples.get(drawn.name)
        if pixels is not None and drawn.name != target.name:
            cosines = F.cosine_similarity(texts, judge.pictures(pixels)).clamp(min=0)
            assert drawn.clip_score.value == pytest.approx(100 * float(cosines.mean()), abs=1e-3)
    distances = [row.fid_clip for row in table.rows]
    assert distances[-1] == pytest.approx(0, abs=1e-6)  # the same pictures
    assert all(distance is not None and distance > 1e-4 for distance in distances[:-1])
    for row, other in zip(table.rows, plain.rows, strict=True):
        assert row.distance.value == pytest.approx(other.distance.value, abs=1e-9)


# ---- the command ----


@pytest.fixture
def arguments(tiny_sd15: Path, tiny_sd15_lcm: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "some.txt").write_text("a fox\n\nred cat\na dog\n")
    options = ["--teacher", tiny_sd15, "--prompts", tmp_path / "some.txt", "--cache", tmp_path / "cache", "--offline"]
    more = ["--samples", "4", "--steps", "2,1", "--guidance", "3", "--batch", "3"]
    return ["eval", *map(str, [tiny_sd15_lcm, *options]), *more]


@pytest.mark.usefixtures("short")
def test_the_command_prints_a_table_and_draws_a_grid(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, "-o", str(tmp_path / "grid.png")]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "4 prompts, 3 at a time, against the teacher's pictures in 4 DDIM steps"
    assert lines[4].split() == ["pictures", "evals", "distance", "above", "floor", "by", "picture", "s", "MB"]
    assert lines[5].startswith("against the teacher at guidance 3: 4 steps, 8 evals, ")
    tried = ["  1 step", "  2 steps"]
    titles = ("student: lcm, guidance 3", "teacher: ddim, guidance 3")
    names = [line if ":" in line else line[:13].rstrip() for line in lines[6:]]
    assert names == ["  other seeds", titles[0], *tried, titles[1], *tried]
    assert len({len(line) for line in [lines[4], *(line for line in lines[6:] if ":" not in line)]}) == 1
    assert max(map(len, lines)) <= 100
    assert err == ""
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 3 * 64
        assert grid.height > 4 * 64


@pytest.mark.usefixtures("short")
def test_the_command_prints_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert (table["samples"], table["guidance"], len(table["rows"])) == (4, 3.0, 5)
    student = table["rows"][1]
    assert (student["name"], student["sampler"], student["steps"]) == ("student, 1 step", "lcm", 1)
    assert student["distance"]["error"] > 0
    assert (student["evaluations"], student["model"], student["teacher_guidance"]) == (1, "student", 3.0)
    assert {"memory", "seconds", "guidance"} <= student.keys()
    assert student["clip_score"] is student["fid_clip"] is None
    (target,) = table["targets"]
    assert (target["guidance"], target["evaluations"], table["teacher_seconds"]) == (3.0, 8, target["seconds"])


@pytest.mark.usefixtures("short")
def test_the_command_tries_all_that_is_listed(
    arguments: list[str], clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--sampler", "lcm, tcd", "--guidance", "2,5", "--teacher-guidance", "4", "--clip", str(clip)]
    assert cli.main([*arguments, *options, "-o", str(tmp_path / "grid.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "evals distance above floor by picture s MB CLIP FID" in " ".join(lines[5].split())
    assert max(map(len, lines)) <= 100
    titles = [line for line in lines if line.startswith(("student", "teacher"))]
    expected = [f"student: {sampler}, guidance {g}" for sampler in ("lcm", "tcd") for g in (2, 5)]
    assert titles == [*expected, "teacher: ddim, guidance 4"]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 9 * 64  # 2 samplers x 2 guidances x 2 steps, and the teacher


@pytest.fixture
def lora(tiny_sd15: Path, tmp_path: Path) -> Path:
    attention = adapters.chosen(adapters.layers(load_parts(tiny_sd15).unet), ("to_q", "to_v"))
    return adapters.save(
        tmp_path / "lora" / "lora.safetensors", adapters.peft_names(adapters.low_rank(attention), "unet.")
    )


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main([*arguments, "--json"]) == 0
    table: dict[str, Any] = json.loads(capsys.readouterr().out)
    return table


@pytest.mark.usefixtures("short")
def test_a_lora_changes_the_model_and_not_the_teacher(
    arguments: list[str], tiny_sd15: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["eval", str(tiny_sd15), *arguments[2:], "--sampler", "ddim"]
    plain, files = told(own, capsys), sorted((tmp_path / "cache").iterdir())
    changed, half = (told([*own, "--lora", ref], capsys) for ref in (str(lora), f"{lora}:0.5"))
    assert sorted((tmp_path / "cache").iterdir()) == files  # the teacher's pictures are named by its weights
    distances = [[row["distance"]["value"] for row in table["rows"]] for table in (plain, changed, half)]
    for one, other in itertools.combinations(distances, 2):
        assert one[0] == other[0]
        assert one[3:] == pytest.approx(other[3:], abs=1e-9)
        assert abs(one[1] - other[1]) > 1e-6
        assert abs(one[2] - other[2]) > 1e-6


@pytest.mark.usefixtures("short")
def test_a_distilled_lora_says_how_it_is_measured(
    arguments: list[str], tiny_sd15: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newer = {"w_min": 0, "w_max": 0, "sampler": "lcm"}, {"w_min": 3.0, "w_max": 9.0, "sampler": "tcd"}
    (lora.parent / "training.json").write_text(json.dumps([older, newer]))
    at = arguments.index("--guidance")
    own = ["eval", str(tiny_sd15), *arguments[2:at], *arguments[at + 2 :], "--lora", str(lora)]
    by_file = told(own, capsys)["rows"][1]
    assert (by_file["sampler"], by_file["guidance"], by_file["teacher_guidance"]) == ("tcd", 1.0, 7.0)
    said = told([*own, "--sampler", "lcm", "--guidance", "2", "--teacher-guidance", "5"], capsys)["rows"][1]
    assert (said["sampler"], said["guidance"], said["teacher_guidance"]) == ("lcm", 2.0, 5.0)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '[{"w_min": 1}]', '[{"w_min": "x", "w_max": 1, "sampler": "lcm"}]'])
def test_a_training_file_that_says_nothing_is_named(
    text: str, arguments: list[str], lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (lora.parent / "training.json").write_text(text)
    assert cli.main([*arguments, "--lora", str(lora)]) == 2
    assert "training.json' is not what calotype distill writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (["--steps", "1,x"], 2, "--steps must be"),
        (["--steps", "0"], 2, "steps is 0"),
        (["--guidance", "nan"], 2, "guidance"),
        (["--guidance", "4,"], 2, "--guidance must be numbers with commas between them, not '4,'"),
        (["--teacher-guidance", "x"], 2, "--teacher-guidance must be numbers"),
        (["--teacher-guidance", "101"], 2, "guidance is 101"),
        (["--teacher-guidance", "4,8"], 2, "2 guidances of the teacher's for 1 of the model's"),
        (["--sampler", "lcm,dpm"], 2, "sampler is 'dpm'"),
        (["--lora", "no-such-lora.safetensors"], 3, "no-such-lora.safetensors"),
        (["--clip", "no-such-clip"], 1, "no-such-clip"),
        (["--samples", "2"], 2, "samples"),
        (["--prompts", "nowhere.txt"], 2, "cannot read the prompts 'nowhere.txt'"),
        (["--teacher", "no-such-folder"], 3, "no-such-folder"),
        (["-o", "grid.bmp"], 2, ".png"),
    ],
)
def test_bad_options_are_told_in_a_line(
    arguments: list[str], changes: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, *changes]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err.splitlines()[0]


def test_prompts_lie_in_or_beside_the_teachers_folder(tmp_path: Path) -> None:
    from calotype.cli.evaluate import find_prompts, read_prompts

    teacher = tmp_path / "teacher"
    teacher.mkdir()
    with pytest.raises(UsageError, match=r"no prompts\.txt"):
        find_prompts(str(teacher), None)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    assert find_prompts(str(teacher)) == tmp_path / "prompts.txt"
    (teacher / "prompts.txt").write_text(" three \n\n")
    assert find_prompts(None, str(teacher)) == teacher / "prompts.txt"
    assert read_prompts(tmp_path / "prompts.txt", 5) == ["one", "two", "one", "two", "one"]
    assert read_prompts(teacher / "prompts.txt", 1) == ["three"]
    (teacher / "prompts.txt").write_text("\n \n")
    with pytest.raises(UsageError, match="holds no prompts"):
        read_prompts(teacher / "prompts.txt", 1)
    (teacher / "prompts.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_prompts(teacher / "prompts.txt", 1)


def test_a_thousand_prompts_come_with_the_recipe() -> None:
    prompts = (Path(__file__).parents[2] / "recipes" / "icons" / "prompts.txt").read_text("utf-8").splitlines()
    assert len(prompts) == len(set(prompts)) == 1000
