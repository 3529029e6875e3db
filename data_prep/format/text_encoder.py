"""Encoding of documents: no text gives a control id, long texts go in chunks, lost characters are counted."""

from __future__ import annotations

import json
import unicodedata
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bd3_common.errors import UserError
from bd3_common.formats.tokenizer_file import LibraryError, dump, library_errors, load_json
from bd3_common.text import shorten
from data_prep.format.files import sha256_file
from data_prep.format.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHUNK = 1 << 20  # characters encoded at once
LONGEST_CHUNK = 8 << 20  # characters, if there is no earlier place to cut
AROUND = 256  # characters on either side that decide whether a text can be cut there
MOST_TRIED = 100  # places in each direction
_UNWRITTEN = "\ue000\uf8ff"  # private characters, which turn a token into one that no text spells


class TextEncoder:
    """A tokenizer for documents. The letters of BOS, EOS and mask are text like any other.

    Special tokens are not looked for in a text. Control tokens are made special for that, if they are not. A model
    that has an entry for the letters themselves (Unigram, WordLevel) would still give the id: such a text is encoded
    again by a model whose entry no text can spell.

    Args:
        tokenizer: the encoder changes it.
        controls: ids that no text may give.
    """

    def __init__(self, tokenizer: Tokenizer, controls: Collection[int] = ()):
        self.tokenizer, self.controls = tokenizer, sorted(controls)
        _hide_added(tokenizer, self.controls)

    def encode(self, texts: Sequence[str]) -> list[array[int] | str]:
        """Ids of each text, or the reason why it has none.

        A text of more than ``CHUNK`` characters is encoded in chunks, because an encoding takes a hundred times the
        memory of its text. A text that cannot be cut for ``LONGEST_CHUNK`` characters has no ids.
        """
        return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> list[array[int] | str]:
        found = _encode_all(self.tokenizer, texts)
        arrays = [np.frombuffer(ids, np.uintc) for ids in found if not isinstance(ids, str)]
        if not arrays or not self._controls_in(np.concatenate(arrays)).size:
            return found
        for n, (ids, text) in enumerate(zip(found, texts)):
            if not isinstance(ids, str) and (wrong := self._controls_in(ids)).size:
                found[n] = self._again(text, int(wrong[0]))
        return found

    def _controls_in(self, ids: np.ndarray | array[int]) -> np.ndarray:
        ids = np.asarray(ids)
        return ids[np.isin(ids, self.controls)]

    def _again(self, text: str, control: int) -> array[int] | str:
        """Ids of a text in whose letters the model has found ``control``."""
        if self._strict is not None:
            ids = _encode_all(self._strict, [text])[0]
            if not isinstance(ids, str) and not self._controls_in(ids).size:
                return ids
        return (
            f"the text gives the id {control} of {shorten(self.tokenizer.id_to_token(control))}, which no text may "
            "give; choose other tokens with --bos, --eos, --mask and --pad, or another tokenizer"
        )

    @cached_property
    def _strict(self) -> Tokenizer | None:
        """The tokenizer with other letters for the control tokens; None if the library refuses it."""
        content = json.loads(self.tokenizer.to_str())
        _rename(content, self.controls)
        try:
            tokenizer = load_json(dump(content), "tokenizer.json")
        except UserError:
            return None
        _hide_added(tokenizer, self.controls)
        return tokenizer

    def lost(self, text: str) -> tuple[int, int]:
        """(number of characters, those lost) of a text: its ids do not stand for them.

        Lost is what the model has no token for, alone or as bytes (the unknown token stands for nothing), and what a
        normalizer or pre-tokenizer removes; not what a normalizer replaces (case, accents, compatibility forms). Spaces
        and control characters are not counted.
        """
        (ids,), size = self._encode([text]), len("".join(text.split()))
        if isinstance(ids, str):
            return size, size
        try:
            with library_errors():
                decoded = self.tokenizer.decode(ids, skip_special_tokens=False)
                if decoded == text:
                    return size, 0
                encoding = self.tokenizer.encode(text, add_special_tokens=False)
                if self._strict is not None and self._controls_in(array("I", encoding.ids)).size:
                    encoding = self._strict.encode(text, add_special_tokens=False)
                known = [index for index in encoding.ids if index != self._unknown]
                decoded = self.tokenizer.decode(known, skip_special_tokens=False)
        except LibraryError:
            return size, size
        there = bytearray(len(text))
        for index, (begin, end) in zip(encoding.ids, encoding.offsets):
            if index != self._unknown:
                there[begin:end] = b"\1" * (end - begin)
        gone = sum(not (there[n] or _blank(character)) for n, character in enumerate(text))
        # Each number alone may be too high: offsets after a dropped character, and letters that were replaced.
        missing = sum((Counter(text) - Counter(decoded)).values())
        broken = decoded.count("\ufffd") - text.count("\ufffd")  # incomplete bytes
        return size, min(max(min(gone, missing), broken), size)

    @cached_property
    def _unknown(self) -> int | None:
        model = json.loads(self.tokenizer.to_str())["model"]
        index: int | None = model.get("unk_id")
        return self.tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else index


