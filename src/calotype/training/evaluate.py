"""How far few-step pictures are from the teacher's 50-step ones: what `calotype eval` runs.

The measure is the kernel distance of calotype.training.distance on the features of calotype.training.features; beside
it stand what the pictures cost, and what a CLIP says of them where the user has one.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from calotype.errors import UsageError
from calotype.parts import Parts
from calotype.training.clip import Judge, clip_score
from calotype.training.distance import Estimate, frechet, kid, paired_distance
from calotype.training.draw import Series, cached, fingerprint
from calotype.training.features import FeatureNet, features, load_features

__all__ = ["Drawn", "Progress", "Row", "Table", "evaluate"]

TEACHER_STEPS = 50
OTHER_SEEDS = 1_000_000  # from the seeds of the teacher's pictures to those of its second set, the floor
EXAMPLES = 16  # pictures of each set that are kept to be looked at


@dataclass(frozen=True)
class Progress:
    stage: str
    done: int  # pictures
    total: int


@dataclass(frozen=True)
class Drawn:
    """One set of pictures, and what they cost. Those of the teacher may have been drawn earlier, or elsewhere."""

    name: str  # unlike all others of its table
    sampler: str
    steps: int
    guidance: float
    evaluations: int  # of the network, for a picture
    seconds: float  # a picture
    memory: int | None  # bytes at the peak of drawing a batch, beyond the models' weights; None: nobody can tell
    clip_score: Estimate | None  # None without a CLIP

    def to_json(self) -> dict[str, object]:
        """Every field by its name; an estimate as its value and error."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _plain(value) if isinstance(value, Estimate) else value for name, value in values.items()}


def _plain(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "error": estimate.error}


@dataclass(frozen=True)
class Row(Drawn):
    """A set of pictures against the teacher's, over the same prompts."""

    model: str  # "student", "teacher", or "floor": the teacher with other seeds
    teacher_guidance: float  # of the pictures that it is compared with
    distance: Estimate  # kernel distance
    above_floor: Estimate  # the same less the floor's
    paired: Estimate  # mean distance of each picture to the teacher's of the same prompt and, but for the floor, seed
    fid_clip: float | None  # Frechet distance of CLIP's embeddings; None without a CLIP


@dataclass(frozen=True, eq=False)
class Table:
    """The result: the references, the rows, the floors among them, and the first pictures of each set."""

    targets: tuple[Drawn, ...]  # the teacher's pictures that all others are compared with, for each of its guidances
    rows: tuple[Row, ...]
    samples: int
    batch: int
    examples: dict[str, Tensor]  # by the name of a target or row (at most EXAMPLES, 3, H, W)

    def to_json(self) -> dict[str, object]:
        """All numbers. `guidance` and `teacher_seconds` are the first target's, for readers that expect only one."""
        first = self.targets[0]
        return {
            "samples": self.samples,
            "batch": self.batch,
            "guidance": first.guidance,
            "teacher_steps": first.steps,
            "teacher_seconds": first.seconds,
            "targets": [target.to_json() for target in self.targets],
            "rows": [row.to_json() for row in self.rows],
        }


def evaluate(
    student: Parts,
    teacher: Parts,
    prompts: Sequence[str],
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    samplers: Sequence[str] = (),
    guidances: Sequence[float] = (),
    teacher_guidances: Sequence[float] = (),
    seed: int = 0,
    batch: int = 20,
    cache: Path | None = None,
    judge: Judge | None = None,
) -> Iterator[Progress | Table]:
    """Draws everything and compares it; yields Progress and, last of all, the Table.

    The teacher draws `prompts` in 50 DDIM steps with seeds `seed`, `seed` + 1, ... and once more with other seeds: how
    far those two sets are apart is the floor. Then the student by each of `samplers` (none: its default) at each of
    `guidances` (none: its default), and the teacher by DDIM, draw them in each number of `steps` with the first seeds.
    All at the same size; the teacher's timesteps have trailing spacing. `cache` is a folder for the 50-step pictures;
    an interrupted run goes on from it.

    The teacher's guidance is the student's; or one of `teacher_guidances` for each of the student's, or the same for
    all. So a student that has its guidance in its weights runs at 1, beside a teacher at what it learned from. All
    the teacher's pictures are drawn at each guidance of its own. `judge` adds the columns of a CLIP.

    Raises UsageError for less than 3 prompts, a number of steps beyond the grid, models of different sizes, or another
    number of the teacher's guidances.
    """
    sizes = [f"{parts.defaults.width}x{parts.defaults.height}" for parts in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"the model draws {sizes[0]} and the teacher {sizes[1]} pixels: they must agree")
    if len(prompts) < 3:
        raise UsageError(f"{len(prompts)} prompts: at least 3 are needed")
    pairs = _pairs(guidances or (student.defaults.guidance,), teacher_guidances)
    own = samplers or (student.defaults.sampler,)
    teacher = replace(teacher, schedule=replace(teacher.schedule, spacing="trailing"))
    seeds = tuple(range(seed, seed + len(prompts)))
    base = Series(teacher, "ddim", TEACHER_STEPS, pairs[0][1], tuple(prompts), seeds)
    plan = _plan(base, student, list(dict.fromkeys(own)), pairs, steps)
    for group in plan:
        for series in (group.reference, *(each.series for each in group.candidates)):
            assert series.grid  # every number of steps is allowed: better to know now than in half an hour

    for parts in (student, teacher):  # weights are read and kernels chosen: no row should pay for that
        replace(base, parts=parts, steps=1).shards(batch)[0].draw()
    extractor = _Extractor(load_features(), judge, None if judge is None else judge.texts(prompts), batch)
    model = fingerprint(teacher)
    targets: list[Drawn] = []
    rows: list[Row] = []
    examples: dict[str, Tensor] = {}
    for group in plan:
        reference = yield from extractor.measure(named([group.title], TEACHER_STEPS), group.reference, cache, model)
        floor = yield from extractor.measure(f"{group.title}, other seeds", group.floor, cache, model)
        least = kid(floor.features, reference.features, paired=True)
        targets.append(reference.drawn)
        examples[reference.drawn.name] = reference.examples
        rows.append(_row("floor", floor, reference, least))
        for candidate in group.candidates:
            measured = yield from extractor.measure(candidate.name, candidate.series)
            rows.append(_row(candidate.model, measured, reference, least))
            examples[candidate.name] = measured.examples
    yield Table(tuple(targets), tuple(rows), len(prompts), batch, examples)


