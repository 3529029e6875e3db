"""Checkpoints of format 1, which torch's distributed checkpoint wrote, read without running what is in them.

Their index ``.metadata`` is a pickle. It is read by an interpreter of the few operations and names that such a file
has; objects in it become plain records. The tensors in ``*.distcp`` are read with ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bd3_common import schema
from bd3_common.errors import ConfigError
from bd3_common.text import shorten
from pretrain.checkpoint.index import DTYPES, REMEDY, StoredChunk, StoredTensor, check_index, nbytes
from pretrain.run_folder.layout import OLD_INDEX

_MAX_METADATA = 32 << 20
"""bytes of ``.metadata``: about 250 a chunk"""
_MAX_RECORD = 1 << 16
"""bytes of each record beside the values in the archive of a chunk"""
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


class OldFile:
    """A ``.distcp`` file open for reading.

    Args:
        lengths: bytes of each chunk's archive by the key of the chunk.
    """

    def __init__(self, path: Path, lengths: Mapping[str, int]):
        self.path, self._lengths = path, lengths
        self._file = path.open("rb")
        self._last: tuple[str, Tensor] | None = None  # regions of one chunk follow each other

    def __enter__(self) -> OldFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._last = None
        self._file.close()

    def read(self, chunk: StoredChunk, dtype: str, low: Sequence[int], target: Tensor) -> None:
        """As :meth:`pretrain.checkpoint.tensor_file.TensorFile.read`."""
        if self._last is None or self._last[0] != chunk.key:
            self._last = None  # frees its memory first
            self._last = chunk.key, self._load(chunk, dtype)
        target.copy_(self._last[1][tuple(slice(o, o + n) for o, n in zip(low, target.shape))])

    def _load(self, chunk: StoredChunk, dtype: str) -> Tensor:
        self._file.seek(int(chunk.key))
        data = self._file.read(self._lengths[chunk.key])
        try:
            _check_archive(data)
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            reason = shorten(str(error).partition("\n")[0] or type(error).__name__, 120)
            raise ConfigError(f"{self.path}: is not a file of tensors: {reason}; {REMEDY}") from None
        fits = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.dtype is DTYPES[dtype]
        if not fits or tuple(tensor.shape) != chunk.shape:
            raise ConfigError(f"{self.path}: has another tensor than {OLD_INDEX} says; {REMEDY}")
        return tensor


def read_old_index(folder: Path, files: Mapping[str, int]) -> tuple[dict[str, StoredTensor], dict[str, dict[str, int]]]:
    """The checked tensors of ``.metadata``, and the bytes of each archive by file and key.

    Args:
        files: bytes of the files that the checkpoint lists.

    Raises:
        ConfigError: it is damaged, or not such a file.
    """
    path = folder / OLD_INDEX
    data = schema.read_bytes(path, ConfigError, _MAX_METADATA)
    try:
        plain, archives = _plain(_Unpickler(io.BytesIO(data)).load())
    except Exception as error:  # whatever a foreign pickle makes the interpreter raise
        reason = shorten(str(error) if isinstance(error, pickle.UnpicklingError) else type(error).__name__, 120)
        raise ConfigError(f"{path}: is not the index of a checkpoint of bd3: {reason}; {REMEDY}") from None
    archives = schema.check(archives, dict[str, dict[str, schema.Count]], path, REMEDY, ConfigError)
    tensors = schema.check(plain, dict[str, StoredTensor], path, REMEDY, ConfigError)
    check_index(tensors, files, path)
    _check_archives(tensors, archives, files, path)
    return tensors, archives


def _check_archives(
    tensors: Mapping[str, StoredTensor],
    archives: Mapping[str, Mapping[str, int]],
    files: Mapping[str, int],
    where: Path,
) -> None:
    """Check that archives lie one beside the other in their files and are large enough for their chunks."""
    for file, lengths in archives.items():
        end = 0
        for begin, key in sorted((int(key), key) for key in lengths):
            if begin < end:
                raise ConfigError(f"{where}: chunks of {shorten(file)} overlap; {REMEDY}")
            end = begin + lengths[key]
        if end > files.get(file, 0):
            raise ConfigError(f"{where}: a chunk ends behind the end of {shorten(file)}; {REMEDY}")
    for name, stored in tensors.items():
        for chunk in stored.chunks:
            if nbytes(chunk.shape, stored.dtype) > archives[chunk.file][chunk.key]:
                raise ConfigError(f"{where}: {name}: a chunk is larger than its archive; {REMEDY}")


def _check_archive(data: bytes) -> None:
    """Check that what torch is about to read is as large as it looks: no compression, small records."""
    if data[:4] != b"PK\x03\x04":
        raise ValueError("not an archive")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > len(data):
                raise ValueError("compressed values")
            if record.file_size > _MAX_RECORD and not record.filename.endswith("/data/0"):
                raise ValueError(f"a large record {record.filename}")


# ---- the pickle ----


class _Kind:
    """A class that the pickle names; its instances become :class:`_Instance`."""

    def __init__(self, name: str):
        self.name = name


class _Instance:
    """An instance in the pickle: the name of its class and its state."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str):
        self.kind, self.state = kind, None


