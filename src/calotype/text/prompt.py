r"""A prompt as chunks of tokens, each with its weight.

A text encoder reads `length` tokens (77 in CLIP): a start, up to length - 2 of the prompt, an end, padding. A longer
prompt goes on in further chunks, each framed alike.

With emphasis (AUTOMATIC1111's syntax) some characters of a prompt are instructions; without it all are plain text:

    (fox)      weight x 1.1; ((fox)) x 1.21, and so on
    [fox]      weight / 1.1
    (fox:1.3)  weight x 1.3
    \( \) \[ \] \\   the character itself
    BREAK      starts a new chunk

A bracket that is never closed reaches to the end; one that was never opened is plain text.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol

from calotype.errors import UsageError

MAX_CHUNKS = 64
MAX_DEPTH = 64
MAX_WEIGHT = 10.0

EMPHASIS = 1.1
SYNTAX = re.compile(r"\\[\\()\[\]]|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[()\[\]]|[^\\:()\[\]]+|[\\:]")
BREAK = re.compile(r"\bBREAK\b")


class Vocabulary(Protocol):
    """What this module needs of a tokenizer."""

    bos: int
    eos: int
    pad: int
    length: int

    def ids(self, text: str) -> list[int]: ...


class Span(NamedTuple):
    """A stretch of text under one weight."""

    text: str
    weight: float = 1.0


class Chunk(NamedTuple):
    """What the text encoder reads at once: `length` ids, framing and padding included, and a weight for each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def chunk(vocabulary: Vocabulary, prompt: str, *, emphasis: bool = False) -> list[Chunk]:
    """The chunks of a prompt, at least one: the empty prompt is a prompt.

    Raises UsageError for a prompt of more than 64 chunks, and for absurd emphasis.
    """
    room = vocabulary.length - 2
    rows: list[list[tuple[int, float]]] = []
    total = 0
    for section in parse(prompt) if emphasis else [[Span(prompt)]]:
        tokens = [(index, span.weight) for span in section for index in vocabulary.ids(span.text)]
        rows += [tokens[start : start + room] for start in range(0, len(tokens), room)]
        total += len(tokens)
    if len(rows) > MAX_CHUNKS:
        raise UsageError(
            f"the prompt has {total} tokens in {len(rows)} chunks: at most {MAX_CHUNKS} chunks of {room} tokens",
            f"shorten it to {MAX_CHUNKS * room} tokens",
        )
    return [_framed(vocabulary, row) for row in rows or [[]]]


def empty_chunk(vocabulary: Vocabulary) -> Chunk:
    """The chunk of the empty prompt, which fills up a shorter prompt beside a longer one."""
    return _framed(vocabulary, [])


def _framed(vocabulary: Vocabulary, tokens: list[tuple[int, float]]) -> Chunk:
    padding = vocabulary.length - 2 - len(tokens)
    ids = (vocabulary.bos, *(index for index, _ in tokens), vocabulary.eos, *[vocabulary.pad] * padding)
    return Chunk(ids, (1.0, *(weight for _, weight in tokens), 1.0, *[1.0] * padding))


def parse(prompt: str) -> list[list[Span]]:
    """The sections between BREAKs, each as spans of equal weight. A weight beyond ±10 is a UsageError."""
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # for each open bracket, the first text inside it

    def close(bracket: str, factor: float) -> None:
        for index in range(opened[bracket].pop(), len(texts)):
            weights[index] *= factor

    for match in SYNTAX.finditer(prompt):
        token, number = match.group(), match.group(1)
        if token in opened:
            opened[token].append(len(texts))
            if len(opened["("]) + len(opened["["]) > MAX_DEPTH:
                raise UsageError(f"emphasis is nested more than {MAX_DEPTH} deep", r"write \( for a plain bracket")
        elif number is not None and opened["("]:
            close("(", float(number))
        elif token == ")" and opened["("]:
            close("(", EMPHASIS)
        elif token == "]" and opened["["]:
            close("[", 1 / EMPHASIS)
        else:
            escaped = len(token) == 2 and token[0] == "\\"
            texts.append(token[1] if escaped else token)
            weights.append(1.0)
    for bracket, factor in (("(", EMPHASIS), ("[", 1 / EMPHASIS)):
        while opened[bracket]:
            close(bracket, factor)
    for text, weight in zip(texts, weights, strict=True):
        if not abs(weight) <= MAX_WEIGHT:
            raise UsageError(f"emphasis gives {text[:40]!r} the weight {weight:g}: must be within ±{MAX_WEIGHT:g}")
    return _sections(_joined(texts, weights))


def _joined(texts: list[str], weights: list[float]) -> list[Span]:
    """Neighbours of equal weight as one span, since a word must reach the tokenizer whole."""
    spans: list[Span] = []
    for text, weight in zip(texts, weights, strict=True):
        if spans and spans[-1].weight == weight:
            spans[-1] = Span(spans[-1].text + text, weight)
        else:
            spans.append(Span(text, weight))
    return spans


def _sections(spans: list[Span]) -> list[list[Span]]:
    sections: list[list[Span]] = [[]]
    for span in spans:
        first, *rest = BREAK.split(span.text)
        sections[-1].append(Span(first, span.weight))
        sections += [[Span(text, span.weight)] for text in rest]
    return sections
