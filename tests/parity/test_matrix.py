"""Every task with every adapter against diffusers: the cells of tests/parity/matrix, and their page in the docs."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from matrix.cells import CANDIDATES, CELLS, FAMILIES, FOLDED, LACKING, MODELS, Cell, embeds_guidance
from matrix.compare import Matrix
from matrix.page import FIGURE, render, without_figures
from PIL import ImageChops
from reference import LATENTS, Agreement, distance

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"

# What diffusers' Euler does to numpy, and our own about what a cell asks on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_cell_that_diffusers_has(matrix: Matrix, agree: Agreement, cell: Cell) -> None:
    assert agree.note(f"{cell.family}, {cell.model}", cell.adapter, matrix.error(cell)) < LATENTS


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_cell_with_optimized_networks(matrix: Matrix, agree: Agreement, cell: Cell) -> None:
    error = matrix.between(cell, matrix.optimized(cell), matrix.theirs(cell))
    assert agree.note(f"{cell.family}, optimized", cell.adapter, error) < LATENTS


@pytest.mark.parametrize("cell", FOLDED, ids=str)
def test_a_cell_that_diffusers_has_without_the_guidance_embedding(matrix: Matrix, agree: Agreement, cell: Cell) -> None:
    """Its pipeline gets a U-Net in which that guidance is a bias."""
    assert agree.note(f"{cell.family}, folded", cell.adapter, matrix.error(cell)) < LATENTS


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_in_one_batch(matrix: Matrix, family: str, model: str, channels: int) -> None:
    """All cells of an engine at once, each with its own LoRAs: they come out as they do alone, in fewer calls."""
    cells = [cell for cell in CANDIDATES if (cell.family, cell.model, cell.channels) == (family, model, channels)]
    calls: list[int] = []
    hook = matrix.ours.engine(family, model, channels).parts.unet.register_forward_hook(lambda *_: calls.append(1))
    alone = [matrix.ours.drawn(cell) for cell in cells]  # after this the engine has all that any of them needs
    single = len(calls)
    together = matrix.ours.together(cells)
    hook.remove()
    for cell, (ours, pictures), (wanted, others) in zip(cells, together, alone, strict=True):
        assert distance(ours, wanted) < 1e-5, cell
        assert len(pictures) == len(others)
        for picture, other in zip(pictures, others, strict=True):
            assert ImageChops.difference(picture, other).getextrema() <= ((0, 1),) * 3, cell
    assert len(calls) - single < 0.6 * single


def test_there_are_enough_cells() -> None:
    assert len(CELLS) >= 120
    assert len({*CELLS, *FOLDED, *LACKING}) == len(CANDIDATES) == len(CELLS) + len(FOLDED) + len(LACKING)
    assert embeds_guidance("StableDiffusionControlNetPipeline")
    assert not embeds_guidance("StableDiffusionControlNetImg2ImgPipeline")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_a_cell_adds_shows(matrix: Matrix, family: str, model: str) -> None:
    """No two cells of a task end alike, so none passes without its adapter; but a LoRA means the same in any naming."""
    own = [cell for cell in CELLS if (cell.family, cell.model) == (family, model)]
    for one, other in combinations(own, 2):
        a, b = matrix.theirs(one), matrix.theirs(other)
        if one.naming != other.naming and one.adapter == other.adapter and one.guidance == other.guidance:
            if one.task == other.task and one.sampler == other.sampler:
                assert distance(a, b) < LATENTS
        elif one.task == other.task and a.shape == b.shape:
            assert distance(a, b) > 20 * LATENTS, (one, other)


def test_the_page_has_every_cell() -> None:
    """scripts/parity writes it anew; its figures may differ from run to run."""
    page = PAGE.read_text(encoding="utf-8")
    assert without_figures(page) == without_figures(render(dict.fromkeys((*CELLS, *FOLDED), 0.0)))
    figures = [float(figure) for figure in FIGURE.findall(page)]
    assert len(figures) > len(CELLS) + len(FOLDED)
    assert sum(figure > LATENTS for figure in figures) == 0
