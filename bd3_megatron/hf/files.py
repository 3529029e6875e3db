"""Files of Hugging Face folders: reading, with one-line errors, and writing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bd3_common import schema
from bd3_common.errors import ConfigError
from bd3_common.formats.tensor_header import TensorHeader, open_tensors, read_header
from bd3_common.formats.tensor_writer import TensorEntry, write_tensors
from bd3_common.machine import memory_limit
from bd3_common.schema import InnerPath, OpenRecord
from bd3_common.text import printable, shorten
from bd3_megatron.backbones import Shape
from bd3_megatron.config import DiffusionConfig, ModelConfig, Section

T = TypeVar("T")
AnySection = TypeVar("AnySection", bound=Section)
Loaded = tuple[ModelConfig, DiffusionConfig, Mapping[str, Tensor]]

MAX_JSON = 64 << 20
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
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

    def tensors(self) -> LazyTensors:
        """All tensors by their names in the checkpoint; each is read when it is asked for.

        Raises:
            ConfigError: no weight file, or one that cannot be read.
        """
        if self.path.is_dir():
            return open_weights(self.path)
        found = open_file(self.path)
        names = {name.removeprefix(_PREFIX): name for name in found if name.startswith(_PREFIX)}
        return found.renamed(names)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for; their shapes are known before.

    Args:
        shapes: by name.
        read: reads a tensor by its name.
    """

    def __init__(self, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]):
        self.shapes, self._read = shapes, read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def renamed(self, names: Mapping[str, str]) -> LazyTensors:
        """Some of the tensors under other names: ``names`` has the present ones by the new."""
        return LazyTensors({new: self.shapes[old] for new, old in names.items()}, lambda new: self[names[new]])


def shapes_of(tensors: Mapping[str, Tensor]) -> Mapping[str, Shape]:
    """Shapes by name; lazy tensors are not read."""
    if isinstance(tensors, LazyTensors):
        return tensors.shapes
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def open_source(path: Path) -> Source:
    """Read a checkpoint's configuration.

    Raises:
        ConfigError: no such folder or file, no JSON object, or a file without tensors named ``weights.*``.
    """
    if path.is_dir():
        return Source(path, read_json(path / "config.json"))
    with _safetensors(path) as (_, header):
        names, metadata = header.tensors, header.metadata
    if not any(name.startswith(_PREFIX) for name in names):
        raise ConfigError(f"{path}: no tensors named {_PREFIX}*; give a Hugging Face folder or a golden file")
    return Source(path, metadata)


def open_weights(folder: Path) -> LazyTensors:
    """All tensors of a Hugging Face folder, in one file or in the shards its index names.

    Raises:
        ConfigError: no weight file, or one that cannot be read; or a tensor is in two of them.
    """
    index = folder / WEIGHTS_INDEX
    if not index.exists():
        if not (folder / WEIGHTS).exists() and (other := sorted(folder.glob("*.bin")) or sorted(folder.glob("*.gguf"))):
            raise ConfigError(f"{other[0]}: not a safetensors file; convert the weights to {WEIGHTS} first")
        return open_file(folder / WEIGHTS)
    places: dict[str, LazyTensors] = {}
    shapes: dict[str, Shape] = {}
    for shard in sorted(set(_read(index, WeightIndex).weight_map.values())):
        opened = open_file(folder / shard)
        if twice := next((name for name in opened if name in places), None):
            raise ConfigError(
                f"{folder / shard}: {printable(twice)} is in another shard, too; download the folder again"
            )
        places |= dict.fromkeys(opened, opened)
        shapes |= opened.shapes
    return LazyTensors(shapes, lambda name: places[name][name])


def open_file(path: Path) -> LazyTensors:
    """Tensors of one safetensors file; errors as :func:`read_safetensors`."""
    with _safetensors(path) as (_, header):
        shapes = {name: tuple(place.shape) for name, place in header.tensors.items()}

    def read(name: str) -> Tensor:
        with _safetensors(path) as (file, _):
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return LazyTensors(shapes, read)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one file.

    Raises:
        ConfigError: no such file, or not a whole safetensors file.
    """
    with _safetensors(path) as (file, header):
        size = max((place.data_offsets[1] for place in header.tensors.values()), default=0)
        if size > memory_limit():
            raise ConfigError(f"{path}: its tensors have {size} bytes, more than the memory of {memory_limit()} bytes")
        return {name: file.get_tensor(name) for name in header.tensors}, header.metadata


@contextmanager
def _safetensors(path: Path) -> Iterator[tuple[Any, TensorHeader]]:
    """An open safetensors file and its header, which is checked."""
    try:
        with open_tensors(path) as opened:
            header = read_header(opened, path, ConfigError)
        with safe_open(path, "pt") as file:
            yield file, header
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
    path.write_text(json_text(content), encoding="utf-8")


def json_text(content: Mapping[str, Any]) -> str:
    """An object as indented JSON."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""names in safetensors files of the types that weights have"""


def bytes_of(tensor: Tensor) -> Any:
    """The memory of a tensor's values in order, as an array of bytes on the CPU."""
    flat = tensor.detach().cpu().contiguous()
    # view(-1) would keep the stride of a single element.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy()


def tensor_entry(name: str, tensor: Tensor) -> TensorEntry:
    """Header entry of a tensor.

    Raises:
        ConfigError: of a type that is not written.
    """
    dtype = {**DTYPE_NAMES, torch.int8: "I8", torch.int64: "I64"}.get(tensor.dtype)
    if dtype is None:
        raise ConfigError(f"{name}: of type {tensor.dtype}, which is not written; use fp32 or bf16")
    return TensorEntry(name, dtype, tuple(tensor.shape))


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, shard_bytes: int | None = None
) -> int:
    """Write weights tensor by tensor: one file, or shards with an index.

    Args:
        tensors: written in their order; read one at a time if they are lazy.
        dtype: type in the files; None: that of the first tensor.
        shard_bytes: a file has at most so many bytes of tensors, or one tensor; None: one file.

    Returns:
        bytes written.

    Raises:
        OSError: the disk refuses.
    """
    shapes = shapes_of(tensors)
    kind = dtype or next(iter(tensors.values())).dtype
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for name, shape in shapes.items():
        entry = TensorEntry(name, DTYPE_NAMES[kind], shape)
        if shards[-1] and shard_bytes is not None and size + entry.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        content = {
            "metadata": {"total_size": sum(entry.bytes for shard in shards for entry in shard)},
            "weight_map": {entry.name: file for file, shard in zip(names, shards) for entry in shard},
        }
        write_json(folder / WEIGHTS_INDEX, content)
    total = 0
    for file, shard in zip(names, shards):
        values = (bytes_of(tensors[entry.name].to(kind)) for entry in shard)
        total += write_tensors(folder / file, shard, values)["bytes"]
    return total
