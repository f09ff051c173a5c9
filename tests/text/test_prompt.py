"""Chunks and emphasis, with a tokenizer that has a token for every word."""

from __future__ import annotations

import math
import random
import re
import time

import pytest

from calotype.errors import UsageError
from calotype.text.prompt import MAX_CHUNKS, Span, chunk, empty_chunk, parse


class Words:
    """Words and single marks are tokens; ids are made up as they come."""

    def __init__(self, length: int = 8, pad: int = 1) -> None:
        self.bos, self.eos, self.pad, self.length = 0, 1, pad, length
        self.known: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        return [self.known.setdefault(word, len(self.known) + 10) for word in re.findall(r"\w+|[^\w\s]", text)]


@pytest.fixture
def tokenizer() -> Words:
    return Words()


# ---- chunks ----


@pytest.mark.parametrize("words", range(20))
def test_chunks_hold_all_tokens_in_order(tokenizer: Words, words: int) -> None:
    text = " ".join(["cat", "dog", "red"][index % 3] for index in range(words))
    parts = chunk(tokenizer, text)
    assert len(parts) == max(1, math.ceil(words / 6))  # 8 tokens a chunk, 6 of them the prompt's
    kept = []
    for part in parts:
        assert len(part.ids) == len(part.weights) == 8
        assert part.ids[0] == tokenizer.bos
        end = part.ids.index(tokenizer.eos)
        assert set(part.ids[end + 1 :]) <= {tokenizer.pad}
        kept += part.ids[1:end]
    assert kept == tokenizer.ids(text)


def test_the_empty_prompt_is_a_prompt(tokenizer: Words) -> None:
    only = (tokenizer.bos, tokenizer.eos, *[tokenizer.pad] * 6)
    for text in ("", " ", "\n\t "):
        for emphasis in (False, True):
            assert chunk(tokenizer, text, emphasis=emphasis) == [(only, (1.0,) * 8)]
    assert chunk(tokenizer, "()[](:1.2) BREAK ", emphasis=True) == [(only, (1.0,) * 8)]
    assert empty_chunk(tokenizer).ids == only


def test_padding_may_differ_from_the_end() -> None:
    tokenizer = Words(length=5, pad=7)
    assert chunk(tokenizer, "cat")[0].ids == (0, *tokenizer.ids("cat"), 1, 7, 7)


def test_at_most_64_chunks(tokenizer: Words) -> None:
    most = MAX_CHUNKS * 6
    assert len(chunk(tokenizer, "cat " * most)) == MAX_CHUNKS
    with pytest.raises(UsageError, match=f"has {most + 1} tokens in 65 chunks: at most 64 chunks of 6 tokens"):
        chunk(tokenizer, "cat " * (most + 1))
    with pytest.raises(UsageError, match="in 65 chunks"):
        chunk(tokenizer, "cat BREAK " * 65, emphasis=True)


def test_emphasis_is_plain_text_unless_asked_for(tokenizer: Words) -> None:
    text = r"(cat:1.3) [dog] BREAK \("
    ids = [index for part in chunk(tokenizer, text) for index in part.ids[1:-1] if index != tokenizer.eos]
    assert ids == tokenizer.ids(text)
    assert all(weight == 1 for part in chunk(tokenizer, text) for weight in part.weights)


def test_chunks_carry_weights(tokenizer: Words) -> None:
    (part,) = chunk(tokenizer, "red (cat:1.5) [dog]", emphasis=True)
    assert part.ids[:5] == (0, *tokenizer.ids("red cat dog"), 1)
    assert part.weights == (1, 1, 1.5, 1 / 1.1, 1, 1, 1, 1)


def test_break_starts_a_chunk_and_makes_no_empty_one(tokenizer: Words) -> None:
    plain = chunk(tokenizer, "cat") + chunk(tokenizer, "red dog")
    for text in ("cat BREAK red dog", "BREAK cat BREAK BREAK red dog BREAK", "cat\nBREAK\nred dog"):
        assert chunk(tokenizer, text, emphasis=True) == plain
    assert len(chunk(tokenizer, "BREAKfast break cat", emphasis=True)) == 1  # only the whole word, in capitals


