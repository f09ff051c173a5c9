"""Training without pictures: the teacher draws its own latents from prompts, once, into the cache.

They are what its own solver ends at, so the student learns on the teacher's distribution and no data set is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from calotype.errors import UsageError
from calotype.generate import Guidance, Job, generate
from calotype.nn.unet import Conditioning
from calotype.parts import Parts
from calotype.prepare import condition
from calotype.sampling import ddim, draw_noise, grid_for
from calotype.training.cache import FORMAT, inpaints, key_of
from calotype.training.draw import fingerprint
from calotype.training.shards import Broken, Cache, Making, Pictures, Row, Shard, contents
from calotype.training.sources import Example
from calotype.weights.files import is_finite

BATCH = 8  # pictures that are drawn together


@dataclass(frozen=True)
class Drawing:
    """How the teacher draws its training pictures: by DDIM, the i-th from `seed` + i."""

    resolution: int  # pixels, of both sides
    steps: int
    guidance: float  # diffusers' guidance_scale
    seed: int = 0


def to_draw(prompts: Sequence[str], samples: int | None, path: Path) -> tuple[Example, ...]:
    """An example for each picture that is to be drawn: the prompts in turn, again and again with other seeds.

    samples: how many; one for each prompt if None.
    """
    count = len(prompts) if samples is None else samples
    return tuple(Example(f"{path.name}, sample {i}", (prompts[i % len(prompts)],), path) for i in range(count))


class DrawnCache(Cache):
    """The teacher's pictures of some examples, in a folder: the same files as those of a PictureCache."""

    def __init__(self, parts: Parts, examples: Sequence[Example], drawing: Drawing, folder: Path) -> None:
        """Raises UsageError for an inpainting model and for a number of steps that there is not."""
        if inpaints(parts):
            raise UsageError(
                "prompts alone cannot train an inpainting model: it needs pictures to hide a part of",
                hint="give a folder of captioned pictures",
            )
        super().__init__(len(examples))
        # The timesteps that calotype eval draws the teacher's pictures with.
        self._parts = replace(parts, schedule=replace(parts.schedule, spacing="trailing"))
        self._grid = grid_for("ddim", self._parts.schedule, drawing.steps)
        self._examples, self._drawing, self._folder = examples, drawing, folder
        self._facts = [FORMAT, fingerprint(self._parts), drawing.resolution, drawing.steps, drawing.guidance]

    def read(self, leave_out: Collection[int] = ()) -> Pictures:
        """What all processes have drawn, without the examples `leave_out`."""
        return Pictures(self.paths(), leave_out)

    def _shard(self, rows: range) -> Shard:
        some = self._examples[rows.start : rows.stop]
        prompts, seeds = [each.captions[0] for each in some], [self._drawing.seed + i for i in rows]
        path = self._folder / "drawn" / f"{key_of([*self._facts, prompts, seeds])}.safetensors"
        return Shard(path, lambda: self._draw(prompts, seeds, [each.name for each in some]))

    def _draw(self, prompts: Sequence[str], seeds: Sequence[int], names: Sequence[str]) -> Making:
        side = self._drawing.resolution
        sizes = torch.tensor([[side, side, 0, 0]], dtype=torch.int32)
        rows: list[Row] = []
        broken: list[Broken] = []
        for start in range(0, len(prompts), BATCH):
            here = slice(start, start + BATCH)
            for latents in self._latents(prompts[here], seeds[here]):
                position = len(rows) + len(broken)
                if is_finite(latents):
                    rows.append(Row(position, latents[None], sizes))
                else:
                    reason = f"{names[position]} was drawn with numbers that are not finite"
                    broken.append(Broken(position, names[position], reason))
            yield len(rows) + len(broken)
        return contents(rows, broken)

    @torch.inference_mode()
    def _latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        """Latents (n, C, h, w) float16 on the CPU of n prompts and seeds."""
        parts, drawing, vae = self._parts, self._drawing, self._parts.vae.config
        side = drawing.resolution // vae.downscale
        noise = draw_noise(seeds, (vae.latent_channels, side, side), 1)
        text, empty = condition(parts, prompts, "", drawing.guidance, (drawing.resolution, drawing.resolution))
        noise = [each.to(parts.device, parts.dtype) for each in noise]
        job = Job(
            tuple(self._grid),
            partial(ddim, parts.schedule, self._grid, noise),
            _first_chunk(parts, text),
            Guidance(parts.schedule, drawing.guidance, None if empty is None else _first_chunk(parts, empty)),
        )
        *_, last = generate(parts.unet, job)
        return last.x.half().cpu()


def _first_chunk(parts: Parts, text: Conditioning) -> Conditioning:
    """What training sees of a caption; and a long one among the others of a batch must not change them."""
    return replace(text, context=text.context[:, : parts.text.tokenizers[0].length])