# ---- what is drawn ----


@dataclass(frozen=True)
class _Candidate:
    model: str
    name: str
    series: Series


@dataclass(frozen=True)
class _Group:
    """All that is compared with the teacher's pictures at one guidance."""

    title: str  # how the teacher's names begin
    reference: Series
    candidates: list[_Candidate]

    @property
    def floor(self) -> Series:
        return replace(self.reference, seeds=tuple(each + OTHER_SEEDS for each in self.reference.seeds))


def _pairs(own: Sequence[float], teachers: Sequence[float]) -> list[tuple[float, float]]:
    """The student's guidances, each with the teacher's. UsageError where they are not as many."""
    theirs = teachers or own
    if len(theirs) not in (1, len(own)):
        raise UsageError(
            f"{len(theirs)} guidances of the teacher's for {len(own)} of the model's: must be one, or as many",
            hint="the first goes with the first, the second with the second",
        )
    return list(dict.fromkeys(zip(own, theirs if len(theirs) == len(own) else [*theirs] * len(own), strict=True)))


def _plan(
    base: Series, student: Parts, samplers: Sequence[str], pairs: Sequence[tuple[float, float]], steps: Sequence[int]
) -> list[_Group]:
    """The groups, in order. A name says what its set does not share with all others."""
    own, teachers = {pair[0] for pair in pairs}, list(dict.fromkeys(pair[1] for pair in pairs))
    groups = []
    for target in teachers:
        title = f"teacher, guidance {target:g}" if len(teachers) > 1 else "teacher"
        here, candidates = replace(base, guidance=target), []
        for sampler, (guidance, other) in itertools.product(samplers, pairs):
            if other != target:
                continue
            words = ["student"]
            words += [sampler] if len(samplers) > 1 else []
            words += [f"guidance {guidance:g}"] if len(own) > 1 else []
            words += [f"teacher at {target:g}"] if len(teachers) > 1 and guidance != target else []
            series = replace(base, parts=student, sampler=sampler, guidance=guidance)
            candidates += [_Candidate("student", named(words, n), replace(series, steps=n)) for n in steps]
        candidates += [_Candidate("teacher", named([title], n), replace(here, steps=n)) for n in steps]
        groups.append(_Group(title, here, candidates))
    return groups


def named(words: Sequence[str], steps: int) -> str:
    return ", ".join((*words, f"{steps} step{'s' if steps > 1 else ''}"))


# ---- what is measured ----


@dataclass(frozen=True, eq=False)
class _Measured:
    drawn: Drawn
    features: Tensor
    embeddings: Tensor | None  # CLIP's
    examples: Tensor


@dataclass(frozen=True, eq=False)
class _Extractor:
    """Pictures to features."""

    net: FeatureNet
    judge: Judge | None
    texts: Tensor | None  # the judge's embeddings of the prompts
    batch: int

    def measure(
        self, name: str, series: Series, cache: Path | None = None, model: str = ""
    ) -> Generator[Progress, None, _Measured]:
        """Draws a series or reads it from the cache, and keeps its features and first pictures."""
        rows: list[Tensor] = []
        embedded: list[Tensor] = []
        examples: list[Tensor] = []
        memory: list[int | None] = []
        seconds, done, total = 0.0, 0, len(series.prompts)
        yield Progress(name, 0, total)
        for piece in cached(series, self.batch, cache, model):
            rows.append(features(self.net, piece.pictures))
            if self.judge is not None:
                embedded.append(self.judge.pictures(piece.pictures))
            examples.append(piece.pictures[: max(EXAMPLES - done, 0)])
            memory.append(piece.memory)
            seconds, done = seconds + piece.seconds, done + len(piece.pictures)
            yield Progress(name, done, total)
        embeddings = torch.cat(embedded) if embedded else None
        drawn = Drawn(
            name=name,
            sampler=series.sampler,
            steps=series.steps,
            guidance=series.guidance,
            evaluations=series.evaluations,
            seconds=seconds / total,
            memory=max((each for each in memory if each is not None), default=None),
            clip_score=None if embeddings is None or self.texts is None else clip_score(self.texts, embeddings),
        )
        return _Measured(drawn, torch.cat(rows), embeddings, torch.cat(examples))


def _row(model: str, measured: _Measured, reference: _Measured, floor: Estimate) -> Row:
    distance = kid(measured.features, reference.features, paired=True)
    both = (measured.embeddings, reference.embeddings)
    return Row(
        **vars(measured.drawn),
        model=model,
        teacher_guidance=reference.drawn.guidance,
        distance=distance,
        above_floor=distance - floor,
        paired=paired_distance(measured.features, reference.features),
        fid_clip=None if both[0] is None or both[1] is None else frechet(both[0], both[1]),
    )
