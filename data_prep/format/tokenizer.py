"""Tokenizers: training of a byte-level BPE, loading of a ``tokenizer.json``, ids of BOS, EOS and mask."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bd3_common.text import shorten
from data_prep.errors import DataError
from data_prep.format.files import sha256_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS_NAMES = (
    "<|bos|>",
    "<bos>",
    "<s>",
    "[CLS]",
    "[BOS]",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<|endoftext|>",
)
EOS_NAMES = ("<|eos|>", "<eos>", "</s>", "[SEP]", "[EOS]", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>")
MASK_NAMES = ("<|mask|>", "<|MASK|>", "[MASK]", "<mask>")
TRAINED_SPECIALS = ("<|bos|>", "<|eos|>", "<|mask|>")
CHUNK = 1 << 20  # characters encoded at once
LONGEST_CHUNK = 8 << 20  # characters, if there is no earlier place to cut
AROUND = 256  # characters on either side that decide whether a text can be cut there
MOST_TRIED = 100  # places in each direction
SMALLEST_BPE = 256 + len(TRAINED_SPECIALS)


class SpecialIds(NamedTuple):
    """Ids that the model needs; ``vocab_size`` includes the mask."""

    bos: int
    eos: int
    mask: int
    vocab_size: int


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with ``<|bos|>``, ``<|eos|>`` and ``<|mask|>`` as ids 0, 1 and 2.

    A byte-level BPE encodes any text without an unknown token and decodes it exactly; words are split as in GPT-2.
    A merge needs two occurrences, so a small text may give fewer than ``vocab_size`` entries. Equal texts in equal
    order give an equal tokenizer.

    Raises:
        DataError: ``vocab_size`` has no room for the 256 bytes and the three special tokens.
    """
    if vocab_size < SMALLEST_BPE:
        raise DataError(
            f"tokenizer=bpe:{vocab_size}: no room for 256 bytes and 3 special tokens; use bpe:{SMALLEST_BPE}"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(TRAINED_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a ``tokenizer.json``; its truncation and padding are switched off.

    Raises:
        DataError: the file is missing or is not a tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: no such tokenizer file; give the path of a tokenizer.json (bd3 prep trains one for bpe:N)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        reason = shorten(" ".join(str(error).split()), 160)
        raise DataError(f"{path}: not a tokenizer ({reason}); give a tokenizer.json that `tokenizers` wrote") from None
    # Truncation stored in the file would silently cut every document.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def shared_tokenizer(path: str | Path) -> Tokenizer:
    """As :func:`load_tokenizer`, with a cache of one tokenizer by content. Do not change the result."""
    path = Path(path)
    digest = sha256_file(path) if path.is_file() else ""
    if digest not in _shared:
        tokenizer = load_tokenizer(path)
        _shared.clear()
        _shared[digest] = tokenizer
    return _shared[digest]


_shared: dict[str, Tokenizer] = {}  # by sha256 of the file


def special_ids(tokenizer: Tokenizer, bos: str | None = None, eos: str | None = None) -> SpecialIds:
    """Find BOS, EOS and mask.

    ``bos`` and ``eos`` name tokens of the vocabulary. By default the usual names are looked up among the tokenizer's
    added tokens (not among ordinary entries, such as a learned ``<s>``), and if one is missing, the other is used for
    both. A tokenizer without a mask gets a new last id: 50257 entries become 50258.

    Raises:
        DataError: a named token is not in the vocabulary, or neither BOS nor EOS can be found.
    """
    added = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
    found: dict[str, int | None] = {}
    for role, name, usual in (("bos", bos, BOS_NAMES), ("eos", eos, EOS_NAMES)):
        if name is not None:
            found[role] = tokenizer.token_to_id(name)
            if found[role] is None:
                raise DataError(f"--{role} {name}: the tokenizer has no such token; name one of its entries")
        else:
            found[role] = _first(usual, added)
    start = found["bos"] if found["bos"] is not None else found["eos"]
    end = found["eos"] if found["eos"] is not None else found["bos"]
    if start is None or end is None:
        raise DataError(
            f"tokenizer: no known BOS or EOS among its special tokens ({', '.join(added) or 'it has none'}); "
            "name them with --bos and --eos"
        )
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps: count ids, not entries
    mask = _first(MASK_NAMES, added)
    if mask is None:
        return SpecialIds(start, end, mask=size, vocab_size=size + 1)
    return SpecialIds(start, end, mask, size)


def _first(names: Sequence[str], added: dict[str, int]) -> int | None:
    return next((added[name] for name in names if name in added), None)


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16 if every id below ``vocab_size`` fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Sequence[int] | None]:
    """Ids of each text, without special tokens: a literal ``<|eos|>`` is encoded as text.

    A text of more than ``CHUNK`` characters is encoded in chunks, because an encoding takes a hundred times the memory
    of its text. The result is None if a text cannot be cut for ``LONGEST_CHUNK`` characters.
    """
    tokenizer.encode_special_tokens = True
    short = [text for text in texts if len(text) <= CHUNK]
    ids = iter([encoding.ids for encoding in tokenizer.encode_batch_fast(short, add_special_tokens=False)])
    return [next(ids) if len(text) <= CHUNK else _encode_long(tokenizer, text) for text in texts]


def _encode_long(tokenizer: Tokenizer, text: str) -> array[int] | None:
    ids, begin = array("I"), 0
    while begin < len(text):
        end = _cut(tokenizer, text, begin)
        if end is None:
            return None
        (chunk,) = tokenizer.encode_batch_fast([text[begin:end]], add_special_tokens=False)
        ids.extend(chunk.ids)
        begin = end
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
