"""CLIP's tokenizer, read from a model folder, or from CLIP's own tables, which ship with the package.

The two layouts, tokenizer.json and vocab.json + merges.txt, hold the same two tables: the vocabulary and the merges.
The rest of the pipeline (normalisation, the split into words, bytes, `</w>`) is CLIP's own and is built here, so that a
file cannot bring another one along.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calotype.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import tokenizers

MAX_FILE_BYTES = 50_000_000  # CLIP's own tokenizer.json has 3.6 MB
MAX_TOKENS = 1_000_000  # CLIP's vocabulary has 49,408
DEFAULT_LENGTH = 77  # CLIP's
MAX_LENGTH = 4096  # above it, model_max_length is the 1e30 by which transformers says "not set"

START, END = "<|startoftext|>", "<|endoftext|>"
# The order in which special tokens are registered: where two of them have the same text, the last one's flags count.
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")

# CLIP's words: the two markers, English clitics, a run of letters, one digit, a run of anything else that is not space.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

Merges = list[tuple[str, str]]
Files = Callable[[str], str | None]  # a file's name -> its text, or None where there is no such file


class Tokenizer:
    """Text to token ids.

    bos, eos, pad: the ids that start, end and fill a chunk; length: the tokens of a chunk, these included; size: the
    rows that an embedding table needs, one more than the highest id; added: words of textual inversions, in lower case,
    and their rows behind the vocabulary (see text.inversion).
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, bos: int, eos: int, pad: int, length: int, size: int) -> None:
        self.backend = backend
        self.bos, self.eos, self.pad = bos, eos, pad
        self.length = length
        self.size = size
        self.added: dict[str, tuple[int, ...]] = {}

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a model folder.

        Raises CheckpointError, in one line, for files that are missing, malformed, too large or that disagree.
        """
        folder = Path(folder)
        return cls.read(cache(lambda name: _read_text(folder / name) if (folder / name).is_file() else None), folder)

    @classmethod
    def clip(cls, texts: Mapping[str, str], where: Path) -> Tokenizer:
        """The tokenizer of files that may lack the tables (tokenizer_config.json says how to pad): CLIP's are taken."""
        own = TABLES[0] in texts or TABLES[1] in texts
        return cls.read((texts if own else {**clip_tables(), **texts}).get, where)

    @classmethod
    def read(cls, files: Files, where: Path) -> Tokenizer:
        """The tokenizer of files that need not be on a disk; `where` is for messages. Raises CheckpointError."""
        vocab, merges, listed = _tables(files, where)
        config = _read_object(files, where, "tokenizer_config.json")
        special, added = _special_tokens(files, where, config, listed)
        backend = _pipeline(where, vocab, merges, unknown=special["unk_token"]["content"])
        _add(where, backend, special, added)
        ids = vocab | {token["content"]: index for index, token in added.items()}
        bos, eos, pad = (ids[special[name]["content"]] for name in ("bos_token", "eos_token", "pad_token"))
        length, size = _length(where, config), max(ids.values()) + 1
        return cls(backend, bos=bos, eos=eos, pad=pad, length=length, size=size)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text of any length, without start, end or padding.

        A special token that is spelled out in the text, such as `<|endoftext|>`, or `!` where that is the padding,
        becomes that token, as in transformers. So does an added word, wherever it stands, in upper or lower case.
        """
        if not self.added:
            return self._known(text)
        longest_first = sorted(self.added, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text, flags=re.IGNORECASE)
        found = [self.added.get(piece.lower()) for piece in pieces]
        return [
            index
            for piece, rows in zip(pieces, found, strict=True)
            for index in (self._known(piece) if rows is None else rows)
        ]

    def _known(self, text: str) -> list[int]:
        """Token ids of a text without added words."""
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # the library wants valid Unicode: no lone surrogates
            raise UsageError("the text is not valid Unicode: it cannot be split into tokens") from None


def _pipeline(folder: Path, vocab: dict[str, int], merges: Merges, unknown: str) -> tokenizers.Tokenizer:
    """CLIP's byte-level BPE (Radford et al. 2021, section 2.4) over these tables."""
    # Imported on use: 15 ms that `import calotype` should not pay.
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    try:
        model = models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=unknown if unknown in vocab else None,  # never met where the vocabulary has all bytes, as CLIP's
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{folder}: the merges do not fit the vocabulary: {error}") from None
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


