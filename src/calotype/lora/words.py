"""Words that were learnt along with an adapter and are in its file, under keys `bundle_emb.WORD.KIND`: OneTrainer's
additional embeddings, AUTOMATIC1111's bundles.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from calotype.errors import CalotypeWarning, CheckpointError, UsageError
from calotype.lora.deltas import LoRA
from calotype.text import inversion
from calotype.text.encode import TextEncoder
from calotype.text.inversion import Inversion

PREFIX = "bundle_emb."
# What vectors are called, by their encoder; the first may be the only one. A word's only tensor may have any name.
ENCODERS = {"clip_l": 0, "clip_h": 0, "string_to_param.*": 0, "emb_params": 0, "*": 0, "clip_g": 1}
OUTPUTS = ("clip_l_out", "clip_g_out", "clip_h_out")  # OneTrainer's, for behind the text encoder instead of before it
UNTOLD = ("emb_params", "clip_l", "clip_g")  # ai-toolkit's: vectors without the word, which its training script names
NEEDLESS = ("string_to_token.*", "step", "name", "sd_checkpoint", "sd_checkpoint_name")  # of a whole textual inversion
KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, (*ENCODERS, *OUTPUTS, *NEEDLESS)))})")
OTHER_KEY = re.compile(r"([^.]+)\.(.+)")


def is_of_word(key: str) -> bool:
    """Whether a key of an adapter's file is of a word."""
    return key.startswith(PREFIX) or key in UNTOLD


def read_words(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Inversion, ...]:
    """The words in an adapter's file. One for which there is no place is left out (CalotypeWarning).

    Raises CheckpointError where vectors are no vectors, or a word cannot be typed.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        rest = key.removeprefix(PREFIX)
        if rest != key:
            match = KEY.fullmatch(rest) or OTHER_KEY.fullmatch(rest)
            if match is None:
                raise CheckpointError(
                    f"{path}: {key!a:.120} says no word", f"known is {PREFIX}WORD.clip_l, or emb_params"
                )
            if match[2] not in NEEDLESS:
                found.setdefault(match[1], {})[match[2]] = tensor
    if untold := [key for key in UNTOLD if key in tensors]:
        _warn(f"{path} holds vectors of a word and not the word ({', '.join(untold)}): they are left out")
    words = (_word(f"{path}: {PREFIX}{ascii(word)[1:-1][:80]}", word, kinds) for word, kinds in found.items())
    return tuple(word for word in words if word is not None)


def _word(where: str, word: str, kinds: Mapping[str, Tensor]) -> Inversion | None:
    if outputs := kinds.keys() & {*OUTPUTS}:
        _warn(f"{where} is left out: its {min(outputs)} goes behind the text encoder, which is not built")
        return None
    if len(kinds) == 1 and "clip_g" not in kinds:
        encoders = dict.fromkeys(kinds, 0)
    else:
        encoders = {kind: ENCODERS.get(kind, -1) for kind in kinds}
    ordered = sorted(kinds, key=lambda kind: encoders[kind])
    if [encoders[kind] for kind in ordered] not in ([0], [0, 1]):
        raise CheckpointError(
            f"{where} has {', '.join(sorted(kinds))[:120]!a}: it needs one tensor, or clip_l and clip_g",
            "known are textual inversions of one text encoder, and of SDXL's two",
        )
    vectors = tuple(inversion.rows(f"{where}.{kind}", kinds[kind]).clone() for kind in ordered)
    try:
        return Inversion(inversion.check_word(word), vectors)
    except UsageError as error:
        raise CheckpointError(f"{where}: {error.message}", "the word is a part of its key in the file") from error


def _warn(message: str) -> None:
    warnings.warn(message, CalotypeWarning, stacklevel=5)


class Words:
    """The words that adapters taught a text encoder. Of two that bring the same word the first counts; one that the
    model knows, or that was added by itself, stays what it is.
    """

    def __init__(self, text: TextEncoder) -> None:
        self._text = text
        self._owners: dict[str, str] = {}  # word in lower case -> the adapter that taught it

    def check(self, name: str, lora: LoRA) -> list[Inversion]:
        """Those of an adapter's words that can be learnt now; it warns of the others.

        Raises CheckpointError where one was learnt by another family's encoder.
        """
        found: list[Inversion] = []
        for word in lora.words:
            try:
                inversion.check(self._text, word)
                if word.token.lower() in {other.token.lower() for other in found}:
                    raise UsageError(f"the token {word.token!a} is in it twice")
                found.append(word)
            except UsageError as error:
                _warn(f"the LoRA {name!r} comes with a word, which is left out: {error.message}")
        return found

    def learn(self, name: str, words: Iterable[Inversion]) -> None:
        """Teaches words that `check` gave."""
        for word in words:
            inversion.add(self._text, word)
            self._owners[word.token.lower()] = name

    def forget(self, name: str, others: Mapping[str, LoRA]) -> None:
        """Forgets the words that an adapter taught; where one of the others brings such a word too, that is learnt."""
        gone = {word for word, owner in self._owners.items() if owner == name}
        for token in gone:
            self._release(token)
        self._learn_again(gone, others)

    def remove(self, token: str, loras: Mapping[str, LoRA]) -> None:
        """Forgets a word that was added by itself; where a LoRA brings such a word, that is learnt."""
        inversion.remove(self._text, token)
        self._learn_again({token.lower()}, loras)

    def _learn_again(self, gone: set[str], loras: Mapping[str, LoRA]) -> None:
        for name, lora in loras.items():
            for word in lora.words:
                if word.token.lower() in gone - self._owners.keys():
                    self.learn(name, [word])

    def give_way(self, learnt: Inversion) -> None:
        """Forgets an adapter's word where another is to be added in its place. Raises CheckpointError if it cannot."""
        token = learnt.token.lower()
        if token in self._owners:
            inversion.check_widths(self._text, learnt)
            _warn(f"the token {learnt.token!a} now means this, and not what the LoRA {self._owners[token]!r} came with")
            self._release(token)

    def _release(self, token: str) -> None:
        del self._owners[token]
        inversion.remove(self._text, token)
