"""Messages between ranks: what is sent is what arrives, and nothing else is taken."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_common import PACKAGES, ROOT
from bd3_common.errors import ConfigError
from data_prep.errors import DataError
from pretrain.distributed import codec
from pretrain.distributed.codec import MessageError, decode, encode
from pretrain.distributed.signed_store import NotSigned, sign, verify
from pretrain.preflight.findings import Gpu, Place, Report

texts = st.text(st.characters(exclude_categories=[])) | st.just("\udcff")
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts | st.binary()
values = st.recursive(
    scalars,
    lambda parts: st.lists(parts) | st.lists(parts).map(tuple) | st.dictionaries(texts | st.integers(), parts),
    max_leaves=10,
)


def same(one, other) -> bool:
    """Equal, and of the same types: 1 is not True, and -0.0 not 0.0."""
    return repr(one) == repr(other)


@settings(deadline=None, max_examples=40)
@given(values)
def test_a_value_arrives_as_it_was_sent(value):
    assert same(decode(encode(value)), value)


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        -math.inf,
        5e-324,
        2**4000,
        Path("/a/\udcff"),
        Report("node1", 0, {"torch": "2"}, Gpu("H100", 8, 4, 1), 1.5),
        [Place(False, "full"), None],
    ],
)
def test_special_values(value):
    assert same(decode(encode(value)), value)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "float16", "float64", ">i4"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_arrays(dtype, shape):
    array = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    found, one = decode(encode((array.T, 1)))
    assert one == 1
    assert found.dtype == array.dtype.newbyteorder("<")
    np.testing.assert_array_equal(found, array.T)
    found.fill(0)  # an array of one's own


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigError("a"), ConfigError("a")),
        (DataError("a"), DataError("a")),
        (type("Special", (DataError,), {})("a"), DataError("a")),
        (KeyError("a"), KeyError("a")),
        (FileNotFoundError(2, "gone", Path("/x")), FileNotFoundError(2, "gone", "/x")),
        (PermissionError(13, "no"), PermissionError(13, "no")),
        (OSError("odd"), OSError("odd")),
        (json.JSONDecodeError("bad", "x", 0), RuntimeError("JSONDecodeError: bad: line 1 column 1 (char 0)")),
        (type("Other", (Exception,), {})("a"), RuntimeError("Other: a")),
    ],
)
def test_errors(error, expected):
    found = decode(encode(error))
    assert type(found) is type(expected)
    assert str(found) == str(expected)
    assert getattr(found, "filename", None) == getattr(expected, "filename", None)


def test_other_types_are_not_sent():
    for value in [object(), {1, 2}, np.array(["a"]), [lambda: 1], 2**100_000]:
        with pytest.raises(TypeError):
            encode(value)


def text(tree: str, arrays: bytes = b"") -> bytes:
    return len(tree).to_bytes(8, "little") + tree.encode() + arrays


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"1234567",
        pickle.dumps([1, 2]),
        (2**63).to_bytes(8, "little") + b"1",
        text("["),
        text("[" * 100_000),
        text("NaN"),
        text("1", b"left over"),
        text("{}"),
        text('{"call":"os.system"}'),
        text('{"list":1,"tuple":[]}'),
        text('{"float":"1"}'),
        text('{"dict":[[{"dict":[]},1]]}'),
        text('{"error":["SystemExit","",null,null]}'),
        text('{"error":["eval","1",null,null]}'),
        text('{"error":["OSError",1,2,3]}'),
        text('{"record":["os.system",[]]}'),
        text('{"record":["pretrain.preflight.findings.Place",[["sees","x"]]]}'),
        text('{"array":["<i8",[1000000000000]]}'),
        text('{"array":["<i8",[-1]]}', bytes(8)),
        text('{"array":["|O8",[1]]}', bytes(8)),
        text('{"array":["<f8",[[1]]]}', bytes(8)),
    ],
)
def test_other_messages_are_refused(message):
    with pytest.raises(MessageError):
        decode(message)


@settings(deadline=None, max_examples=40)
@given(values, st.data())
def test_a_damaged_message_is_refused_or_another_value(value, data):
    message = bytearray(encode([value, np.arange(3)]))
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(MessageError):
        decode(bytes(message))


def test_signatures_cover_name_and_value():
    signed = sign(b"key", "name", b"value")
    assert verify(b"key", "name", signed) == b"value"
    for key, name, changed in [
        (b"other", "name", signed),
        (b"key", "nam", b"e" + signed),
        (b"key", "other", signed),
        (b"key", "name", signed + b"x"),
        (b"key", "name", b"value"),
        (b"key", "name", b""),
    ]:
        with pytest.raises(NotSigned):
            verify(key, name, changed)


def test_no_rank_sends_pickle():
    own = [path for room in PACKAGES for path in (ROOT / room).rglob("*.py")]
    assert Path(codec.__file__) in own
    calls = [
        str(path) for path in own if re.search(r"\b\w+_object(_list)?\(.*group|dist\.\w+_object", path.read_text())
    ]
    assert calls == []
