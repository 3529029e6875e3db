"""The tokenizer of a checkpoint that is written: its mask, its special tokens, its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bd3_common.errors import ConfigError
from bd3_common.formats.tokenizer_file import dump, load_json, read_tokenizer
from bd3_megatron.config import ModelConfig
from bd3_megatron.hf.files import json_text, write_json
from bd3_megatron.hf.formats import Contents, TokenIds

MASK_TOKEN = "<|mask|>"


def write_tokenizer(folder: Path, content: Mapping[str, Any], tokens: TokenIds, model: ModelConfig) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, as transformers reads them.

    Args:
        content: of :func:`tokenizer_with_mask`.
    """
    data = dump(content)
    (folder / "tokenizer.json").write_bytes(data)
    tokenizer = load_json(data, folder / "tokenizer.json", ConfigError)
    write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, tokens, model))


def tokenizer_files(contents: Contents, vocab_size: int, mask: tuple[str, int] | None = None) -> dict[str, str]:
    """Tokenizer of a checkpoint: texts by the names of the files; none without a tokenizer.

    Args:
        vocab_size: of the model that is written.
        mask: token and id of the mask in the checkpoint; None: a causal model, which has none.

    Raises:
        ConfigError: it cannot be read, has more tokens than the model, or no place for the mask.
    """
    if contents.tokenizer is None:
        return {}
    file = read_tokenizer(contents.tokenizer, ConfigError)
    tokenizer, tokens = file.load(), contents.tokens
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ConfigError(
            f"tokenizer={contents.tokenizer}: has ids up to {largest}, the model {vocab_size} tokens; give the "
            f"tokenizer that the data was prepared with"
        )
    content = dict(file.content)
    if contents.origin is None:
        _encode_whole_texts(content, tokenizer, tokens.bos)
    if mask is not None and tokenizer.id_to_token(mask[1]) is None:
        if not isinstance(content["model"].get("vocab"), dict):
            raise ConfigError(
                f"tokenizer={contents.tokenizer}: a {content['model'].get('type')} model has no place for a mask at id "
                f"{mask[1]}; use --format bd3"
            )
        _add_mask(content, tokenizer, mask[1], mask[0])
    data = dump(content)
    written = load_json(data, contents.tokenizer, ConfigError)
    special = replace(tokens, mask=None if mask is None else mask[1])
    config = _tokenizer_config(written, special, contents.model)
    return {"tokenizer.json": data.decode(), "tokenizer_config.json": json_text(config)}


def tokenizer_with_mask(path: Path, tokens: TokenIds, model: ModelConfig) -> dict[str, Any]:
    """JSON of the tokenizer in a ``tokenizer.json`` as an export needs it.

    Truncation, padding and sampling are off. If the vocabulary ends at ``tokens.mask``, a mask is added. Texts begin
    with BOS, as rows and prompts do.

    Raises:
        ConfigError: it cannot be read, lacks a special token, or has more tokens than the model.
    """
    file = read_tokenizer(path, ConfigError)
    content, tokenizer = dict(file.content), file.load()
    largest = max(tokenizer.get_vocab().values(), default=-1)
    entries = f"{tokenizer.get_vocab_size()} entries" + (f" up to id {largest}" if _has_holes(tokenizer) else "")
    if tokenizer.id_to_token(tokens.mask) is None:
        if tokens.mask != largest + 1:
            raise ConfigError(
                f"tokens.mask={tokens.mask}: tokenizer {path} has {entries}, so an added mask would not "
                f"get that id; give the tokenizer that the data was prepared with"
            )
        _add_mask(content, tokenizer, tokens.mask)
    for name, value in (("bos", tokens.bos), ("eos", tokens.eos), ("pad", tokens.pad)):
        if value is not None and tokenizer.id_to_token(value) is None:
            raise ConfigError(f"tokens.{name}={value}: tokenizer {path} has no such id; it has {entries}")
    if largest >= model.vocab_size:
        raise ConfigError(
            f"tokenizer={path}: its {entries} exceed model.vocab_size={model.vocab_size}; "
            f"give the tokenizer that the data was prepared with"
        )
    _encode_whole_texts(content, tokenizer, tokens.bos)
    return content


def without_token(content: Mapping[str, Any], index: int) -> bytes:
    """A ``tokenizer.json`` of this content without the token of this id."""
    added = [token for token in content.get("added_tokens") or [] if token["id"] != index]
    vocabulary = content["model"]["vocab"]
    kept = {name: i for name, i in vocabulary.items() if i != index} if isinstance(vocabulary, dict) else vocabulary
    return dump({**content, "added_tokens": added, "model": content["model"] | {"vocab": kept}})


def _has_holes(tokenizer: Tokenizer) -> bool:
    return max(tokenizer.get_vocab().values(), default=-1) >= tokenizer.get_vocab_size()


def _add_mask(content: dict[str, Any], tokenizer: Tokenizer, mask: int, wanted: str = MASK_TOKEN) -> None:
    """Add a mask token with the id ``mask``, which no token has."""
    names = chain([wanted], (f"<|mask_{n}|>" for n in count(1)))
    name = next(name for name in names if tokenizer.token_to_id(name) is None)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [
        *(content.get("added_tokens") or []),
        {"id": mask, "content": name, **flags, "special": True},
    ]
    if mask != tokenizer.get_vocab_size():
        # `tokenizers` gives an added token the number of entries as its id, unless the model knows it.
        vocabulary = content["model"]["vocab"]
        content["model"] = content["model"] | {"vocab": vocabulary | {name: mask}}


def _encode_whole_texts(content: dict[str, Any], tokenizer: Tokenizer, bos: int | None) -> None:
    """Switch truncation and padding off, and let texts begin with BOS, as rows and prompts do."""
    content["truncation"] = content["padding"] = None
    if bos is not None:
        content["post_processor"] = _begin_with(content.get("post_processor"), tokenizer.id_to_token(bos), bos)


def _begin_with(processor: Mapping[str, Any] | None, bos: str, index: int) -> dict[str, Any]:
    """A post-processor that puts BOS before a text; of the one before it keeps what changes no tokens."""
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }
    parts = [processor] if processor else []
    if processor and processor.get("type") == "Sequence":
        parts = list(processor.get("processors") or [])
    kept = [part for part in parts if part.get("type") == "ByteLevel"]
    return {"type": "Sequence", "processors": [*kept, template]} if kept else template


def _tokenizer_config(tokenizer: Tokenizer, tokens: TokenIds, model: ModelConfig) -> dict[str, Any]:
    pad = tokens.eos if tokens.pad is None else tokens.pad
    special = {"bos": tokens.bos, "eos": tokens.eos, "pad": pad, "mask": tokens.mask}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.length,
        "model_input_names": ["input_ids"],  # generate takes prompts of one length, without padding
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokenizer.id_to_token(id) for name, id in special.items() if id is not None},
    }
