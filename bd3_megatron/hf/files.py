"""Files of Hugging Face folders: reading, with one-line errors, and writing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bd3_common import schema
from bd3_common.errors import ConfigError
from bd3_common.formats.tensor_header import open_tensors, read_header
from bd3_common.machine import memory_limit
from bd3_common.schema import InnerPath, OpenRecord
from bd3_common.text import shorten
from bd3_megatron.config import DiffusionConfig, ModelConfig, Section

T = TypeVar("T")
AnySection = TypeVar("AnySection", bound=Section)
Loaded = tuple[ModelConfig, DiffusionConfig, dict[str, Tensor]]

MAX_JSON = 64 << 20
_PREFIX = "weights."  # of tensors in a single file that has other tensors, too


class WeightIndex(OpenRecord):
    """``model.safetensors.index.json``: the file of each tensor."""

    weight_map: dict[str, InnerPath]


@dataclass(frozen=True)
class Source:
    """A checkpoint to read.

    Attributes:
        path: a Hugging Face folder, or a safetensors file whose tensors are named ``weights.*``.
        config: ``config.json``, or the file's metadata, whose values are text.
    """

    path: Path
    config: Mapping[str, Any]

    @property
    def config_file(self) -> Path:
        """The file that ``config`` is from, for messages."""
        return self.path / "config.json" if self.path.is_dir() else self.path

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their names in the checkpoint.

        Raises:
            ConfigError: no weight file, or one that cannot be read.
        """
        if self.path.is_dir():
            return read_weights(self.path)
        tensors, _ = read_safetensors(self.path)
        return {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}


def open_source(path: Path) -> Source:
    """Read a checkpoint's configuration.

    Raises:
        ConfigError: no such folder or file, no JSON object, or a file without tensors named ``weights.*``.
    """
    if path.is_dir():
        return Source(path, read_json(path / "config.json"))
    with _safetensors(path) as file:
        names, metadata = file.keys(), file.metadata() or {}
    if not any(name.startswith(_PREFIX) for name in names):
        raise ConfigError(f"{path}: no tensors named {_PREFIX}*; give a Hugging Face folder or a golden file")
    return Source(path, metadata)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, from one file or from the shards its index names.

    Raises:
        ConfigError: no weight file, or one that cannot be read.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_safetensors(folder / "model.safetensors")[0]
    shards = _read(index, WeightIndex).weight_map
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        weights |= read_safetensors(folder / shard)[0]
    return weights


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one file.

    Raises:
        ConfigError: no such file, or not a whole safetensors file.
    """
    with _safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file, whose header is checked and whose tensors fit the memory."""
    try:
        with open_tensors(path) as opened:
            header = read_header(opened, path, ConfigError)
        size = max((place.data_offsets[1] for place in header.tensors.values()), default=0)
        if size > memory_limit():
            raise ConfigError(f"{path}: its tensors have {size} bytes, more than the memory of {memory_limit()} bytes")
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: not a readable safetensors file: {shorten(str(error), 160)}") from None


def section(kind: type[AnySection], values: Mapping[str, Any], source: str) -> AnySection:
    """Build a configuration section, its first mistake as one line that begins with ``source``.

    Raises:
        ConfigError: a value does not fit.
    """
    return schema.check(values, kind, source, error=ConfigError)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: no such file, or it holds no JSON object.
    """
    return _read(path, dict[str, Any])


def _read(path: Path, kind: type[T]) -> T:
    try:
        return schema.read(path, kind, error=ConfigError, max_bytes=MAX_JSON)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: not a readable JSON file: {error.strerror or error}") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as an indented JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
