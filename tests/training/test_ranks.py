"""Two processes train as one does: the same numbers, and each can go on from the other's checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import calotype

SCRIPT = Path(__file__).with_name("run_ranks.py")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


def start(world: int, *arguments: str | Path, by: tuple[str, ...] = TORCHRUN) -> subprocess.Popen[str]:
    launcher = by if world == 2 else ()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(
    world: int, model: Path, out: Path, *arguments: str | Path, by: tuple[str, ...] = TORCHRUN
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a run, and all its tensors at the end."""
    process = start(world, model, out, *arguments, by=by)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    result = json.loads(out.read_text())
    assert result["world"] == world
    return result["losses"], load_file(out.with_suffix(".safetensors"))


def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], kinds: tuple[str, ...]) -> float:
    """The largest difference of the tensors of some kinds, relative to the tensor's largest number."""
    names = [name for name in theirs if name.startswith(kinds)]
    assert names
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp(min=1e-12)) for n in names)


WEIGHTS = ("student.", "ema.")


@pytest.mark.parametrize(
    ("kind", "options", "more"),
    [
        ("full", (), ()),
        ("fsdp", (), ("--fsdp",)),
        pytest.param("lora", ("--lora",), (), marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(
    kind: str, options: tuple[str, ...], more: tuple[str, ...], tiny_sd15: Path, tmp_path: Path
) -> None:
    """In float64, 20 steps of the same batch of 4."""
    losses, wanted = run(1, tiny_sd15, tmp_path / "one.json", "--batch", "4", *options)
    theirs, found = run(2, tiny_sd15, tmp_path / "two.json", "--batch", "2", *options, *more)
    assert theirs == pytest.approx(losses, rel=1e-9)
    assert worst(found, wanted, WEIGHTS) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_an_accumulated_batch_is_the_batch(world: int, tiny_sd15: Path, tmp_path: Path) -> None:
    losses, wanted = run(1, tiny_sd15, tmp_path / "one.json", "--batch", "4")
    theirs, found = run(world, tiny_sd15, tmp_path / "parts.json", "--batch", str(2 // world), "--accumulate", "2")
    assert theirs == pytest.approx(losses, rel=1e-9)
    assert worst(found, wanted, WEIGHTS) < 1e-9


@pytest.mark.slow
def test_accelerate_launch_serves_as_well(tiny_sd15: Path, tmp_path: Path) -> None:
    """It sets the variables that torchrun sets; on a machine without a GPU too."""
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = ("-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "29511")
    wanted, _ = run(2, tiny_sd15, tmp_path / "torchrun.json", "--steps", "3")
    losses, _ = run(2, tiny_sd15, tmp_path / "accelerate.json", "--steps", "3", by=launch)
    assert losses == wanted


@pytest.mark.slow
def test_two_processes_equal_one_in_float32(tiny_sd15: Path, tmp_path: Path) -> None:
    losses, _ = run(1, tiny_sd15, tmp_path / "one.json", "--batch", "4", "--float32")
    for name, more in (("two", ()), ("cut", ("--fsdp",))):
        theirs, _ = run(2, tiny_sd15, tmp_path / f"{name}.json", "--batch", "2", "--float32", *more)
        assert theirs == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.slow), "fsdp"])
def test_what_two_saved_one_loads_bit_for_bit(kind: str, tiny_sd15: Path, tmp_path: Path) -> None:
    cut = ("--fsdp",) if kind == "fsdp" else ()
    folder = tmp_path / "checkpoints"
    _, wanted = run(2, tiny_sd15, tmp_path / "two.json", "--steps", "3", "--save", folder, *cut)
    _, found = run(1, tiny_sd15, tmp_path / "one.json", "--steps", "3", "--load", folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_what_one_saved_two_load_bit_for_bit(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    _, wanted = run(1, tiny_sd15, tmp_path / "one.json", "--steps", "3", "--batch", "4", "--save", folder)
    for name, cut in (("two", ()), ("cut", ("--fsdp",))):
        _, found = run(2, tiny_sd15, tmp_path / f"{name}.json", "--steps", "3", "--load", folder, *cut)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_command_in_two_processes_and_then_in_one(tiny_sd15: Path, tmp_path: Path) -> None:
    """All of it: encoding, held-out pictures, checkpoints, export; cut up by FSDP2, and resumed by a process alone."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for i, colour in enumerate(("red", "blue", "green", "black", "white")):
        Image.new("RGB", (64 + 8 * i, 64), colour).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"a {colour} square")
    options = "--train-batch-size 2 --resolution 64 --validation-steps 2 --validation-samples 4 --teacher-steps 2"
    command = ["-m", "calotype", "distill", str(tiny_sd15), str(data), "-o", str(out), "--device", "cpu"]
    command += options.split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{out}\n"  # once, from the first process
        return done.stderr

    assert call(*TORCHRUN, *command, "--fsdp", "--max-train-steps", "4").count("held-out distance") == 2
    told = call(*command, "--max-train-steps", "6", "--resume", "--quiet")
    assert "from step 4 on the settings differ from the run's so far: processes 2 -> 1" in told
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines() if "grad_norm" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert calotype.load(out)("a fox", seed=0).image.size == (64, 64)


def test_a_killed_process_ends_the_other(tiny_sd15: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    process = start(2, tiny_sd15, tmp_path / "out.json", "--steps", "100000", "--die", "1")
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - started < 60, text
    assert not (tmp_path / "out.json").exists()
