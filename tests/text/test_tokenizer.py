"""The tokenizer of a model folder: what the files say and what is refused (parity: parity/test_clip_text.py)."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from calotype.errors import CheckpointError, UsageError
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


# ---- what the files say ----


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


# ---- what is refused ----


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
