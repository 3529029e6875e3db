"""Tokenizers: training a small one, loading any ``tokenizer.json``, finding the ids the objective needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.errors import DataError
from data_prep.files import sha256_file

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
SMALLEST_BPE = 256 + len(TRAINED_SPECIALS)


class SpecialIds(NamedTuple):
    """Ids a model needs to know; ``vocab_size`` counts the mask."""

    bos: int
    eos: int
    mask: int
    vocab_size: int


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with ``<|bos|>``, ``<|eos|>`` and ``<|mask|>`` as ids 0, 1 and 2.

    Byte-level, because it encodes any text without an unknown token and decodes it exactly; words are split
    as GPT-2's are. A merge needs two occurrences, so a small text may give fewer than ``vocab_size`` entries.
    Equal texts in equal order give an equal tokenizer.

    Raises:
        DataError: ``vocab_size`` has no room for the 256 bytes and the three special tokens.
    """
    if vocab_size < SMALLEST_BPE:
        raise DataError(
            f"tokenizer=bpe:{vocab_size}: no room for 256 bytes and 3 special tokens; use bpe:{SMALLEST_BPE}"
        )
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
    """Load a ``tokenizer.json``; truncation and padding that the file asks for are switched off.

    Raises:
        DataError: the file is missing or is not a tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: no such tokenizer file; give the path of a tokenizer.json (bd3 prep trains one for bpe:N)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a tokenizer ({reason}); give a tokenizer.json that `tokenizers` wrote") from None
    # Truncation stored in the file would cut every document without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def shared_tokenizer(path: str | Path) -> Tokenizer:
    """As :func:`load_tokenizer`; the last one is kept, and serves every file of the same content. Do not change it."""
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

    ``bos`` and ``eos`` name tokens of the vocabulary. Left out, the usual names are looked up among the
    tokenizer's added tokens (an ordinary entry that happens to read ``<s>`` is none), and either stands in
    for the other. A tokenizer without a mask gets a new last id: 50257 entries become 50258.

    Raises:
        DataError: a named token is not in the vocabulary, or neither BOS nor EOS can be found.
    """
    added = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
    found = {}
    for role, name, usual in (("bos", bos, BOS_NAMES), ("eos", eos, EOS_NAMES)):
        if name is not None:
            found[role] = tokenizer.token_to_id(name)
            if found[role] is None:
                raise DataError(f"--{role} {name}: the tokenizer has no such token; name one of its entries")
        else:
            found[role] = _first(usual, added)
    if found["bos"] is None and found["eos"] is None:
        raise DataError(
            f"tokenizer: no known BOS or EOS among its special tokens ({', '.join(added) or 'it has none'}); "
            "name them with --bos and --eos"
        )
    start = found["bos"] if found["bos"] is not None else found["eos"]
    end = found["eos"] if found["eos"] is not None else found["bos"]
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps: count ids, not entries
    mask = _first(MASK_NAMES, added)
    if mask is None:
        return SpecialIds(start, end, mask=size, vocab_size=size + 1)
    return SpecialIds(start, end, mask, size)


def _first(names: Sequence[str], added: dict[str, int]) -> int | None:
    return next((added[name] for name in names if name in added), None)


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest of little-endian uint16 and uint32 that holds every id below ``vocab_size``."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without special tokens: ``<|eos|>`` spelled out in a text is text, not an end."""
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
