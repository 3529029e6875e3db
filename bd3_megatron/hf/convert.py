"""Checkpoints in and out, in any of the formats of :mod:`bd3_megatron.hf.formats`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from bd3_common.atomic import atomic_folder
from bd3_common.errors import ConfigError
from bd3_common.text import shorten
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.hf.files import Loaded, Source, open_source
from bd3_megatron.hf.formats import FORMATS, Contents, TokenIds

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
) -> None:
    """Write a checkpoint folder, all of it or nothing.

    Args:
        weights: whole tensors by Megatron's names, vocabulary unpadded; stored in the type they have.
        tokenizer_file: a ``tokenizer.json``; None exports no tokenizer.
        out: a folder that does not exist or is empty.
        run: id of the run that the weights are of.

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
    try:
        with atomic_folder(out.absolute()) as folder:
            written().write(folder, Contents(model, diffusion, weights, tokens, tokenizer, run))
            for file in folder.iterdir():  # safetensors leaves what only the owner can read
                file.chmod(0o644)
            folder.chmod(0o755)
    except (OSError, SafetensorError) as error:
        # An OSError's full text names the temporary folder.
        raise ConfigError(f"out={out}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


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
    form = FORMATS.load(find_format(source) if format_name is None else format_name)()
    if not form.matches(source.config):
        raise ConfigError(f"{source.path}: model_type={_model_type(source)}, not {form.model_type!r}")
    return form.read(source, tokens or TokenIds())


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
