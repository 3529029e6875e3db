"""Codec of the messages between ranks: values as JSON and the bytes of arrays, never pickle.

A message is the length of the JSON text (8 bytes, little-endian), the text, and the arrays one after the other. In the
JSON text, scalars, texts and lists stand for themselves; everything else is an object of one key, its kind.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bd3_common import schema
from bd3_common.errors import ConfigError, UserError
from bd3_common.text import is_unicode, shorten
from data_prep.errors import DataError
from pretrain.distributed.wire_types import RECORDS, full_name

MAX_JSON = 64 << 20
"""bytes of a message's JSON text"""
MAX_MESSAGE = 8 << 30
"""bytes of a message"""
_LENGTH = 8
_DTYPE = re.compile(r"[<|][biuf][1248]")
_DIMENSIONS = 32
_MANY_DIGITS = 1 << 12  # bits of an integer that is sent


class MessageError(RuntimeError):
    """A message of another rank that this codec did not write."""


def encode(value: object) -> bytes:
    """The message of a value: None, bool, int, float, str, bytes, Path, list, tuple, dict, NumPy arrays and scalars,
    exceptions, and classes with :func:`pretrain.distributed.wire_types.crosses_ranks`.

    Raises:
        TypeError: it has a part of another type, or is too large.
    """
    arrays: list[NDArray[Any]] = []
    try:
        text = dumps(_tree(value, arrays), allow_nan=False, separators=(",", ":")).encode("ascii")
    except RecursionError:
        raise TypeError("the value is too deep to be sent to other ranks") from None
    message = b"".join([len(text).to_bytes(_LENGTH, "little"), text, *(array.tobytes() for array in arrays)])
    if len(text) > MAX_JSON or len(message) > MAX_MESSAGE:
        raise TypeError(f"a message of {len(message)} bytes to other ranks is too large")
    return message


def decode(message: bytes | memoryview) -> Any:
    """Inverse of :func:`encode`; arrays can be written to.

    Raises:
        MessageError: it is no such message.
    """
    view = memoryview(message)
    length = int.from_bytes(view[:_LENGTH], "little")
    if len(view) < _LENGTH or length > min(MAX_JSON, len(view) - _LENGTH):
        raise MessageError(f"a message of {len(view)} bytes from another rank is cut off")
    arrays = _Arrays(view[_LENGTH + length :])
    try:
        tree = schema.parse(bytes(view[_LENGTH : _LENGTH + length]), object, "a message from another rank")
        value = _value(tree, arrays)
        arrays.end()
    except (UserError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise MessageError(f"a message from another rank is malformed: {shorten(str(error), 200)}") from None
    return value


class _Arrays:
    """The part of a message that holds the bytes of the arrays."""

    def __init__(self, data: memoryview):
        self._data = data

    def next(self, dtype: str, shape: list[int]) -> NDArray[Any]:
        if not _DTYPE.fullmatch(dtype) or len(shape) > _DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError("not an array")
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > len(self._data):
            raise ValueError("an array is cut off")
        data, self._data = self._data[:size], self._data[size:]
        return np.frombuffer(data, np.dtype(dtype)).reshape(shape).copy()

    def end(self) -> None:
        if len(self._data):
            raise ValueError("bytes are left over")


def _tree(value: object, arrays: list[NDArray[Any]]) -> Any:
    """The value as JSON; arrays are appended to ``arrays``."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if value.bit_length() > _MANY_DIGITS:
            raise TypeError("an integer is too large to be sent to other ranks")
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, str):
        return str(value) if value.isascii() or is_unicode(value) else {"text": _hex(value)}
    each = functools.partial(_tree, arrays=arrays)
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, Path):
        return {"path": each(str(value))}
    if isinstance(value, BaseException):
        return {"error": [each(part) for part in _error_parts(value)]}
    name = full_name(type(value))
    if RECORDS.get(name) is type(value):
        return {"record": [name, [[key, each(part)] for key, part in _fields(value)]]}
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
        if not _DTYPE.fullmatch(array.dtype.str):
            raise TypeError(f"an array of {array.dtype} cannot be sent to other ranks")
        arrays.append(array)
        return {"array": [array.dtype.str, list(value.shape)]}
    if type(value) is list:
        return [each(part) for part in value]
    if type(value) is tuple:
        return {"tuple": [each(part) for part in value]}
    if isinstance(value, Mapping):
        return {"dict": [[each(key), each(part)] for key, part in value.items()]}
    raise TypeError(f"{name} cannot be sent to other ranks; see pretrain.distributed.wire_types.crosses_ranks")


def _value(tree: Any, arrays: _Arrays) -> Any:
    if isinstance(tree, list):
        return [_value(part, arrays) for part in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    return _KINDS[kind](content, arrays)


def _record(content: list[Any], arrays: _Arrays) -> Any:
    name, fields = content
    return schema.check({key: _value(part, arrays) for key, part in fields}, RECORDS[name], name)


def _pairs(content: list[Any], arrays: _Arrays) -> dict[Any, Any]:
    return {_value(key, arrays): _value(part, arrays) for key, part in content}


_KINDS: dict[str, Callable[[Any, _Arrays], Any]] = {
    "float": lambda content, _: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[content],
    "text": lambda content, _: bytes.fromhex(content).decode("utf-8", "surrogatepass"),
    "bytes": lambda content, _: bytes.fromhex(content),
    "path": lambda content, arrays: Path(_value(content, arrays)),
    "error": lambda content, arrays: _error(*(_value(part, arrays) for part in content)),
    "record": _record,
    "array": lambda content, arrays: arrays.next(*content),
    "tuple": lambda content, arrays: tuple(_value(part, arrays) for part in content),
    "dict": _pairs,
}


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    names = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else value._fields
    return ((name, getattr(value, name)) for name in names)


def _hex(text: str) -> str:
    return text.encode("utf-8", "surrogatepass").hex()


# ---- errors ----

# Their constructors want more than a text.
_SPECIAL = {"UnicodeDecodeError", "UnicodeEncodeError", "UnicodeTranslateError", "ExceptionGroup", "BaseExceptionGroup"}
_ERRORS: dict[str, type[Exception]] = {
    name: found
    for name, found in vars(builtins).items()
    if isinstance(found, type) and issubclass(found, Exception) and name not in _SPECIAL
} | {found.__name__: found for found in (UserError, ConfigError, DataError)}
"""classes of errors that cross ranks; another error becomes the nearest user error or OSError, or a RuntimeError"""


def _error_parts(error: BaseException) -> tuple[str, str, int | None, str | None]:
    """(name of the class, text, errno, file name)."""
    if isinstance(error, OSError) and error.errno is not None:
        file = error.filename
        file = os.fsdecode(file) if isinstance(file, str | bytes | os.PathLike) else None
        return "OSError", str(error.strerror), error.errno, file
    text = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error)
    known = next((cls for cls in type(error).__mro__ if _ERRORS.get(cls.__name__) is cls), Exception)
    if known is type(error) or issubclass(known, UserError | OSError):
        return known.__name__, text, None, None
    return "RuntimeError", f"{type(error).__name__}: {text}", None, None


def _error(name: str, text: str, number: int | None, file: str | None) -> Exception:
    if not isinstance(text, str):
        raise ValueError("not the text of an error")
    if number is None:
        return _ERRORS[name](text)
    if type(number) is not int or not isinstance(file, str | None):
        raise ValueError("not an OSError")
    return OSError(number, text, *([] if file is None else [file]))