def shared_encoder(path: str | Path, controls: Collection[int]) -> TextEncoder:
    """The encoder of a ``tokenizer.json``, with a cache of one by content and control ids.

    Raises:
        DataError: the file is missing or is not a tokenizer.
    """
    path = Path(path)
    key = (sha256_file(path) if path.is_file() else "", frozenset(controls))
    if key not in _shared:
        encoder = TextEncoder(load_tokenizer(path), controls)
        _shared.clear()
        _shared[key] = encoder
    return _shared[key]


_shared: dict[tuple[str, frozenset[int]], TextEncoder] = {}  # by sha256 of the file, and controls


def _hide_added(tokenizer: Tokenizer, controls: Collection[int]) -> None:
    """Make added tokens special and special tokens invisible in texts."""
    from tokenizers import AddedToken

    added = tokenizer.get_added_tokens_decoder()
    names = [added[index].content for index in controls if index in added and not added[index].special]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.encode_special_tokens = True


def _rename(content: dict[str, Any], controls: Collection[int]) -> None:
    """Change the letters of added control tokens in the model's vocabulary, so that no text spells them.

    An ordinary entry stays, because its letters may have no other token; so does the unknown token.
    """
    model, added = content["model"], {token["content"]: token for token in content["added_tokens"]}
    entries = model["vocab"]
    vocabulary = entries if isinstance(entries, dict) else {name: index for index, (name, _) in enumerate(entries)}
    kept = {model.get("unk_token"), None}
    names = {
        name: f"{_UNWRITTEN}{index}"
        for name, index in vocabulary.items()
        if index in controls and name in added and name not in kept and index != model.get("unk_id") and len(name) > 1
    }
    if isinstance(entries, dict):
        model["vocab"] = {names.get(name, name): index for name, index in entries.items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in entries]
    for name, other in names.items():
        added[name]["content"] = other
    if model.get("merges"):
        model["merges"] = [pair for pair in model["merges"] if not {*pair, "".join(pair)} & names.keys()]
    content["post_processor"] = None  # it may name them


def _blank(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) in ("Cc", "Cf")


def _encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[array[int] | str]:
    short = [text for text in texts if len(text) <= CHUNK]
    try:
        with library_errors():
            batch = tokenizer.encode_batch_fast(short, add_special_tokens=False)
    except LibraryError:
        return [_encode_one(tokenizer, text) for text in texts]
    ids = iter([array("I", encoding.ids) for encoding in batch])
    return [next(ids) if len(text) <= CHUNK else _encode_one(tokenizer, text) for text in texts]


def _encode_one(tokenizer: Tokenizer, text: str) -> array[int] | str:
    ids, begin = array("I"), 0
    try:
        with library_errors():
            while begin < len(text):
                end = _cut(tokenizer, text, begin)
                if end is None:
                    return (
                        f"a text of {len(text)} characters that this tokenizer cannot encode in chunks; "
                        "split it into documents"
                    )
                (chunk,) = tokenizer.encode_batch_fast([text[begin:end]], add_special_tokens=False)
                ids.extend(chunk.ids)
                begin = end
    except LibraryError as error:
        return f"the tokenizer cannot encode the text ({error}); use one with an unknown token or with bytes"
    return ids


def _cut(tokenizer: Tokenizer, text: str, begin: int) -> int | None:
    """End of a chunk from ``begin`` such that cutting there changes no token; None if there is none.

    Candidates are ends of words, backwards from ``CHUNK`` characters, then forwards. A candidate passes if the text
    around it has the same ids whole and cut: then no token and no rule of the tokenizer crosses it.
    """
    if len(text) - begin <= CHUNK:
        return len(text)
    for places in (range(begin + CHUNK, begin, -1), range(begin + CHUNK, min(begin + LONGEST_CHUNK, len(text)))):
        tried = 0
        for place in places:
            if text[place - 1].isalnum() and not text[place].isalnum():
                if _can_cut(tokenizer, text[max(place - AROUND, begin) : place], text[place : place + AROUND]):
                    return place
                tried += 1
                if tried == MOST_TRIED:
                    break
    return len(text) if len(text) - begin <= LONGEST_CHUNK else None


def _can_cut(tokenizer: Tokenizer, before: str, after: str) -> bool:
    whole, one, two = tokenizer.encode_batch_fast([before + after, before, after], add_special_tokens=False)
    return whole.ids == one.ids + two.ids
