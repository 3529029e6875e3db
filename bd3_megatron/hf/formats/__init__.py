"""Checkpoint formats: Hugging Face folders that can be read, and some of them written.

Each module of this folder is one format. A format is recognized by ``config.json``. It translates ``config.json`` to
and from our configuration, and tensors to and from Megatron's names. :mod:`bd3_megatron.hf.mapping` translates the
usual names of Hugging Face folders (``model.layers.0.self_attn.q_proj.weight``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bd3_common.errors import ConfigError
from bd3_common.registry import Registry
from bd3_megatron.config import DiffusionConfig, ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bd3_common.formats.tokenizer_file import TokenizerFile
    from bd3_megatron.hf.files import Loaded, Source
    from bd3_megatron.hf.origin import Origin


@dataclass(frozen=True)
class TokenIds:
    """Ids of the special tokens; None: the vocabulary has no such token, or nobody has named one.

    Attributes:
        size: ids of the tokenizer, holes included; None: no tokenizer is known.
        mask_init: row of a mask that a vocabulary lacks: ``mean``, ``noise`` or ``eos``.
    """

    bos: int | None = None
    eos: int | None = None
    mask: int | None = None
    pad: int | None = None
    size: int | None = None
    mask_init: str = "mean"


@dataclass(frozen=True)
class Contents:
    """A checkpoint to write.

    Attributes:
        weights: whole tensors by Megatron's names, vocabulary unpadded.
        tokenizer: a ``tokenizer.json``; None: there is none.
        run: id of the run that the weights are of, for an import to name it as the parent; None: it has none.
        dtype: of the weights that are written; None: the one they have.
        shard_bytes: most bytes of one weight file; None: one file for all.
        origin: what the run kept of the checkpoint it was imported from.
    """

    model: ModelConfig
    diffusion: DiffusionConfig
    weights: Mapping[str, Tensor]
    tokens: TokenIds
    tokenizer: Path | None = None
    run: str | None = None
    dtype: torch.dtype | None = None
    shard_bytes: int | None = None
    origin: Origin | None = None


class CheckpointFormat(ABC):
    """A checkpoint format. A subclass implements :meth:`read`, and :meth:`write` if the format can be written."""

    model_type: ClassVar[str]
    """``model_type`` in ``config.json``"""
    fields: ClassVar[Mapping[str, str]] = {}
    """fields of ModelConfig and their keys in ``config.json``, for :meth:`model_values`"""
    states_tokens: ClassVar[bool] = True
    """``config.json`` has the ids of the special tokens; False: they are those of the tokenizer"""
    exact: ClassVar[bool] = True
    """weights that are written read back bitwise equal"""

    own_vocabulary: ClassVar[bool] = False
    """a checkpoint has other ids than the run it becomes, or more"""

    def matches(self, config: Mapping[str, Any]) -> bool:
        """True if a folder with this ``config.json`` has the format. For a single file: its metadata."""
        return config.get("model_type") == self.model_type

    @abstractmethod
    def read(self, source: Source, tokens: TokenIds) -> Loaded:
        """Model, objective and weights: whole tensors by Megatron's names.

        Args:
            tokens: ids named by the user or the tokenizer, unless the format states them.

        Raises:
            ConfigError: a key, a value or a tensor does not fit.
        """

    def origin(self, source: Source, loaded: Loaded, tokens: TokenIds) -> Origin | None:
        """What a run keeps of the checkpoint for :meth:`write`; None: the run itself has all of it.

        Args:
            loaded: what :meth:`read` has returned.
        """
        return None

    def run_tokenizer(self, source: Source, file: TokenizerFile) -> bytes:
        """The ``tokenizer.json`` of a run that is made of the checkpoint, from that of the checkpoint."""
        return file.data

    def notes(self, contents: Contents) -> list[str]:
        """Lines for the user about a checkpoint that has been written: what its readers have to know."""
        return []

    def write(self, folder: Path, contents: Contents) -> None:
        """Write all files into ``folder``, which exists and is empty.

        Raises:
            ConfigError: the contents do not fit the format.
            OSError: the disk refuses.
        """
        raise NotImplementedError

    @classmethod
    def writable(cls) -> bool:
        """True if the format can be written."""
        return cls.write is not CheckpointFormat.write

    def model_values(self, source: Source) -> dict[str, Any]:
        """Values of ModelConfig by its field names, from ``config.json`` by :attr:`fields`.

        Raises:
            ConfigError: a key is missing.
        """
        check_keys(source, self.fields.values())
        return {ours: source.config[key] for ours, key in self.fields.items()}


def check_keys(source: Source, keys: Iterable[str]) -> None:
    """Check that ``config.json`` has all ``keys``.

    Raises:
        ConfigError: one is missing.
    """
    missing = [key for key in keys if key not in source.config]
    if missing:
        raise ConfigError(f"{source.config_file}: no {missing[0]}; export the checkpoint again")


FORMATS = Registry(CheckpointFormat, "checkpoint format", "format", "bd3_megatron.formats")
