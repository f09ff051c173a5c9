"""Ctrl-C and SIGTERM end a command at whatever moment they come, and what was half done leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from calotype.cli.interruption import Interrupted, Terminated, interruptible

SIGNALS = [(signal.SIGINT, Interrupted, 130), (signal.SIGTERM, Terminated, 143)]
SEND = "import os, signal, time; os.kill(os.getpid(), signal.{}); time.sleep(0.05)"


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """As in a shell's foreground, where SIGINT is not ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    assert sys.getprofile() is None


def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"module_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(text)
    return name


@pytest.mark.parametrize(("number", "kind", "code"), SIGNALS)
def test_an_import_is_not_disturbed_and_is_the_last(
    number: signal.Signals, kind: type, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would swallow the exception: it is not raised there, but behind it."""
    text = f"try:\n    {SEND.format(number.name)}\n    import colorsys\nexcept BaseException:\n    pass\n"
    name, reached = module(tmp_path, monkeypatch, text), []

    def importing() -> None:
        import_module(name)
        reached.append("the line after it")

    with pytest.raises(kind), interruptible():
        importing()
    assert reached == []
    assert sys.modules.pop(name).colorsys


def test_an_import_that_fails_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(tmp_path, monkeypatch, f"{SEND.format('SIGINT')}\n1 / 0")
    with pytest.raises(Interrupted), interruptible():
        import_module(name)


def test_a_second_signal_is_heeded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = tmp_path / "reached"
    text = f"{SEND.format('SIGINT')}\n{SEND.format('SIGTERM')}\nopen({str(reached)!r}, 'x')"
    name = module(tmp_path, monkeypatch, text)
    with pytest.raises(Terminated), interruptible():
        import_module(name)
    assert not reached.exists()


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible() as arrived:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
    assert arrived.error is None


@pytest.mark.slow
@pytest.mark.parametrize(("number", "kind", "code"), SIGNALS)
def test_a_real_command_at_many_moments(number: signal.Signals, kind: type, code: int, tmp_path: Path) -> None:
    """From the first line of the program on: before it, Python itself ends by the signal."""
    program = "import sys, calotype.cli; print('on', flush=True); sys.exit(calotype.cli.main(['x', '-o', 'x.png']))"
    durations = []
    for _ in range(3):  # the least of them: the first has files to read from the disk, and would end before its signal
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
        durations.append(time.monotonic() - began)
        (tmp_path / "x.png").unlink()
    for i in range(24):
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + 0.6 * min(durations) * i / 24)
        process.send_signal(number)
        told = process.communicate(timeout=60)
        word = "interrupted" if number is signal.SIGINT else "terminated"
        assert (process.returncode, told, os.listdir(tmp_path)) == (code, ("", f"error: {word}\n"), []), i
