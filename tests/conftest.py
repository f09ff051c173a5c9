"""Tiny models with random weights in the diffusers layout (checkpoints.py), and no network for any test."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import worst
from checkpoints import write_model


def pytest_configure(config: pytest.Config) -> None:
    """Processes that test side by side (pytest-xdist) share the cores: small networks are slower on many threads."""
    config.stash[worst.RECORD] = {}
    config.pluginmanager.register(worst)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay in one process, which loads their models once; the parity matrix is divided by family."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        family = getattr(parameters.get("cell"), "family", parameters.get("family", ""))
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {family}".strip()))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Connections beyond this machine fail the test; caches, the Hub's among them, are empty folders."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else address
        if self.family != socket.AF_UNIX and host not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"a test tried to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf", numbered=True)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache", numbered=True)))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a session's model folder into this test's own, where it may be spoilt."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return copy


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model shaped like Stable Diffusion 1.5: epsilon, one text encoder, convolutional projections, DDIM."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny_sd15")


@pytest.fixture(scope="session")
def tiny_sd15_lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a latent consistency model with a guidance embedding."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny_sd15_lcm", lcm=True)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model shaped like SDXL: two text encoders, added size embeddings, linear projections, Euler."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny_sdxl", xl=True)
