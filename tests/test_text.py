"""Tokenizer files, chunks and emphasis, and what the text encoders make of them (parity: parity/test_clip_text.py)."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from calotype.errors import CheckpointError, UsageError
from calotype.nn.clip import CLIPText, CLIPTextConfig
from calotype.text.encode import TextEncoder
from calotype.text.prompt import MAX_CHUNKS, Span, chunk, empty_chunk, parse
from calotype.text.tokenizer import MAX_FILE_BYTES, Tokenizer

LETTERS = "!abcdefghijklmnopqrstuvwxyz,()[]:.0123456789\\"
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>"), ("!", "!</w>")]
TOKENS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *(a + b for a, b in MERGES)]
START, END = "<|startoftext|>", "<|endoftext|>"
VOCAB = {token: index for index, token in enumerate([*TOKENS, START, END])}


def folder(path: Path, *, layout: str = "text", **files: Any) -> Path:
    """A tokenizer folder of these tables; `files` are further JSON files, or replace those."""
    path.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Any] = {"tokenizer_config": {"model_max_length": 8}}
    if layout == "text":
        contents["vocab"] = VOCAB
        (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in MERGES) + "\n")
    else:
        model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": VOCAB, "merges": [list(pair) for pair in MERGES]}
        contents["tokenizer"] = {
            "model": model,
            "added_tokens": [{"id": VOCAB[token], "content": token, "normalized": False} for token in (START, END)],
        }
    for name, content in (contents | files).items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(folder(tmp_path / "tokenizer"))


# ---- tokenizer: what the files say ----


@pytest.mark.parametrize("layout", ["text", "json"])
def test_both_layouts_hold_the_same_tokenizer(tmp_path: Path, layout: str) -> None:
    tokenizer = Tokenizer.load(folder(tmp_path, layout=layout))
    assert tokenizer.ids("Red  CAT") == [VOCAB["red</w>"], VOCAB["cat</w>"]]
    assert tokenizer.ids("do") == [VOCAB["d"], VOCAB["o</w>"]]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (VOCAB[START], VOCAB[END], VOCAB[END])
    assert tokenizer.length == 8
    assert tokenizer.size == len(VOCAB)


def test_merges_as_text_pairs_and_with_windows_line_ends(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "merges.txt").write_bytes(b"#version: 0.2\r\n" + b"\r\n".join(f"{a} {b}".encode() for a, b in MERGES))
    assert Tokenizer.load(path).ids("cat") == [VOCAB["cat</w>"]]
    path = folder(tmp_path / "json", layout="json")
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in MERGES]
    (path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(path).ids("cat") == [VOCAB["cat</w>"]]


def test_truncation_and_padding_in_tokenizer_json_do_not_apply(tmp_path: Path) -> None:
    path = folder(tmp_path, layout="json")
    content = json.loads((path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 3}, "direction": "Right", "pad_id": 1, "pad_token": "a"}
    (path / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer.load(path).ids("cat " * 50)) == 50
    assert len(Tokenizer.load(path).ids("cat")) == 1


@pytest.mark.parametrize(
    "pad", ["!", {"content": "!", "lstrip": False, "normalized": False}, {"content": "!", "__type": "x"}]
)
def test_padding_token_of_sd2(tmp_path: Path, pad: Any) -> None:
    path = folder(tmp_path, special_tokens_map={"pad_token": pad}, tokenizer_config={"pad_token": END})
    tokenizer = Tokenizer.load(path)
    assert tokenizer.pad == VOCAB["!"]
    assert tokenizer.eos == VOCAB[END]
    assert tokenizer.ids("cat!!") == [VOCAB["cat</w>"], VOCAB["!"], VOCAB["!"]]  # whole tokens wherever they stand


def test_listed_added_tokens_make_tokenizer_config_the_only_source(tmp_path: Path) -> None:
    listed = {str(VOCAB[token]): {"content": token, "normalized": False} for token in ("!", START, END)}
    config = {"pad_token": "!", "added_tokens_decoder": listed}
    path = folder(tmp_path, tokenizer_config=config, special_tokens_map={"pad_token": END})
    assert Tokenizer.load(path).pad == VOCAB["!"]


def test_added_tokens_extend_the_vocabulary(tmp_path: Path) -> None:
    path = folder(tmp_path, added_tokens={"<mine>": len(VOCAB)})
    tokenizer = Tokenizer.load(path)
    assert tokenizer.ids("a<mine>cat") == [VOCAB["a</w>"], len(VOCAB), VOCAB["cat</w>"]]
    assert tokenizer.size == len(VOCAB) + 1


def test_special_token_spelled_out_in_a_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.ids(f"a {END} dog") == [VOCAB["a</w>"], VOCAB[END], VOCAB["dog</w>"]]


def test_unknown_characters_are_the_unknown_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.ids("é") == [VOCAB[END]] * 2  # two bytes, neither in this small vocabulary


@pytest.mark.parametrize(
    ("given", "length"), [(32, 32), (77.0, 77), (1e30, 77), (int(1e30), 77), (math.inf, 77), (4096, 4096), (4097, 77)]
)
def test_length(tmp_path: Path, given: float, length: int) -> None:
    assert Tokenizer.load(folder(tmp_path, tokenizer_config={"model_max_length": given})).length == length


def test_length_is_clips_where_nothing_says_it(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(path).length == 77


@pytest.mark.parametrize("text", ["\ud800", "a\udfff cat"])
def test_lone_surrogates(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(UsageError, match="not valid Unicode"):
        tokenizer.ids(text)


def changed(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json with these changes in its model."""
    return {"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": VOCAB, "merges": []} | changes}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab": []}, "must be an object"),
        ({"vocab": {}}, "not empty"),
        ({"vocab": VOCAB | {"x": -1}}, "has the id -1"),
        ({"vocab": VOCAB | {"x": 10**9}}, "has the id 1000000000"),
        ({"vocab": VOCAB | {"x": 2**70}}, "has the id"),
        ({"vocab": VOCAB | {"x": True}}, "has the id True"),
        ({"vocab": VOCAB | {"x": "7"}}, "has the id '7'"),
        ({"vocab": VOCAB | {"x": 1.5}}, "has the id 1.5"),
        ({"vocab": {"a": 0, START: 1, END: 2}}, "do not fit the vocabulary"),
        ({"vocab": {k: v for k, v in VOCAB.items() if k != START}}, "is not in the vocabulary"),
        ({"tokenizer": []}, "must be an object"),
        ({"tokenizer": {}}, "not a CLIP tokenizer"),
        ({"tokenizer": {"model": 3}}, "not a CLIP tokenizer"),
        ({"tokenizer": changed(type="Unigram")}, "not a CLIP tokenizer"),
        ({"tokenizer": changed(end_of_word_suffix=None)}, "not a CLIP tokenizer"),
        ({"tokenizer": changed(vocab=None)}, "must be an object"),
        ({"tokenizer": changed(merges="c a")}, "must be lists"),
        ({"tokenizer": changed(merges=["c"])}, "is not a merge"),
        ({"tokenizer": changed(merges=["c a t"])}, "is not a merge"),
        ({"tokenizer": changed(merges=["c "])}, "is not a merge"),
        ({"tokenizer": changed(merges=[["c", 1]])}, "is not a merge"),
        ({"tokenizer": changed(merges=[7])}, "is not a merge"),
        ({"tokenizer": changed(merges=["x" * 1000])}, "is not a merge"),
        ({"tokenizer": changed(merges=[["c", "zz"]])}, "do not fit the vocabulary"),
        ({"tokenizer": changed() | {"added_tokens": {}}}, "must be lists"),
        ({"tokenizer": changed() | {"added_tokens": [3]}}, "is not a token"),
        ({"tokenizer": changed() | {"added_tokens": [{"id": 1}]}}, "is not a token"),
        ({"tokenizer": changed() | {"added_tokens": [{"id": -1, "content": "a"}]}}, "has the id -1"),
        ({"tokenizer": changed() | {"added_tokens": [{"id": 5, "content": END}]}}, "cannot have the id 5"),
        ({"tokenizer_config": {"bos_token": 3}}, "is not a token"),
        ({"tokenizer_config": {"bos_token": ""}}, "is not a token"),
        ({"tokenizer_config": {"bos_token": {"text": "a"}}}, "is not a token"),
        ({"tokenizer_config": {"bos_token": "<unheard>"}}, "'<unheard>' is not in the vocabulary"),
        ({"tokenizer_config": {"model_max_length": 2}}, "model_max_length is 2"),
        ({"tokenizer_config": {"model_max_length": -1e30}}, "model_max_length"),
        ({"tokenizer_config": {"model_max_length": math.nan}}, "model_max_length is nan"),
        ({"tokenizer_config": {"model_max_length": "77"}}, "model_max_length is '77'"),
        ({"tokenizer_config": {"model_max_length": True}}, "model_max_length is True"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "must be an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": END}}}, "has the id 'x'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9" * 5000: END}}}, "has the id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"3": END}}}, "cannot have the id 3"),
        ({"tokenizer_config": {"added_tokens_decoder": {"999": "<far>"}}}, "cannot have the id 999"),
        ({"special_tokens_map": 5}, "must be an object"),
        ({"special_tokens_map": {"eos_token": []}}, "is not a token"),
        ({"added_tokens": {"<mine>": 3}}, "cannot have the id 3"),
    ],
)
def test_malformed_files(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.load(folder(tmp_path, **files))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"null"])
def test_files_that_are_not_json(tmp_path: Path, name: str, content: bytes) -> None:
    path = folder(tmp_path)
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name) as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_file_of_absurd_size_is_not_read(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path)
    with (path / name).open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(CheckpointError, match="too large for a tokenizer"):
        Tokenizer.load(path)


