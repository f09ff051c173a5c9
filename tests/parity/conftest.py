"""Models that both programs load, and a table of the worst errors at the end of the run."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import topologies
from matrix.compare import Matrix
from matrix.world import World
from reference import SHIPPED, Agreement, Pair

Record = dict[tuple[str, str], float]
RECORD = pytest.StashKey[Record]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORD] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of several hands its errors to the one that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["parity"] = [(*key, error) for key, error in session.config.stash[RECORD].items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    record = node.config.stash[RECORD]
    for model, what, error in getattr(node, "workeroutput", {}).get("parity", ()):
        record[model, what] = max(error, record.get((model, what), 0.0))


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    record = config.stash[RECORD]
    if not record:
        return
    models, kinds = (list(dict.fromkeys(column)) for column in zip(*record, strict=True))
    terminalreporter.section("worst errors against diffusers (relative L2; share of values off by more than 1/255)")
    terminalreporter.line(f"{'':16}" + "".join(f"{kind:>12}" for kind in kinds))
    for model in models:
        cells = (f"{record[model, kind]:12.1e}" if (model, kind) in record else f"{'-':>12}" for kind in kinds)
        terminalreporter.line(f"{model:16}" + "".join(cells))
