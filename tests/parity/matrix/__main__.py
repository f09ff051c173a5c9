"""Runs every cell and writes the page: `python -m matrix PAGE`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from matrix.cells import CELLS, FOLDED
from matrix.compare import Matrix
from matrix.page import render
from matrix.world import World


def main(page: Path) -> None:
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        matrix = Matrix(World(Path(folder)))
        page.write_text(render({cell: matrix.error(cell) for cell in (*CELLS, *FOLDED)}), encoding="utf-8")


main(Path(sys.argv[1]))