@pytest.mark.parametrize("missing", [["vocab.json"], ["merges.txt"], ["vocab.json", "merges.txt"]])
def test_missing_files(tmp_path: Path, missing: list[str]) -> None:
    path = folder(tmp_path)
    for name in missing:
        (path / name).unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        Tokenizer.load(path)


def test_damaged_files_give_a_tokenizer_or_one_error(tmp_path: Path) -> None:
    """Bytes of a good tokenizer.json overwritten at random: never another exception."""
    path = folder(tmp_path, layout="json") / "tokenizer.json"
    good = path.read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(200):
        bad = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            bad[chance.randrange(len(bad))] = chance.choice(b'"{}[],: 0aZ\\\xff')
        path.write_bytes(bad)
        try:
            Tokenizer.load(path.parent).ids("red cat and dog!")
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_prompt_and_tokenizer_need_no_torch() -> None:
    code = "import sys, calotype.text.prompt, calotype.text.tokenizer, calotype.request; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


# ---- prompt: chunks ----


@pytest.mark.parametrize("words", range(20))
def test_chunks_hold_all_tokens_in_order(tokenizer: Tokenizer, words: int) -> None:
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


def test_the_empty_prompt_is_a_prompt(tokenizer: Tokenizer) -> None:
    only = (tokenizer.bos, tokenizer.eos, *[tokenizer.pad] * 6)
    for text in ("", " ", "\n\t "):
        for emphasis in (False, True):
            assert chunk(tokenizer, text, emphasis=emphasis) == [(only, (1.0,) * 8)]
    assert chunk(tokenizer, "()[](:1.2) BREAK ", emphasis=True) == [(only, (1.0,) * 8)]
    assert empty_chunk(tokenizer).ids == only


