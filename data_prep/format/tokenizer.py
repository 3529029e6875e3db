"""Tokenizers: training of a byte-level BPE, loading of a ``tokenizer.json``, ids of BOS, EOS, mask and padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bd3_common.formats.tokenizer_file import read_tokenizer
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
MASK_NAMES = ("<|mask|>", "<|MASK|>", "[MASK]", "<mask>", "<|mdm_mask|>")
TRAINED_SPECIALS = ("<|bos|>", "<|eos|>", "<|mask|>")
SMALLEST_BPE = 256 + len(TRAINED_SPECIALS)


class SpecialIds(NamedTuple):
    """Ids that the model needs; ``vocab_size`` is the largest id plus 1, the mask's included."""

    bos: int
    eos: int
    mask: int
    vocab_size: int
    pad: int | None = None  # of a token named for padding; training has none


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
    """Load a ``tokenizer.json`` without its truncation, padding and sampling (BPE dropout).

    Raises:
        DataError: the file is missing or is not a tokenizer.
    """
    return read_tokenizer(path, DataError).load()


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


def special_ids(
    tokenizer: Tokenizer,
    bos: str | None = None,
    eos: str | None = None,
    mask: str | None = None,
    pad: str | None = None,
) -> SpecialIds:
    """Find BOS, EOS and mask.

    Arguments name tokens of the vocabulary. By default the usual names are looked up among the tokenizer's added
    tokens (not among ordinary entries, such as a learned ``<s>``), and if BOS or EOS is missing, the other is used for
    both. A tokenizer without a mask gets a new last id: 50257 entries become 50258. Ids without a token (holes) count.

    Raises:
        DataError: a named token is not in the vocabulary, neither BOS nor EOS can be found, the mask is one of them,
            or another token has the same id.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise DataError("tokenizer: it has no tokens; give another tokenizer.json")
    added = _added(tokenizer)
    found: dict[str, int | None] = {}
    usual_names: dict[str, Sequence[str]] = {"bos": BOS_NAMES, "eos": EOS_NAMES, "mask": MASK_NAMES, "pad": ()}
    for (role, usual), name in zip(usual_names.items(), (bos, eos, mask, pad)):
        found[role] = _first(usual, added) if name is None else tokenizer.token_to_id(name)
        if name is not None and found[role] is None:
            raise DataError(f"--{role} {shorten(name)}: the tokenizer has no such token; name one of its entries")
    start = found["bos"] if found["bos"] is not None else found["eos"]
    end = found["eos"] if found["eos"] is not None else found["bos"]
    if start is None or end is None:
        names = ", ".join(map(shorten, list(added)[:20])) or "it has none"
        raise DataError(
            f"tokenizer: no known BOS or EOS among its special tokens ({names}); name them with --bos and --eos"
        )
    size = max(vocabulary.values()) + 1  # ids may have gaps: count ids, not entries
    masked = found["mask"]
    special = SpecialIds(
        start, end, size if masked is None else masked, size + 1 if masked is None else size, found["pad"]
    )
    _check_distinct(tokenizer, special, vocabulary)
    return special


def _check_distinct(tokenizer: Tokenizer, special: SpecialIds, vocabulary: dict[str, int]) -> None:
    """Check that the mask is no other special token, and that no other token has an id of theirs."""
    for role in ("bos", "eos", "pad"):
        if getattr(special, role) == special.mask:
            name = tokenizer.id_to_token(special.mask)
            raise DataError(f"--mask {shorten(name)}: is the token of --{role}; the mask must be another")
    controls = control_ids(special)
    names: dict[int, list[str]] = {}
    for name, index in vocabulary.items():
        if index in controls:
            names.setdefault(index, []).append(name)
    for index, same in names.items():
        if len(same) > 1:
            first, second = map(shorten, sorted(same)[:2])
            raise DataError(
                f"tokenizer: id {index} has two tokens, {first} and {second}; give a tokenizer.json with an id for each"
            )


def control_ids(special: SpecialIds) -> frozenset[int]:
    """Ids that no text may give."""
    return frozenset(index for index in (special.bos, special.eos, special.mask, special.pad) if index is not None)


def unused_masks(tokenizer: Tokenizer, special: SpecialIds) -> list[str]:
    """Tokens that look like a mask and are not the mask."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    names = {name for name in MASK_NAMES if name in vocabulary}
    names |= {name for name in _added(tokenizer) if "mask" in name.casefold()}
    return sorted(name for name in names if vocabulary[name] != special.mask)


def remarks(path: str | Path, special: SpecialIds, mask: str | None = None) -> list[str]:
    """Lines about a ``tokenizer.json`` that a user should know: options and tokens of it that are not used.

    Args:
        mask: name that the user has given to the mask, after which there is nothing to add about masks.
    """
    file = read_tokenizer(path, DataError)
    lines, tokenizer = list(file.remarks), shared_tokenizer(path)
    unused = [] if mask is not None else unused_masks(tokenizer, special)
    if unused:
        name = tokenizer.id_to_token(special.mask)
        taken = "a new last id" if name is None else shorten(name)
        lines.append(
            f"{path}: {', '.join(map(shorten, unused[:5]))}: not used as the mask, which is {taken} ({special.mask}); "
            "to use it, name it with --mask"
        )
    for token in file.content.get("added_tokens") or []:
        index = tokenizer.token_to_id(token["content"])
        if index is not None and index != token["id"]:
            lines.append(
                f"{path}: added token {shorten(token['content'])}: its id is {index}, as `tokenizers` counts, not "
                f"{token['id']} as the file says"
            )
            break
    return lines


def _added(tokenizer: Tokenizer) -> dict[str, int]:
    return {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}


def _first(names: Sequence[str], added: dict[str, int]) -> int | None:
    return next((added[name] for name in names if name in added), None)


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16 if every id below ``vocab_size`` fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