# ---- emphasis ----


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("a fox", [("a fox", 1)]),
        ("(fox)", [("fox", 1.1)]),
        ("((fox))", [("fox", 1.21)]),
        ("[fox]", [("fox", 1 / 1.1)]),
        ("[[fox]]", [("fox", 1 / 1.21)]),
        ("([fox])", [("fox", 1)]),
        ("(fox:1.3)", [("fox", 1.3)]),
        ("(fox: 1.3 )", [("fox", 1.3)]),
        ("(fox:2)", [("fox", 2)]),
        ("(fox:.5)", [("fox", 0.5)]),
        ("(fox:-1)", [("fox", -1)]),
        ("(fox:0)", [("fox", 0)]),
        ("((fox:1.5))", [("fox", 1.65)]),
        ("((fox:1.5):2)", [("fox", 3)]),
        ("a (red (fox:2) runs) b", [("a ", 1), ("red ", 1.1), ("fox", 2.2), (" runs", 1.1), (" b", 1)]),
        ("a [red (fox)]", [("a ", 1), ("red ", 1 / 1.1), ("fox", 1)]),
        ("(fox", [("fox", 1.1)]),
        ("a ((fox", [("a ", 1), ("fox", 1.21)]),
        ("[fox", [("fox", 1 / 1.1)]),
        ("fox) and ] cat", [("fox) and ] cat", 1)]),
        ("fox:1.3) b", [("fox:1.3) b", 1)]),
        ("(fox:x)", [("fox:x", 1.1)]),
        ("(fox:1.2.3)", [("fox:1.2.3", 1.1)]),
        ("(fox:)", [("fox:", 1.1)]),
        ("(at 10:30)", [("at 10", 30)]),
        ("[fox:1.3]", [("fox:1.3", 1 / 1.1)]),
        (r"\(fox\)", [("(fox)", 1)]),
        (r"\[fox\]", [("[fox]", 1)]),
        (r"(a \(b\))", [("a (b)", 1.1)]),
        (r"\\(fox)", [("\\", 1), ("fox", 1.1)]),
        (r"\a \ ", [(r"\a \ ", 1)]),
        ("ca(t:1)s", [("cats", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("()", []),
        ("", []),
    ],
)
def test_emphasis(text: str, spans: list[tuple[str, float]]) -> None:
    if text == "(at 10:30)":
        with pytest.raises(UsageError, match="the weight 30: must be within ±10"):
            parse(text)
        return
    (section,) = parse(text)
    section = [span for span in section if span.text]
    assert [span.text for span in section] == [text for text, _ in spans]
    assert [span.weight for span in section] == pytest.approx([weight for _, weight in spans])


def test_break_keeps_weights() -> None:
    assert parse("(a BREAK b:2) c") == [[Span("a ", 2.0)], [Span(" b", 2.0), Span(" c", 1.0)]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(" * 65, "nested more than 64 deep"),
        ("([" * 40, "nested more than 64 deep"),
        ("(" * 30 + "fox", "must be within ±10"),
        ("(fox:11)", "'fox' the weight 11: must be within ±10"),
        ("(fox:-10.1)", "the weight -10.1"),
        ("(fox:" + "9" * 400 + ")", "the weight inf"),
        ("((fox:0):" + "9" * 400 + ")", "the weight nan"),
    ],
)
def test_absurd_emphasis(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)


def test_emphasis_loses_no_text() -> None:
    """Any mixture of brackets, weights and words: what remains is the text less the instructions, or a UsageError."""
    chance = random.Random(1)
    pieces = ["(", ")", "[", "]", "\\(", "\\)", "\\", ":", ":1.2)", ":0.9", "cat", " ", ", ", "BREAK", "é", "1"]
    for _ in range(2000):
        text = "".join(chance.choices(pieces, k=chance.randint(0, 25)))
        sections = parse(text)
        words = "".join(span.text for section in sections for span in section)
        assert words.count("cat") == text.count("cat")
        assert words.count("é") == text.count("é")
        assert all(math.isfinite(span.weight) for section in sections for span in section)


LONG = ["(a)" * 6000, "(" * 20 + "[a]" * 6000, ")" * 20000, "\\" * 20000, ":1" * 10000, "(a:" * 20 + "1" * 19000]
LONG += [":" + " " * 19000, " " * 19000 + "x", "BREAK" * 4000, "BREAK " * 60 + " " * 19000]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_parsing_does_not_slow_down_with_length(text: str) -> None:
    started = time.process_time()
    assert parse(text)
    assert time.process_time() - started < 0.5  # 5 to 30 ms; what is quadratic in the length takes seconds
