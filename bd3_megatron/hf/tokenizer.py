"""The tokenizer of a checkpoint that is written: its mask, its special tokens, its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from bd3_common.errors import ConfigError
from bd3_common.schema import read_bytes
from bd3_common.text import shorten
from bd3_megatron.config import ModelConfig
from bd3_megatron.hf.files import write_json
from bd3_megatron.hf.formats import TokenIds

MASK_TOKEN = "<|mask|>"


def write_tokenizer(folder: Path, tokenizer: Tokenizer, tokens: TokenIds, model: ModelConfig) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, as transformers reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, tokens, model))


def tokenizer_with_mask(path: Path, tokens: TokenIds, model: ModelConfig) -> Tokenizer:
    """The tokenizer in a ``tokenizer.json``, with a mask added if its vocabulary ends at ``tokens.mask``.

    Raises:
        ConfigError: it cannot be read, lacks a special token, or has more tokens than the model.
    """
    text = read_bytes(path, ConfigError)
    try:
        tokenizer = Tokenizer.from_buffer(text)
    except Exception as error:  # the library raises plain Exception
        problem = shorten(str(error), 160)
        raise ConfigError(f"tokenizer={path}: not a readable tokenizer.json: {problem}") from None
    # Stored in the file, they would cut or fill prompts without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = tokenizer.get_vocab_size()
    if tokenizer.id_to_token(tokens.mask) is None:
        tokenizer.add_special_tokens([AddedToken(MASK_TOKEN, special=True, normalized=False)])
        if tokenizer.token_to_id(MASK_TOKEN) != tokens.mask:
            raise ConfigError(
                f"tokens.mask={tokens.mask}: tokenizer {path} has {size} entries, so an added mask would not "
                f"get that id; give the tokenizer that the data was prepared with"
            )
    for name, value in (("bos", tokens.bos), ("eos", tokens.eos)):
        if value is not None and tokenizer.id_to_token(value) is None:
            raise ConfigError(f"tokens.{name}={value}: tokenizer {path} has no such id; its entries are {size}")
    if tokenizer.get_vocab_size() > model.vocab_size:
        raise ConfigError(
            f"tokenizer={path}: its {tokenizer.get_vocab_size()} entries exceed model.vocab_size="
            f"{model.vocab_size}; give the tokenizer that the data was prepared with"
        )
    return tokenizer


def _tokenizer_config(tokenizer: Tokenizer, tokens: TokenIds, model: ModelConfig) -> dict[str, Any]:
    special = {"bos": tokens.bos, "eos": tokens.eos, "pad": tokens.eos, "mask": tokens.mask}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.length,
        "model_input_names": ["input_ids"],  # the model takes no attention_mask: prompts have one length
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokenizer.id_to_token(id) for name, id in special.items() if id is not None},
    }
