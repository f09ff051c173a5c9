"""`calotype eval` on tiny random models: the pictures it draws, the cache, the table, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import calotype
from calotype import cli
from calotype.errors import OutputError, UsageError
from calotype.parts import Parts
from calotype.sampling import grid_for
from calotype.training import evaluate as module
from calotype.training.evaluate import Progress, Series, Table, cached, draw, evaluate, fingerprint
from calotype.weights.load import load_parts

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
    monkeypatch.setattr(module, "SHARD", 2)


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
    return torch.cat([piece for piece, _ in cached(of, batch, folder, fingerprint(of.parts))])


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
    with pytest.raises(OutputError, match="No space left"):
        pictures(series(teacher), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- the table ----


def run(student: Parts, teacher: Parts, **options: object) -> tuple[list[Progress], Table]:
    *events, table = evaluate(student, teacher, PROMPTS, batch=2, **options)  # type: ignore[arg-type]
    assert isinstance(table, Table)
    return [event for event in events if isinstance(event, Progress)], table


@pytest.mark.usefixtures("short")
def test_the_rows_are_the_floor_the_student_and_the_teacher(student: Parts, teacher: Parts, tmp_path: Path) -> None:
    events, table = run(student, teacher, steps=(1, 4), guidance=3.0, cache=tmp_path)
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
    assert (table.samples, table.guidance) == (5, 3.0)
    assert events[0] == Progress("teacher, 4 steps", 0, 5)
    assert [event.done for event in events if event.stage == "student, 1 step"] == [0, 2, 4, 5]


@pytest.mark.usefixtures("short")
def test_the_teacher_has_trailing_spacing_whatever_its_config_says(student: Parts, teacher: Parts) -> None:
    assert teacher.schedule.spacing == "leading"
    _, table = run(student, teacher, steps=(1,), guidance=3.0)
    trailing = replace(teacher, schedule=replace(teacher.schedule, spacing="trailing"))
    expected = draw(trailing, PROMPTS, range(5), "ddim", [999], 3.0)
    assert (table.examples["teacher, 1 step"].int() - expected.int()).abs().max() <= 1


@pytest.mark.usefixtures("short")
def test_a_guidance_that_is_left_open_is_the_students(student: Parts, teacher: Parts) -> None:
    own = replace(student, defaults=replace(student.defaults, guidance=2.5))
    assert run(own, teacher, steps=(1,))[1].guidance == 2.5


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
    assert drawn == []


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
    assert lines[0].startswith("4 prompts at guidance 3, against the teacher's pictures in 4 DDIM steps")
    names = [line[:20].strip() for line in lines[4:]]
    tried = [f"{who}, {count}" for who in ("student", "teacher") for count in ("1 step", "2 steps")]
    assert names == ["teacher, other seeds", *tried]
    assert len({len(line) for line in lines[3:]}) == 1
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


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (["--steps", "1,x"], 2, "--steps must be"),
        (["--steps", "0"], 2, "steps is 0"),
        (["--guidance", "nan"], 2, "guidance"),
        (["--samples", "2"], 2, "samples"),
        (["--prompts", "nowhere.txt"], 2, "cannot read the prompts 'nowhere.txt'"),
        (["--teacher", "no-such-folder"], 3, "no-such-folder"),
        (["-o", "grid.jpg"], 2, ".png"),
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
