"""docs/parity.md: the matrix as tables, a family each, with the errors of one run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import product

import diffusers

from matrix.cells import ADAPTERS, CANDIDATES, CELLS, FAMILIES, FOLDED, LACKING, NAMINGS, SAMPLERS, TASKS, Cell

HEAD = """# Parity with diffusers

Every task with every adapter, as one `Request` to one engine, against the pipeline that diffusers {version} has for
it: the same tiny random model (the true topologies, no weight zero), prompt and seed, in float32 on a CPU. A figure is
the relative L2 distance of the final latents. {cells} cells are what diffusers has; in {folded} more (*) its pipeline
leaves the guidance embedding out, so it is given a U-Net with that guidance folded into a bias. The worst of all is
{worst}.

Written by `scripts/parity`; the tests hold every figure under 1e-4. Five of the cells run at the real sizes of Stable
Diffusion 1.5 and SDXL as well (`scripts/test-slow`).

- *embedded*: a latent consistency model at guidance 8. The others are the base model with an LCM-LoRA: *off* is
  guidance 1, *cfg* 1.5, *negative* 1.5 with a negative prompt.
- *text* and inpainting run 3 steps. *image* and *part* have strength 0.75; where diffusers' pipeline cuts the grid of a
  full run short, its timesteps are given to ours.
- *inpaint 9* is a U-Net of 9 channels, *inpaint 4* an ordinary one, where what is painted and what is kept are
  compared apart.
- *style* is a LoRA on attention and text at 0.8, *styles* a second at -0.4; *control* and *t2i* are a ControlNet and a
  T2I-Adapter at 0.8, *controls* and *t2is* two of them; *motion* is AnimateDiff with 3 frames, from a video where the
  task is *image*.
{reasons}
"""
FAMILY_NAMES = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL", "ssd1b": "SSD-1B"}
FIGURE = re.compile(r"\d(?:\.\d)?e[+-]\d\d")


def render(errors: Mapping[Cell, float]) -> str:
    """The page, given an error for each cell that diffusers can be asked."""
    letters = {reason: chr(ord("a") + i) for i, reason in enumerate(dict.fromkeys(LACKING.values()))}

    def entry(cell: Cell) -> str:
        if cell not in CANDIDATES:
            return ""
        if cell in LACKING:
            return letters[LACKING[cell]]
        return f"{errors[cell]:.0e}" + ("*" if cell in FOLDED else "")

    head = HEAD.format(
        version=diffusers.__version__,
        cells=len(CELLS),
        folded=len(FOLDED),
        worst=f"{max(errors.values()):.0e}",
        reasons="\n".join(f"- *{letter}*: {reason}." for reason, letter in letters.items()),
    )
    parts = [head]
    for family in FAMILIES:
        models = (("lcm", "embedded"), ("lora", "off"), ("lora", "cfg"), ("lora", "negative"))
        rows = {
            (task, adapter): [Cell(family, model, task, adapter, guidance) for model, guidance in models]
            for task, adapter in product(TASKS, ADAPTERS)
        }
        parts.append(f"## {FAMILY_NAMES[family]}\n")
        parts.append(table(["task", "adapter", *(guidance for _, guidance in models)], rows, entry))
    parts.append("## Other samplers\n\nThe base model with an LCM-LoRA, guidance 1.5.\n")
    rows = {
        (family, task): [Cell(family, "lora", task, "none", "cfg", sampler) for sampler in SAMPLERS]
        for family, task in product(FAMILIES, TASKS)
    }
    parts.append(table(["family", "task", *SAMPLERS], rows, entry))
    parts.append("## Namings of the LCM-LoRA's file\n\nText, guidance 1.\n")
    rows = {
        (family, ""): [Cell(family, "lora", "text", "none", "off", naming=naming) for naming in NAMINGS]
        for family in FAMILIES
    }
    parts.append(table(["family", "", *NAMINGS], rows, entry))
    return "\n".join(parts)


def table(head: list[str], rows: Mapping[tuple[str, str], list[Cell]], entry: Callable[[Cell], str]) -> str:
    """A row for each pair of names; rows without an entry are left out."""
    lines = [head, ["---"] * len(head)]
    lines += [[*names, *entries] for names, cells in rows.items() if any(entries := [entry(cell) for cell in cells])]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def without_figures(page: str) -> str:
    """What of a page does not depend on the run."""
    return FIGURE.sub("0", page)
