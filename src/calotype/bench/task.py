"""What all draw alike."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

PROMPT = "a red fox in the snow"


@dataclass(frozen=True)
class Task:
    """A model and a picture of it, with one evaluation a step. The noise of a seed is the same for all."""

    folder: str  # in the diffusers layout
    scratch: str  # where pictures go, and what a peer makes of the model
    width: int  # pixels
    height: int
    steps: int
    guidance: float  # diffusers' guidance_scale; of a U-Net that does not embed it, 1
    dtype: str
    threads: int
    optimize: str = "none"  # our own steps; peers have none
    tiny_vae: str | None = None  # the folder of a TAESD, where that is to decode
    variant: str | None = None
    count: bool = False  # the arithmetic of a U-Net's call as well
    prompt: str = PROMPT

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Task:
        return Task(**json.loads(text))
