"""Training a LoRA: calotype against the loop of diffusers' script, on the same teacher, pictures and batches.

    python benchmarks/distill.py                  # the recipe's base model, 128 pixels, batches of 16
    python benchmarks/distill.py --teacher sd15   # a random Stable Diffusion 1.5, 256 pixels, one picture at a time
    python benchmarks/distill.py --teacher FOLDER --resolution 512 --batch 2 --data FOLDER --gradient-checkpointing

A second row of diffusers has pictures and captions encoded once, as calotype has: how much of the gain that is.
Each side is a process of its own, in turn. A step's time is the median over all passes but the first; memory is the
most that was resident in the whole process (VmHWM). Linux only: that comes from /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from measure import ROOT, ratio, verdict

FASTER, LEANER = 1 / 1.3, 0.75  # targets: a step's time and the peak of memory, calotype / diffusers
OURS, THEIRS, CACHED = "calotype", "diffusers", "diffusers, encoded once"
NO_EXTRAS = {"validation_steps": 0, "aspect_buckets": False}  # the script validates apart, and cuts out squares


@dataclass(frozen=True)
class Plan:
    """What both sides train."""

    teacher: Path
    data: Path
    resolution: int
    batch: int
    rank: int
    steps: int
    checkpointing: bool
    precision: str


@dataclass(frozen=True)
class Run:
    """What one process found."""

    step: float  # median seconds, past the first pass
    processor: float  # the same in seconds of processor time
    encoding: float  # of those, for pictures and captions
    before: float  # seconds of loading, and of encoding where that comes first
    peak: int  # bytes

    @staticmethod
    def of(found: Mapping[str, Any], warm: int) -> Run:
        step, processor, encoding = (median(found[name][warm:]) for name in ("steps", "processor", "encoding"))
        return Run(step, processor, encoding, found["before"], found["peak"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="icons", help="icons, sd15, or a folder in the diffusers layout")
    parser.add_argument("--data", type=Path, help="pictures with a metadata.jsonl; made up where not given")
    parser.add_argument("--resolution", type=int, help="128; sd15: 256")
    parser.add_argument("--batch", type=int, help="16; sd15: 1")
    parser.add_argument("--pictures", type=int, help="how many are made up; two batches where not given")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no", help="on both sides")
    parser.add_argument("--autocast", action="store_true", help="diffusers' teacher and target in bfloat16, as its own")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="a setting of calotype")
    parser.add_argument("--only", nargs="+", choices=["calotype", "diffusers", "cached"], help="not all three")
    parser.add_argument("--json", type=Path, help="everything measured goes there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(**json.loads(args.child))
        return
    with tempfile.TemporaryDirectory() as scratch:
        plan = planned(args, Path(scratch))
        sides = commands(plan, args, Path(scratch))
        found = measured(sides, args.runs)
    warm = max(1, plan.steps // args.epochs)
    results = {name: [Run.of(each, warm) for each in runs] for name, runs in found.items()}
    report(results, plan)
    if args.json is not None:
        described = {name: str(value) if isinstance(value, Path) else value for name, value in vars(plan).items()}
        args.json.write_text(json.dumps({"plan": described, "warm": warm, "runs": found}, indent=2) + "\n")


def planned(args: argparse.Namespace, scratch: Path) -> Plan:
    """What is asked for, with whatever it needs made up."""
    large = args.teacher == "sd15"
    resolution = args.resolution or (256 if large else 128)
    batch = args.batch or (1 if large else 16)
    teacher, data = Path(args.teacher), args.data
    if args.teacher == "icons":
        teacher = ROOT / "recipes/icons/base"
    elif large:
        from calotype.bench.random_model import write

        teacher = scratch / "sd15"
        write("sd15", teacher, lcm=False)
    if data is None:
        data = scratch / "pictures"
        make_up(data, args.pictures or 2 * batch, resolution)
    pictures = len((data / "metadata.jsonl").read_text().splitlines())
    steps = -(-args.epochs * pictures // batch)
    return Plan(teacher, data, resolution, batch, args.rank, steps, args.gradient_checkpointing, args.mixed_precision)


def make_up(folder: Path, count: int, resolution: int) -> None:
    """Pictures of clouds, half as large again as what is trained, so that they have to be scaled."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    generator, side = np.random.default_rng(0), resolution * 3 // 2
    lines = []
    for i in range(count):
        small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"cloud {i} of {count}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def commands(plan: Plan, args: argparse.Namespace, scratch: Path) -> dict[str, list[str]]:
    options: dict[str, Any] = {
        "lora": True,
        "lora_rank": plan.rank,
        "max_train_steps": plan.steps,
        "train_batch_size": plan.batch,
        "resolution": plan.resolution,
        "checkpointing_steps": plan.steps,
        "gradient_checkpointing": plan.checkpointing,
        "mixed_precision": plan.precision,
        **NO_EXTRAS,
    }
    for each in args.option:
        name, value = each.split("=", 1)
        options[name] = json.loads(value)
    whole = {"teacher": str(plan.teacher), "data": str(plan.data), "scratch": str(scratch), "options": options}
    peer = [sys.executable, str(ROOT / "benchmarks/peer_distill.py"), str(plan.teacher), str(plan.data)]
    for name in ("steps", "batch", "resolution", "rank"):
        peer += [f"--{name}", str(getattr(plan, name))]
    peer += ["--mixed-precision", plan.precision]
    peer += ["--gradient-checkpointing"] * plan.checkpointing + ["--autocast"] * args.autocast
    sides = {
        OURS: [sys.executable, __file__, "--child", json.dumps(whole)],
        THEIRS: peer,
        CACHED: [*peer, "--cached"],
    }
    wanted = {"calotype": OURS, "diffusers": THEIRS, "cached": CACHED}
    return {name: sides[name] for name in (wanted[each] for each in args.only or wanted)}


