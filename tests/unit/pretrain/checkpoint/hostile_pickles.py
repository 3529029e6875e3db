"""Files ``.metadata`` that try to run code, to fill memory or to take for ever, as bytes."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path, PosixPath

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorProperties


def _text(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def _named(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"


def _calls(module: str, name: str, args: bytes) -> bytes:
    """A pickle that calls a function with a tuple of arguments."""
    return b"\x80\x04" + _named(module, name) + args + b"R."


class _Calls:
    def __init__(self, function: Callable, *args: object):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile(mark: Path) -> dict[str, bytes]:
    """Such files by what they try; the calls would create ``mark``."""
    command = f"touch {mark}"
    call = _Calls(os.system, command)
    shell = b"(" + _text(command) + b"t"
    metadata = Metadata({"weights/a": call}, None, {MetadataIndex("weights/a", (0,)): call}, StorageMeta(call))
    tuples = b"\x80\x04}" + b")" + b"\x85" * 200_000 + b"Ns."
    return {
        "reduce": pickle.dumps(call, 4),
        "protocol 0": pickle.dumps(call, 0),
        "nested": pickle.dumps(metadata, 4),
        "stack global": _calls("posix", "system", shell),
        "global": b"cposix\nsystem\n(V" + command.encode() + b"\ntR.",
        "inst": b"(V" + command.encode() + b"\niposix\nsystem\n.",
        "dotted name": _calls("torch.serialization", "os.system", shell),
        "module of torch": _calls("torch.distributed.checkpoint.metadata", "os", shell),
        "eval": _calls("builtins", "eval", b"(" + _text(f"open({str(mark)!r}, 'w')"[:250]) + b"t"),
        "getattr": _calls("builtins", "getattr", b"(" + _named("torch", "Size") + _text("mro") + b"t"),
        "path with odd arguments": _calls("pathlib", "PosixPath", _named("torch", "Size")),
        "size of no tuple": _calls("torch", "Size", b"K\x01\x85"),
        "large size": _calls("torch", "Size", b"J\xff\xff\xff\x7f\x85\x85"),
        "call of a class": _calls("torch.distributed.checkpoint.metadata", "Metadata", b")"),
        "call of a text": b"\x80\x04" + _text("x") + b")R.",
        "object of a function": b"\x80\x04" + _named("torch", "Size") + b")\x81.",
        "object with arguments": b"\x80\x04"
        + _named("torch.distributed.checkpoint.metadata", "Metadata")
        + b"N\x85\x81.",
        "state of a list": b"\x80\x04]}b.",
        "extension": b"\x80\x04\x82\x01.",
        "persistent id": b"Px\n.",
        "large memo": b"\x80\x04Nr" + struct.pack("<I", 0xFFFF_FFF0) + b".",
        "long text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
        "long frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b".",
        "long number": b"\x80\x04\x8b" + struct.pack("<i", 1 << 30) + b".",
        "deep key": tuples,
        "deep lists": b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "cut off": pickle.dumps(metadata, 4)[:50],
        "no value": b"\x80\x04.",
        "empty": b"",
        "garbage": bytes(range(256)) * 20,
        "another value": pickle.dumps({"a": [1, 2]}, 4),
        "another object": pickle.dumps(TensorProperties(torch.float32), 4),
        "empty index": pickle.dumps(Metadata({}, {}, None), 4),
        "a path": pickle.dumps(PosixPath("/"), 4),
    }