# ---- CLIP's own tables ----

TABLES = ("tokenizer.json", "vocab.json", "merges.txt")  # the files that hold them, in either layout


@cache
def clip_tables() -> dict[str, str]:
    """CLIP's vocab.json and merges.txt. The ids follow from the merges: the bytes, the bytes that end a word, what each
    merge makes, and the two markers (Radford et al. 2021, arXiv 2103.00020, section 2.4; 49,408 tokens).
    """
    merges = gzip.decompress((Path(__file__).parent / "clip" / "merges.txt.gz").read_bytes()).decode("utf-8")
    letters = byte_letters()
    made = [line.replace(" ", "") for line in merges.split("\n")[1:] if line]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *made, START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    return {"vocab.json": json.dumps(vocab, ensure_ascii=False), "merges.txt": merges}


def byte_letters() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's and CLIP's tables, the printable bytes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def has_clip_tables(folder: Path) -> bool:
    """Whether a folder's tokenizer has CLIP's own tables, so that they need not be kept with a model."""
    texts = {name: _read_text(folder / name) for name in TABLES if (folder / name).is_file()}
    return _tables(texts.get, folder)[:2] == _tables(clip_tables().get, folder)[:2]


# ---- reading ----


def _tables(files: Files, where: Path) -> tuple[dict[str, int], Merges, list[Any]]:
    """Vocabulary, merges and listed added tokens, from whichever layout the files have (tokenizer.json first)."""
    if files("tokenizer.json") is not None:
        return _tables_of_tokenizer_json(files, where)
    merges = files("merges.txt")
    if files("vocab.json") is not None and merges is not None:
        vocab = _vocabulary(where / "vocab.json", _read_object(files, where, "vocab.json"))
        return vocab, _merges_of_text(where / "merges.txt", merges), []
    raise CheckpointError(
        f"{where} holds no tokenizer",
        "it needs tokenizer.json, or vocab.json and merges.txt, as in a diffusers folder",
    )


def _tables_of_tokenizer_json(files: Files, where: Path) -> tuple[dict[str, int], Merges, list[Any]]:
    path, content = where / "tokenizer.json", _read_object(files, where, "tokenizer.json")
    model, listed = content.get("model"), content.get("added_tokens", [])
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("end_of_word_suffix") != "</w>":
        raise CheckpointError(
            f"{path} is not a CLIP tokenizer: its model must be BPE with the end-of-word suffix '</w>'"
        )
    merges = model.get("merges")
    if not isinstance(merges, list) or not isinstance(listed, list):
        raise CheckpointError(f"{path}: merges and added_tokens must be lists")
    return _vocabulary(path, model.get("vocab")), [_merge(path, merge) for merge in merges], listed