def measured(sides: Mapping[str, Sequence[str]], runs: int) -> dict[str, list[dict[str, Any]]]:
    """What each side printed in each of `runs` rounds of all."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, command in sides.items():
            environment = os.environ | {"HF_HUB_OFFLINE": "1"}
            process = subprocess.run(command, env=environment, capture_output=True, text=True)
            if process.returncode != 0:
                raise RuntimeError(f"{name} failed ({process.returncode}):\n{process.stderr}")
            found[name].append(json.loads(process.stdout.splitlines()[-1]))
    return found


def report(results: Mapping[str, Sequence[Run]], plan: Plan) -> None:
    """A table of medians, each with its ratio to the same of diffusers' loop; and whether the targets are met."""
    how = f"{plan.resolution} pixels, batches of {plan.batch}, rank {plan.rank}"
    how += ", bfloat16" * (plan.precision == "bf16") + ", gradient checkpointing" * plan.checkpointing
    print(f"{plan.teacher.name}: {how}")
    print(f"{'':24} samples/s   step s   ratio  processor s   ratio  encoding s  before s  peak GB   ratio")
    reference = results.get(THEIRS) or next(iter(results.values()))
    for name, runs in results.items():
        step, processor, encoding, before, peak = (
            median(getattr(run, field) for run in runs) for field in ("step", "processor", "encoding", "before", "peak")
        )
        times = f"{plan.batch / step:9.3f} {step:8.3f} {compared(runs, reference, 'step'):7.3f}"
        works = f"{processor:12.3f} {compared(runs, reference, 'processor'):7.3f}"
        sizes = f"{peak / 1e9:8.3f} {compared(runs, reference, 'peak'):7.3f}"
        print(f"{name:24} {times} {works} {encoding:11.3f} {before:9.2f} {sizes}")
    if OURS in results and THEIRS in results:
        for what, field, target in (("time of a step", "processor", FASTER), ("peak of memory", "peak", LEANER)):
            verdict(f"{what}, calotype / diffusers", compared(results[OURS], results[THEIRS], field), target)


def compared(runs: Sequence[Run], others: Sequence[Run], field: str) -> float:
    return ratio([getattr(run, field) for run in runs], [getattr(run, field) for run in others])


# ---- our side, in a process of its own ----


def child(teacher: str, data: str, scratch: str, options: Mapping[str, Any]) -> None:
    """Prints what the peer prints. A step is the time from one report of the trainer to the next."""
    import calotype

    record: dict[str, list[float]] = {"steps": [], "processor": [], "encoding": [], "losses": []}
    began = wall = time.perf_counter()
    processor, before = time.process_time(), 0.0
    with tempfile.TemporaryDirectory(dir=scratch) as output:
        for step in calotype.distill(teacher, data, output, **options):
            wall, since = time.perf_counter(), wall
            processor, worked_since = time.process_time(), processor
            if step.stage == "train":
                record["steps"].append(wall - since)
                record["processor"].append(processor - worked_since)
                record["encoding"].append(0.0)
                record["losses"].append(step.loss)
            elif not record["steps"]:
                before = wall - began
    print(json.dumps({"before": before, "peak": peak_resident(), **record}))


def peak_resident() -> int:
    """The most bytes of this process that were ever in memory."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
