"""The worst errors against diffusers, gathered from all processes that test, and printed at the end.

A plugin that tests/conftest.py registers: the process that prints runs no test, so it reads no other conftest.
"""

from __future__ import annotations

from typing import Any

import pytest

Record = dict[tuple[str, str], float]  # by model and what was compared
RECORD = pytest.StashKey[Record]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of several hands its errors to the one that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["parity"] = [(*key, error) for key, error in session.config.stash[RECORD].items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    record = node.config.stash[RECORD]
    for model, what, error in getattr(node, "workeroutput", {}).get("parity", ()):
        record[model, what] = max(error, record.get((model, what), 0.0))


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