def test_padding_differs_from_the_end(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder(tmp_path, tokenizer_config={"pad_token": "!", "model_max_length": 5}))
    assert chunk(tokenizer, "cat")[0].ids == (VOCAB[START], VOCAB["cat</w>"], VOCAB[END], VOCAB["!"], VOCAB["!"])


def test_at_most_64_chunks(tokenizer: Tokenizer) -> None:
    most = MAX_CHUNKS * 6
    assert len(chunk(tokenizer, "cat " * most)) == MAX_CHUNKS
    with pytest.raises(UsageError, match=f"has {most + 1} tokens in 65 chunks: at most 64 chunks of 6 tokens"):
        chunk(tokenizer, "cat " * (most + 1))
    with pytest.raises(UsageError, match="in 65 chunks"):
        chunk(tokenizer, "cat BREAK " * 65, emphasis=True)


def test_emphasis_is_plain_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    text = r"(cat:1.3) [dog] BREAK \("
    ids = [index for part in chunk(tokenizer, text) for index in part.ids[1:-1] if index != tokenizer.eos]
    assert ids == tokenizer.ids(text)
    assert all(weight == 1 for part in chunk(tokenizer, text) for weight in part.weights)


def test_chunks_carry_weights(tokenizer: Tokenizer) -> None:
    (part,) = chunk(tokenizer, "red (cat:1.5) [dog]", emphasis=True)
    assert part.ids[:5] == (VOCAB[START], VOCAB["red</w>"], VOCAB["cat</w>"], VOCAB["dog</w>"], VOCAB[END])
    assert part.weights == (1, 1, 1.5, 1 / 1.1, 1, 1, 1, 1)


def test_break_starts_a_chunk_and_makes_no_empty_one(tokenizer: Tokenizer) -> None:
    plain = chunk(tokenizer, "cat") + chunk(tokenizer, "red dog")
    for text in ("cat BREAK red dog", "BREAK cat BREAK BREAK red dog BREAK", "cat\nBREAK\nred dog"):
        assert chunk(tokenizer, text, emphasis=True) == plain
    assert len(chunk(tokenizer, "BREAKcat break", emphasis=True)[0].ids) == 8  # only the whole word, in capitals


