"""Checkpoints: whole or not at all at every moment of a crash, damage noticed, and any number of processes."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from calotype.errors import CalotypeWarning, CheckpointError, OutputError
from calotype.training import checkpoint
from calotype.training.ranks import Ranks

ALONE = Ranks()
KILLS = 30


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "student.weight": torch.randn(40, 30, generator=generator),
        "optimizer.weight.step": torch.tensor(float(step)),
        "optimizer.weight.exp_avg": torch.randn(40, 30, generator=generator, dtype=torch.float64),
    }


def write(folder: Path, step: int) -> Path:
    return checkpoint.write(folder, step, tensors(step), {"step": step}, ALONE)


def check(path: Path) -> None:
    """The checkpoint holds exactly what its step's was made of."""
    step = checkpoint.step_of(path)
    assert checkpoint.state_of(path) == {"step": step}
    wanted = tensors(step)
    found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    checkpoint.read(path, found, ALONE)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("most", [checkpoint.FILE, 100])
def test_what_is_written_is_read(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one file, or in several."""
    monkeypatch.setattr(checkpoint, "FILE", most)
    assert checkpoint.newest(tmp_path) is None
    for step in (3, 20):
        write(tmp_path, step)
    path = checkpoint.newest(tmp_path)
    assert path is not None
    assert path.name == "step-00000020"
    check(path)
    assert len(list(path.glob("*.safetensors"))) == (1 if most > 100 else 2)
    assert not any(file.suffix in (".pt", ".pkl", ".distcp", ".metadata") for file in path.iterdir())


def _in_child(action: Callable[[], None]) -> int:
    """Runs something in a forked process; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def _calls(action: Callable[[], object], at: int | None = None) -> int:
    """How many calls an action makes in Python and C; the process dies by SIGKILL at call `at`."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        if event in ("call", "c_call"):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(trace)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_a_crash_at_any_moment_of_saving_leaves_a_checkpoint(tmp_path: Path) -> None:
    """Killed at 30 moments from the first call of saving to the last removal of an old checkpoint."""

    def save(folder: Path) -> None:
        write(folder, 2)
        checkpoint.prune(folder, 1, None)

    rehearsal = tmp_path / "rehearsal"
    write(rehearsal, 1)
    total = _calls(lambda: save(rehearsal))
    steps = set()
    for i in range(KILLS):
        folder = tmp_path / str(i)
        write(folder, 1)
        status = _in_child(partial(_calls, partial(save, folder), max(1, i * total // (KILLS - 1))))
        assert os.WIFSIGNALED(status) or i == KILLS - 1  # the number of calls may differ by a few
        path = checkpoint.newest(folder)
        assert path is not None
        check(path)
        steps.add(checkpoint.step_of(path))
        write(folder, 2)  # and the run goes on
        newest = checkpoint.newest(folder)
        assert newest is not None
        check(newest)
    assert steps == {1, 2}


def _spoil(path: Path, how: str) -> None:
    shard = next(path.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    match how:
        case "truncated":
            shard.write_bytes(content[:-100])
        case "flipped":
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        case "missing":
            shard.unlink()
        case "no manifest":
            (path / checkpoint.MANIFEST).unlink()
        case "bad manifest":
            (path / checkpoint.MANIFEST).write_text("[1]")
        case "state":
            (path / checkpoint.STATE).write_text('{"step": 7}')


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "no manifest", "bad manifest", "state"])
def test_a_damaged_checkpoint_is_passed_over_loudly(how: str, tmp_path: Path) -> None:
    write(tmp_path, 1)
    _spoil(write(tmp_path, 2), how)
    with pytest.warns(CalotypeWarning, match="step-00000002 is damaged"):
        path = checkpoint.newest(tmp_path)
    assert path is not None
    check(path)
    _spoil(path, how)
    with (
        pytest.warns(CalotypeWarning, match="is damaged"),
        pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"),
    ):
        checkpoint.newest(tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, name in ((os, "fsync"), (Path, "write_text"), (Path, "rename")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, full)
            with pytest.raises(OutputError, match=r"step 2 cannot be written .*: no space left on device"):
                write(tmp_path, 2)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        check(tmp_path / "step-00000001")


def test_a_full_disk_beneath_torch(tmp_path: Path) -> None:
    """A limit on the size of files is how a process meets a full disk within libraries."""
    import resource

    write(tmp_path, 1)

    def attempt() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        try:
            write(tmp_path, 2)
        except OutputError as error:
            os._exit(7 if "file too large" in str(error) else 8)

    assert os.WEXITSTATUS(_in_child(attempt)) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_old_checkpoints_go_after_the_new_one_stands(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
        checkpoint.prune(tmp_path, 2, kept=2)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [2, 4, 5]


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    for other in ({"ema.weight": torch.zeros(40, 30)}, {"student.weight": torch.zeros(3, 3)}):
        with pytest.raises(CheckpointError, match="is no checkpoint of this run"):
            checkpoint.read(path, other, ALONE)
