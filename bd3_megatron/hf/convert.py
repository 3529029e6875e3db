"""Checkpoints in and out, in any of the formats of :mod:`bd3_megatron.hf.formats`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from bd3_common.atomic import atomic_folder
from bd3_common.errors import ConfigError
from bd3_common.text import shorten
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.hf.files import Loaded, Source, open_source
from bd3_megatron.hf.formats import FORMATS, CheckpointFormat, Contents, TokenIds
from bd3_megatron.hf.origin import Origin

DEFAULT = "bd3"


def export(
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    diffusion: DiffusionConfig,
    tokens: TokenIds,
    tokenizer_file: str | Path | None,
    out: str | Path,
    format_name: str = DEFAULT,
    run: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    origin: Origin | None = None,
) -> list[str]:
    """Write a checkpoint folder, all of it or nothing.

    Args:
        weights: whole tensors by Megatron's names, vocabulary unpadded; read one at a time if they are lazy.
        tokenizer_file: a ``tokenizer.json``; None exports no tokenizer.
        out: a folder that does not exist or is empty.
        run, dtype, shard_bytes, origin: see :class:`bd3_megatron.hf.formats.Contents`.

    Returns:
        lines for the user about the checkpoint.

    Raises:
        ConfigError: ``out`` is not empty or cannot be written, the format can only be read, the weights are not of the
            model's shape, or the tokenizer lacks a special token.
    """
    out = Path(out)
    written = FORMATS.load(format_name)
    if not written.writable():
        able = ", ".join(name for name, cls in FORMATS.load_all().items() if cls.writable())
        raise ConfigError(f"format={format_name}: can be read, not written; use {able}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: exists and is not an empty folder; name another or remove it")
    tokenizer = None if tokenizer_file is None else Path(tokenizer_file)
    form = written()
    contents = Contents(model, diffusion, weights, tokens, tokenizer, run, dtype, shard_bytes, origin)
    try:
        with atomic_folder(out.absolute()) as folder:
            form.write(folder, contents)
            for file in folder.iterdir():  # safetensors leaves what only the owner can read
                file.chmod(0o644)
            folder.chmod(0o755)
    except (OSError, SafetensorError) as error:
        # An OSError's full text names the temporary folder.
        raise ConfigError(f"out={out}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return form.notes(contents)


def read_checkpoint(
    path: str | Path | Source, format_name: str | None = None, tokens: TokenIds | None = None
) -> Loaded:
    """Read a checkpoint: model, objective, and whole tensors by Megatron's names.

    Args:
        path: a Hugging Face folder (one weight file or shards with an index), or one safetensors file.
        format_name: None: as :func:`find_format`.
        tokens: see :meth:`bd3_megatron.hf.formats.CheckpointFormat.read`.

    Raises:
        ConfigError: the files cannot be read, or are not of the format.
    """
    source = path if isinstance(path, Source) else open_source(Path(path))
    return format_of(source, format_name).read(source, tokens or TokenIds())


def format_of(source: Source, name: str | None = None) -> CheckpointFormat:
    """The format of a checkpoint; ``name`` as in :func:`read_checkpoint`.

    Raises:
        ConfigError: the checkpoint is not of it, or none has it.
    """
    form = FORMATS.load(find_format(source) if name is None else name)()
    if not form.matches(source.config):
        raise ConfigError(f"{source.path}: model_type={_model_type(source)}, not {form.model_type!r}")
    return form


def find_format(source: Source) -> str:
    """Name of the format that recognizes the checkpoint's ``config.json``.

    Raises:
        ConfigError: no format does, or several do.
    """
    found = [name for name, cls in FORMATS.load_all().items() if cls().matches(source.config)]
    if len(found) == 1:
        return found[0]
    where = f"{source.config_file}: model_type={_model_type(source)}"
    if found:
        raise ConfigError(f"{where}: more than one format has it; choose with --format: {', '.join(found)}")
    raise ConfigError(f"{where}: no format has it; known are {', '.join(FORMATS.names())}")


def _model_type(source: Source) -> str:
    return shorten(repr(source.config.get("model_type"))[:200])