# ---- prompt: emphasis ----


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


# ---- encode ----


def clip(
    width: int = 16, layers: int = 3, *, projection: int | None = None, positions: int = 8, seed: int = 0
) -> CLIPText:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(VOCAB),
        width=width,
        intermediate=32,
        layers=layers,
        heads=2,
        positions=positions,
        projection_dim=projection,
        eos_token_id=VOCAB[END],
    )
    model = CLIPText(config).eval()
    for parameter in model.parameters():  # a plain initialisation has norms of ones and biases of zeros
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def one(tokenizer: Tokenizer) -> TextEncoder:
    return TextEncoder([tokenizer], [clip()])


@pytest.fixture
def two(tokenizer: Tokenizer, tmp_path: Path) -> TextEncoder:
    second = Tokenizer.load(folder(tmp_path / "second", tokenizer_config={"pad_token": "!", "model_max_length": 8}))
    return TextEncoder([tokenizer, second], [clip(), clip(24, 4, projection=20, seed=1)])


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def test_one_encoder_gives_its_last_layer(one: TextEncoder) -> None:
    context, pooled = one.encode(["red cat"])
    ids = torch.tensor([chunk(one.tokenizers[0], "red cat")[0].ids])
    assert torch.equal(context, one.models[0](ids).last)
    assert context.shape == (1, 8, 16)
    assert pooled is None


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_with_one_encoder_normalises(one: TextEncoder, skip: int) -> None:
    context, _ = one.encode(["red cat"], clip_skip=skip)
    out = one.models[0](torch.tensor([chunk(one.tokenizers[0], "red cat")[0].ids]))
    assert torch.equal(context, one.models[0].final_norm(out.hidden[-(skip + 1)]))


@pytest.mark.parametrize("skip", [None, 0, 1, 2])
def test_two_encoders_give_their_last_layer_but_one(two: TextEncoder, skip: int | None) -> None:
    context, pooled = two.encode(["red cat!"], clip_skip=skip)
    outs = [
        model(torch.tensor([chunk(tokenizer, "red cat!")[0].ids]))
        for tokenizer, model in zip(two.tokenizers, two.models, strict=True)
    ]
    wanted = torch.cat([out.hidden[-2 if skip is None else -(skip + 2)] for out in outs], dim=-1)
    assert torch.equal(context, wanted)
    assert context.shape == (1, 8, 40)
    assert pooled is not None
    assert torch.equal(pooled, outs[1].pooled)
    assert pooled.shape == (1, 20)


@pytest.mark.parametrize("skip", [-1, 4, 10**6])
def test_clip_skip_out_of_range(one: TextEncoder, skip: int) -> None:
    with pytest.raises(UsageError, match=f"clip_skip is {skip}: must be 0 to 3"):
        one.encode(["cat"], clip_skip=skip)


def test_clip_skip_of_two_encoders_is_bounded_by_the_smaller(two: TextEncoder) -> None:
    with pytest.raises(UsageError, match="clip_skip is 3: must be 0 to 2"):
        two.encode(["cat"], clip_skip=3)


def test_long_prompts_are_chunks_side_by_side(two: TextEncoder) -> None:
    words = ["red cat dog red cat dog", "dog cat red"]
    context, pooled = two.encode([" ".join(words)])
    first, first_pooled = two.encode([words[0]])
    second, _ = two.encode([words[1]])
    assert context.shape == (1, 16, 40)
    torch.testing.assert_close(context, torch.cat([first, second], dim=1))
    assert pooled is not None
    assert first_pooled is not None
    torch.testing.assert_close(pooled, first_pooled)


def test_chunks_makes_positive_and_negative_agree(two: TextEncoder) -> None:
    count = two.chunks("cat " * 13)
    assert count == 3
    context, _ = two.encode(["dog"], chunks=count)
    alone, _ = two.encode(["dog"])
    empty, _ = two.encode([""])
    torch.testing.assert_close(context, torch.cat([alone, empty, empty], dim=1))
    both, _ = two.encode(["cat " * 13, "dog"])
    torch.testing.assert_close(both[1:], context)


def test_too_few_chunks(two: TextEncoder) -> None:
    with pytest.raises(UsageError, match="chunks is 1: the longest prompt takes 2"):
        two.encode(["cat", "cat " * 7], chunks=1)


def test_tokenizers_that_count_differently(two: TextEncoder) -> None:
    """Where `!` is the padding it is a token wherever it stands, so that the second tokenizer counts more here."""
    text = "!! !! !! !!"
    assert [len(chunk(tokenizer, text)) for tokenizer in two.tokenizers] == [1, 2]
    assert two.chunks(text) == 2
    context, _ = two.encode([text])
    empty, _ = two.encode([""])
    assert context.shape == (1, 16, 40)
    torch.testing.assert_close(context[:, 8:, :16], empty[:, :, :16])