def _vocabulary(path: Path, vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError(f"{path}: the vocabulary must be an object of token and id, and not empty")
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < MAX_TOKENS:
            raise CheckpointError(
                f"{path}: token {_short(token)} has the id {_short(index)}: must be 0 to {MAX_TOKENS - 1}"
            )
    return vocab


def _merges_of_text(path: Path, text: str) -> Merges:
    # Lines end in \n alone: str.splitlines would also break at characters that are tokens here.
    lines = [line.rstrip("\r") for line in text.split("\n")]
    return [_merge(path, line) for line in lines if line and not line.startswith("#version")]


def _merge(path: Path, merge: Any) -> tuple[str, str]:
    """A pair of tokens, written "a b" or ["a", "b"]."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
        raise CheckpointError(f"{path}: {_short(merge)} is not a merge: must be two tokens")
    return pair[0], pair[1]


def _special_tokens(
    files: Files, folder: Path, config: dict[str, Any], listed: list[Any]
) -> tuple[dict[str, dict[str, Any]], dict[int, dict[str, Any]]]:
    """What each special token is, and the added tokens by id.

    The precedence is transformers': tokenizer_config.json alone if it lists the added tokens; else
    special_tokens_map.json goes before it, and added_tokens.json and tokenizer.json have the list.
    """
    named = dict(config)
    added: dict[int, dict[str, Any]] = {}
    if "added_tokens_decoder" in config:
        for index, token in _as_object(folder / "tokenizer_config.json", config["added_tokens_decoder"]).items():
            added[_token_id(folder, index)] = _token(folder, token)
    else:
        named |= _read_object(files, folder, "special_tokens_map.json")
        texts = {_token(folder, named[name])["content"] for name in SPECIAL if named.get(name) is not None}
        for text, index in _read_object(files, folder, "added_tokens.json").items():
            added[_token_id(folder, index)] = _token(folder, {"content": text, "normalized": text not in texts})
        for token in listed:
            added[_token_id(folder, _as_object(folder / "tokenizer.json", token).get("id"))] = _token(folder, token)
    by_text = {token["content"]: token for token in added.values()}
    special = {}
    for name in SPECIAL:
        given = named.get(name)
        token = _token(folder, given if given is not None else (START if name == "bos_token" else END))
        special[name] = by_text.get(token["content"], token)
    return special, added


def _add(
    folder: Path, backend: tokenizers.Tokenizer, special: dict[str, dict[str, Any]], added: dict[int, dict[str, Any]]
) -> None:
    """Register the added tokens, then the special ones, so that they are found whole in a text."""
    from tokenizers import AddedToken

    tokens = {token["content"]: token for _, token in sorted(added.items())}
    for token in special.values():
        if token["content"] not in tokens and backend.token_to_id(token["content"]) is None:
            raise CheckpointError(f"{folder}: the special token {_short(token['content'])} is not in the vocabulary")
        tokens[token["content"]] = token
    special_texts = {token["content"] for token in special.values()}
    backend.add_tokens([AddedToken(special=text in special_texts, **flags) for text, flags in tokens.items()])
    for index, token in added.items():
        if backend.token_to_id(token["content"]) != index:
            raise CheckpointError(f"{folder}: the added token {_short(token['content'])} cannot have the id {index}")


def _token(folder: Path, value: Any) -> dict[str, Any]:
    """A token as its text and flags, from a string or from an object with "content"."""
    fields = {"content": value} if isinstance(value, str) else value
    text = fields.get("content") if isinstance(fields, dict) else None
    if not isinstance(text, str) or not text:
        raise CheckpointError(f"{folder}: {_short(value)} is not a token: must be a text, or an object with 'content'")
    return {"content": text} | {flag: fields[flag] is True for flag in FLAGS if flag in fields}


def _token_id(folder: Path, value: Any) -> int:
    """An id, written as a number or, as a key of JSON must be, as a text."""
    index = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 8 else value
    if type(index) is not int or not 0 <= index < MAX_TOKENS:
        raise CheckpointError(f"{folder}: an added token has the id {_short(value)}: must be 0 to {MAX_TOKENS - 1}")
    return index


def _length(folder: Path, config: dict[str, Any]) -> int:
    length = config.get("model_max_length", DEFAULT_LENGTH)
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 3:
        raise CheckpointError(f"{folder}: model_max_length is {_short(length)}: must be a whole number of at least 3")
    return DEFAULT_LENGTH if length > MAX_LENGTH else int(length)


def _as_object(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {_short(value)} must be an object")
    return value


def _read_object(files: Files, where: Path, name: str) -> dict[str, Any]:
    """A JSON file that holds an object; {} where it is absent."""
    text = files(name)
    if text is None:
        return {}
    try:
        return _as_object(where / name, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where / name} is not valid JSON: {error}") from None


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise CheckpointError(f"{path} is too large for a tokenizer: at most {MAX_FILE_BYTES} bytes")
        return content.decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _short(value: Any) -> str:
    """A value from a file, short enough for one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
