"""Models that both programs load."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import topologies
from matrix.compare import Matrix
from matrix.world import World
from reference import SHIPPED, Agreement, Pair

from worst import RECORD


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A topology's model, written and loaded once a session."""
    made: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in made:
            shipped = Path(str(files("calotype"))) / "models/icons"
            folder = shipped if name == SHIPPED else topologies.write(name, tmp_path_factory.mktemp("parity") / name)
            made[name] = Pair(name, folder)
        return made[name]

    return pair


@pytest.fixture(scope="session")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Both programs over the models and adapters of the parity matrix, each written and loaded when first asked for."""
    return Matrix(World(tmp_path_factory.mktemp("matrix")))


@pytest.fixture
def agree(pytestconfig: pytest.Config) -> Agreement:
    return Agreement(pytestconfig.stash[RECORD])
