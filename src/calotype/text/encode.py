"""From prompts to the U-Net's conditioning, by one CLIP text encoder (SD 1.x, 2.x) or two (SDXL).

Shapes: B prompts, L tokens (the tokenizer's length for each chunk), D width (the sum of two encoders' widths), P width
of the pooled embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calotype.errors import CheckpointError, UsageError
from calotype.nn.clip import CLIPOutput, CLIPText
from calotype.text.prompt import Chunk, chunk, empty_chunk
from calotype.text.tokenizer import Tokenizer


class TextEncoder:
    """Tokenizers with the CLIP text encoders that they belong to: one pair, or SDXL's two."""

    def __init__(self, tokenizers: Sequence[Tokenizer], models: Sequence[CLIPText]) -> None:
        """Raises CheckpointError where a tokenizer does not fit its encoder."""
        if len(models) not in (1, 2) or len(tokenizers) != len(models):
            raise CheckpointError(
                f"{len(tokenizers)} tokenizers and {len(models)} text encoders: must be one of each, or two of each"
            )
        for tokenizer, model in zip(tokenizers, models, strict=True):
            if tokenizer.size > model.config.vocab_size:
                raise CheckpointError(
                    f"the tokenizer has {tokenizer.size} tokens and its text encoder knows {model.config.vocab_size}",
                    "the two are from different models",
                )
            if tokenizer.length > model.config.positions:
                raise CheckpointError(
                    f"the tokenizer's length is {tokenizer.length}: its encoder has {model.config.positions} positions",
                    "correct model_max_length in tokenizer_config.json",
                )
        if len({tokenizer.length for tokenizer in tokenizers}) > 1:
            raise CheckpointError("the two tokenizers differ in length: their features cannot be joined")
        self.tokenizers = tuple(tokenizers)
        self.models = tuple(models)

    def chunks(self, prompt: str, *, emphasis: bool = False) -> int:
        """How many chunks a prompt takes. SDXL's two tokenizers may differ (`!` pads one): the larger number counts."""
        return max(len(chunk(tokenizer, prompt, emphasis=emphasis)) for tokenizer in self.tokenizers)

    def encode(
        self, prompts: Sequence[str], *, clip_skip: int | None = None, emphasis: bool = False, chunks: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Context (B, L, D), and with two encoders pooled (B, P), in the encoders' dtype and on their device.

        All prompts get as many chunks as the longest has, or `chunks`, by appending those of the empty prompt. Equal
        chunks are encoded once. `clip_skip` leaves out that many last layers. Raises UsageError.
        """
        texts = [
            [chunk(tokenizer, prompt, emphasis=emphasis) for prompt in prompts] for tokenizer in self.tokenizers
        ]  # for each tokenizer, for each prompt, its chunks
        needed = max(len(row) for rows in texts for row in rows)
        if chunks is not None and chunks < needed:
            raise UsageError(f"chunks is {chunks}: the longest prompt takes {needed}")
        count = needed if chunks is None else chunks
        contexts = []
        for tokenizer, model, rows in zip(self.tokenizers, self.models, texts, strict=True):
            filled = [row + [empty_chunk(tokenizer)] * (count - len(row)) for row in rows]
            context, pooled = self._features(model, filled, clip_skip)
            contexts.append(context)
        # diffusers' SDXL takes the pooled embedding of the second encoder; Stable Diffusion has none.
        return torch.cat(contexts, dim=-1), pooled if len(self.models) == 2 else None

    def _features(self, model: CLIPText, rows: list[list[Chunk]], clip_skip: int | None) -> tuple[Tensor, Tensor]:
        """Context (B, chunks * length, width) and pooled (B, P) of the first chunks, by one encoder."""
        distinct = {ids: index for index, ids in enumerate(dict.fromkeys(part.ids for row in rows for part in row))}
        device = model.text_model.embeddings.token_embedding.weight.device
        out: CLIPOutput = model(torch.tensor(list(distinct), dtype=torch.int64, device=device))
        hidden = self._layer(model, out, clip_skip)
        which = [[distinct[part.ids] for part in row] for row in rows]
        context = hidden[torch.tensor(which, device=device)]  # (B, chunks, length, width)
        weights = torch.tensor([[part.weights for part in row] for row in rows], dtype=torch.float32, device=device)
        pooled = out.pooled[[row[0] for row in which]]
        return _emphasised(context, weights).flatten(1, 2), pooled

    def _layer(self, model: CLIPText, out: CLIPOutput, clip_skip: int | None) -> Tensor:
        """The features that the U-Net was trained on. One encoder: the last layer's, or an earlier one's, normalised.
        Two: the last but one's, as they are (Podell et al. 2023, arXiv 2307.01952, section 2.1).
        """
        skipped = 0 if clip_skip is None else clip_skip
        most = len(out.hidden) - len(self.models)  # `hidden` starts with the embeddings
        if not 0 <= skipped <= most:
            raise UsageError(f"clip_skip is {skipped}: must be 0 to {most} for this text encoder", field="clip_skip")
        if len(self.models) == 2:
            return out.hidden[-(skipped + 2)]
        return out.last if skipped == 0 else model.final_norm(out.hidden[-(skipped + 1)])


def _emphasised(context: Tensor, weights: Tensor) -> Tensor:
    """Each token's features (B, chunks, length, width) times its weight (B, chunks, length).

    The mean of a chunk is restored to what it was (AUTOMATIC1111's rule), so that emphasis shifts weight between tokens
    and does not move the whole context away from what the U-Net knows. Chunks without emphasis stay bit for bit.
    """
    if bool((weights == 1).all()):
        return context
    before = context.float()
    after = before * weights[..., None]
    mean = after.mean(dim=(-2, -1), keepdim=True)
    ratio = torch.where(mean == 0, 1.0, before.mean(dim=(-2, -1), keepdim=True) / mean)
    plain = (weights == 1).all(dim=-1)[..., None, None]
    return torch.where(plain, before, after * ratio).to(context.dtype)