class _Function:
    """A function that the pickle calls."""

    def __init__(self, call: Callable[[Any], Any]):
        self.call = call


def _size(args: Any) -> Any:
    if type(args) is not tuple or len(args) != 1 or type(args[0]) is not tuple:
        raise pickle.UnpicklingError("torch.Size of no tuple")
    return args[0]


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_KINDS = ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex")
_ADMITTED: dict[tuple[str, str], Any] = {
    **{(_METADATA_MODULE, name): _Kind(name) for name in (*_KINDS, "StorageMeta")},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Kind("_StorageInfo"),
    ("torch", "Size"): _Function(_size),
    # Their values are not used.
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"): _Function(lambda _: None),
    ("torch.serialization", "_get_layout"): _Function(lambda _: None),
    ("pathlib", "PosixPath"): _Function(lambda _: None),
    ("pathlib._local", "PosixPath"): _Function(lambda _: None),  # Python 3.13
    **{("torch", name): stored for name, stored in _DTYPE_NAMES.items()},
}
"""names that torch 2.11 to 2.13 write for the state dicts of this project, and what stands for them"""

_OPERATIONS = [
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "STACK_GLOBAL"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"),
    *("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT"),
]
_CODES = [getattr(pickle, name)[0] for name in _OPERATIONS]


class _Unpickler(pickle._Unpickler):
    """Interpreter of the operations that torch writes; it imports nothing and calls nothing but :class:`_Function`.

    The one in Python, because the one in C fills memory for a large memo index.
    """

    dispatch: ClassVar = {code: pickle._Unpickler.dispatch[code] for code in _CODES}

    def find_class(self, module: str, name: str) -> Any:
        found = _ADMITTED.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} is not a name that such an index has")
        return found

    def _new_object(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is not _Kind or type(args) is not tuple or args:
            raise pickle.UnpicklingError("an object of an unknown kind")
        self.append(_Instance(kind.name))

    def _build(self) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        if type(instance) is not _Instance or instance.state is not None:
            raise pickle.UnpicklingError("a state without an object")
        instance.state = state

    def _reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Function:
            raise pickle.UnpicklingError("a call of what is no function")
        self.append(function.call(args))

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._set(items)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        keys = items[::2]
        # Hashing a deeply nested tuple overflows the stack.
        if type(target) is not dict or len(items) % 2 or any(type(key) not in (str, _Instance) for key in keys):
            raise pickle.UnpicklingError("items of no dictionary")
        target.update(zip(keys, items[1::2]))

    dispatch[pickle.NEWOBJ[0]] = _new_object
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.SETITEM[0]] = _set_item


def _fields(value: object, kind: str) -> dict[str, Any]:
    if type(value) is not _Instance or value.kind != kind or type(value.state) is not dict:
        raise pickle.UnpicklingError(f"no {kind} where one should be")
    return value.state


def _dimensions(value: object) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 16 or any(type(n) is not int for n in value):
        raise pickle.UnpicklingError("no sizes where some should be")
    return value


def _plain(loaded: object) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """Tensors as in ``index.json``, and archives' bytes by file and key, both unchecked."""
    metadata = _fields(loaded, "Metadata")
    places: dict[tuple[str, tuple[int, ...]], tuple[str, str]] = {}
    archives: dict[str, dict[str, int]] = {}
    for key, value in metadata["storage_data"].items():
        index, info = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
        file, offset, length = info["relative_path"], info["offset"], info["length"]
        if info.get("transform_descriptors") or type(file) is not str or type(offset) is not int:
            raise pickle.UnpicklingError("a chunk that is stored in an unknown way")
        if str(offset) in archives.setdefault(file, {}):
            raise pickle.UnpicklingError("two chunks in one place")
        archives[file][str(offset)] = length
        if type(index["fqn"]) is not str:
            raise pickle.UnpicklingError("a chunk without a name")
        places[index["fqn"], _dimensions(index["offset"])] = file, str(offset)
    plain: dict[str, Any] = {}
    count = 0
    for name, value in metadata["state_dict_metadata"].items():
        tensor = _fields(value, "TensorStorageMetadata")
        properties, chunks = tensor["properties"], tensor["chunks"]
        count += len(chunks)  # of one list that many tensors share, too
        if type(chunks) is not list or count > len(places) or properties.kind != "TensorProperties":
            raise pickle.UnpicklingError("more chunks than are stored")
        found = []
        for chunk in (_fields(chunk, "ChunkStorageMetadata") for chunk in chunks):
            offsets = _dimensions(chunk["offsets"])
            file, key = places[name, offsets]
            found.append({"offsets": offsets, "shape": _dimensions(chunk["sizes"]), "file": file, "key": key})
        plain[name] = {"shape": _dimensions(tensor["size"]), "dtype": properties.state[0], "chunks": found}
    return plain, archives
