"""Special tokens of a checkpoint to import: its format's own, those of its files, or those that the user names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bd3_common.errors import ConfigError
from bd3_megatron.config import ModelConfig
from bd3_megatron.hf.convert import format_of
from bd3_megatron.hf.files import Source, open_source
from bd3_megatron.hf.formats import TokenIds
from data_prep.format.tokenizer import load_tokenizer, special_ids
from pretrain.config import TOKENIZER_FILE


@dataclass(frozen=True)
class ImportChoices:
    """What the user says about a checkpoint to import.

    Attributes:
        format: None: ``config.json`` tells it.
        tokenizer: a ``tokenizer.json``; None: the one in the folder, if any.
        bos, eos: tokens of the tokenizer.
        mask_id, mask_init: of the mask, see :class:`bd3_megatron.hf.formats.TokenIds`.
        length: tokens per row of the run; None: that of the checkpoint.
    """

    format: str | None = None
    tokenizer: Path | None = None
    bos: str | None = None
    eos: str | None = None
    mask_id: int | None = None
    mask_init: str = "mean"
    length: int | None = None


def tokenizer_of(source: Source, choices: ImportChoices) -> Path | None:
    """The tokenizer that was named, or the one in the folder."""
    beside = source.path / TOKENIZER_FILE
    return choices.tokenizer or (beside if beside.is_file() else None)


def model_of(path: Path) -> ModelConfig:
    """Shape of the model in a Hugging Face folder, with the vocabulary that an import gives it.

    Raises:
        ConfigError: no such folder, of no known format, or one that does not fit its tokenizer.
    """
    source, choices = open_source(path), ImportChoices()
    form = format_of(source)
    tokens, _ = tokens_of(source, tokenizer_of(source, choices), choices, form.states_tokens)
    return form.read(source, tokens)[0]


def tokens_of(
    source: Source, tokenizer_file: Path | None, choices: ImportChoices, stated_by_format: bool
) -> tuple[TokenIds, int]:
    """Special tokens, and the number of the tokenizer's ids.

    Args:
        stated_by_format: ``config.json`` has the ids of the tokens that the model was trained with.

    Raises:
        ConfigError: an option that the format or a missing tokenizer contradicts.
        DataError: a named token is not in the vocabulary, or neither BOS nor EOS can be found.
    """
    named = {"--bos": choices.bos, "--eos": choices.eos, "--mask-id": choices.mask_id}
    given = [flag for flag, value in named.items() if value is not None]
    tokenizer = None if tokenizer_file is None else load_tokenizer(tokenizer_file)
    size = 0 if tokenizer is None else max(tokenizer.get_vocab().values(), default=-1) + 1
    if stated_by_format:
        if given:
            raise ConfigError(f"{given[0]}: {source.path} states its own special tokens; leave it out")
        return TokenIds(mask=choices.mask_id), size
    stated = {key: source.config.get(f"{key}_token_id") for key in ("bos", "eos", "pad")}
    ids = {key: x for key, x in stated.items() if isinstance(x, int) and not isinstance(x, bool) and x >= 0}
    if tokenizer is None:
        if choices.bos or choices.eos:
            raise ConfigError(f"{given[0]}: names a token of a tokenizer; give that with --tokenizer")
        return TokenIds(**ids, mask=choices.mask_id, mask_init=choices.mask_init), size
    bos, eos = (
        name if name is not None or key not in ids else tokenizer.id_to_token(ids[key])
        for key, name in (("bos", choices.bos), ("eos", choices.eos))
    )
    special = special_ids(tokenizer, bos, eos)
    own_mask = special.mask if tokenizer.id_to_token(special.mask) is not None else None
    mask = own_mask if choices.mask_id is None else choices.mask_id
    return TokenIds(special.bos, special.eos, mask, ids.get("pad"), size, choices.mask_init), size