def test_equal_prompts_are_encoded_once(one: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    forward = one.models[0].forward
    monkeypatch.setattr(one.models[0], "forward", lambda ids: rows.append(len(ids)) or forward(ids))
    context, _ = one.encode(["cat", "dog", "cat", "", "dog"], chunks=3)
    assert rows == [3]
    assert torch.equal(context[0], context[2])
    assert torch.equal(context[1], context[4])
    assert not torch.equal(context[0], context[1])


def test_order_of_the_batch_is_kept(two: TextEncoder) -> None:
    prompts = ["cat", "dog", "", "red dog", "cat " * 9]
    context, pooled = two.encode(prompts)
    assert pooled is not None
    for index, prompt in enumerate(prompts):
        alone, alone_pooled = two.encode([prompt], chunks=2)
        assert alone_pooled is not None
        torch.testing.assert_close(context[index : index + 1], alone)
        torch.testing.assert_close(pooled[index : index + 1], alone_pooled)


def test_emphasis_scales_tokens_and_keeps_the_mean(one: TextEncoder) -> None:
    plain, _ = one.encode(["red cat dog"])
    strong, _ = one.encode(["red (cat:1.5) dog"], emphasis=True)
    ratio = strong / plain
    torch.testing.assert_close(ratio[0, 2], 1.5 * ratio[0, 1], rtol=1e-4, atol=0)
    for row in (0, 1, 3, 4, 7):
        torch.testing.assert_close(ratio[0, row], ratio[0, 0, :1].expand(16), rtol=1e-4, atol=0)
    assert float(strong.mean()) == pytest.approx(float(plain.mean()), rel=1e-4)


def test_emphasis_is_a_matter_of_its_own_prompt_and_chunk(one: TextEncoder) -> None:
    text = "red red red red red red (dog:1.4)"
    context, _ = one.encode(["cat", text, "cat"], emphasis=True)
    plain, _ = one.encode(["cat", text.replace("(", "").replace(":1.4)", ""), "cat"])
    assert torch.equal(context[0], plain[0])
    assert torch.equal(context[1, :8], plain[1, :8])
    assert not torch.allclose(context[1, 8:], plain[1, 8:])
    alone, _ = one.encode([text], emphasis=True)
    torch.testing.assert_close(context[1:2], alone)


def test_emphasis_option_without_emphasis_changes_no_bit(two: TextEncoder) -> None:
    for prompt in ("red cat", "", r"(cat:1.0) \(dog\)"):
        plain = prompt.replace("(cat:1.0)", "cat").replace("\\", "")
        assert torch.equal(two.encode([prompt], emphasis=True)[0], two.encode([plain])[0])


def test_weights_of_zero_are_finite(one: TextEncoder) -> None:
    context, _ = one.encode(["(red cat dog:0)"], emphasis=True)
    assert context.isfinite().all()
    assert (context[0, 1:4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_have_the_encoders_dtype(tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    encoder = TextEncoder([tokenizer] * 2, [clip().to(dtype), clip(projection=20).to(dtype)])
    for prompt in ("cat", "(cat:1.2)"):
        context, pooled = encoder.encode([prompt], emphasis=True)
        assert pooled is not None
        assert context.dtype == pooled.dtype == dtype


def test_tokenizer_and_encoder_of_different_models(tokenizer: Tokenizer, tmp_path: Path) -> None:
    larger = Tokenizer.load(folder(tmp_path / "larger", added_tokens={"<mine>": len(VOCAB)}))
    longer = Tokenizer.load(folder(tmp_path / "longer", tokenizer_config={"model_max_length": 7}))
    with pytest.raises(CheckpointError, match=f"has {len(VOCAB) + 1} tokens and its text encoder knows {len(VOCAB)}"):
        TextEncoder([larger], [clip()])
    with pytest.raises(CheckpointError, match="length is 8: its encoder has 7 positions"):
        TextEncoder([tokenizer], [clip(positions=7)])
    with pytest.raises(CheckpointError, match="differ in length"):
        TextEncoder([tokenizer, longer], [clip(), clip()])
    with pytest.raises(CheckpointError, match="2 tokenizers and 1 text encoders"):
        TextEncoder([tokenizer] * 2, [clip()])
    with pytest.raises(CheckpointError, match="0 tokenizers and 0 text encoders"):
        TextEncoder([], [])
