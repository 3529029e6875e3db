"""Packing keeps every token, in order, and knows where documents start."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.build.assemble import Segment, Stream
from data_prep.format.pack import RowFormat, Rows

BOS, EOS = 1, 2
documents = st.lists(st.lists(st.integers(3, 60_000), max_size=30), max_size=30)


def form(length: int, packing: str, add_bos: bool = True, add_eos: bool = True) -> RowFormat:
    return RowFormat(length, packing, BOS, EOS, add_bos, add_eos)


def pack(docs, rows: RowFormat) -> tuple[Rows, int]:
    """Rows of the documents, and the tokens that fill none."""
    pieces = [[*rows.head, *doc, *rows.tail] for doc in docs]
    stream = np.array([token for piece in pieces for token in piece], "<u2")
    starts = np.cumsum([0, *map(len, pieces)])[:-1].astype(np.int64)
    whole = len(stream) // rows.width * rows.width
    return rows.cut(stream[:whole], starts[: np.searchsorted(starts, whole)]), len(stream) - whole


@given(documents, st.integers(4, 20))
def test_wrap_keeps_the_stream(docs, length):
    rows, dropped = pack(docs, form(length, "wrap"))
    stream = [token for doc in docs for token in (*doc, EOS)]
    assert (rows.tokens[:, 0] == BOS).all()
    assert (rows.tokens[:, -1] == EOS).all()
    assert rows.tokens[:, 1:-1].ravel().tolist() == stream[: len(stream) - dropped]
    assert 0 <= dropped < length - 2


@given(documents, st.integers(4, 20), st.booleans(), st.booleans())
def test_stream_keeps_the_stream(docs, length, add_bos, add_eos):
    rows, dropped = pack(docs, form(length, "stream", add_bos, add_eos))
    stream = [token for doc in docs for token in (*[BOS] * add_bos, *doc, *[EOS] * add_eos)]
    assert rows.tokens.ravel().tolist() == stream[: len(stream) - dropped]
    assert 0 <= dropped < length


@pytest.mark.parametrize("mode", ["wrap", "stream"])
@given(docs=documents, length=st.integers(4, 20))
def test_document_starts(mode, docs, length):
    """A start is where a document has its first token; the wrapping BOS belongs to the one that begins behind it."""
    rows, _ = pack(docs, form(length, mode))
    shift, width = (1, length - 2) if mode == "wrap" else (0, length)
    pieces = [[*doc, EOS] if mode == "wrap" else [BOS, *doc, EOS] for doc in docs]
    is_start = [i == 0 for piece in pieces for i in range(len(piece))]
    for row in range(len(rows.tokens)):
        new = [p for p in range(width) if is_start[row * width + p]]
        assert rows.docs[rows.docs[:, 0] == row, 1].tolist() == [p + shift if p else 0 for p in new]
    assert rows.docs.dtype == np.dtype("<i4")


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=6), st.integers(1, 40), st.integers(1, 12)
)
def test_a_stream_is_the_same_however_it_is_cut(parts, size, smaller):
    """Parts have documents of these lengths; sections of sections give back every token and every start."""
    rows = form(8, "stream")
    tokens = np.arange(sum(map(sum, parts)), dtype="<u2")
    starts = np.cumsum([0, *(n for part in parts for n in part)])[:-1]
    with tempfile.TemporaryDirectory() as folder:
        segments, begin = [], 0
        for number, part in enumerate(parts):
            place = Path(folder) / str(number)
            place.mkdir()
            tokens[begin : begin + sum(part)].tofile(place / "train.tokens")
            np.cumsum([0, *part])[:-1].astype("<i8").tofile(place / "train.starts")
            segments.append(Segment(place, 0, sum(part)))
            begin += sum(part)
        stream = Stream("train", tuple(segments), rows, "<u2")
        found, places, at = [], [], 0
        for section in stream.sections(size):
            assert section.tokens == min(size, len(tokens) - at)
            for part in section.sections(smaller):
                got, here = part.read()
                found += got.tolist()
                places += (here + at).tolist()
                at += len(got)
    assert found == tokens.tolist()
    assert places == starts.tolist()


def test_golden_rows():
    docs = [[10, 11, 12], [20], [30, 31, 32, 33, 34]]
    wrap, dropped = pack(docs, form(6, "wrap"))
    assert wrap.tokens.tolist() == [[1, 10, 11, 12, 2, 2], [1, 20, 2, 30, 31, 2], [1, 32, 33, 34, 2, 2]]
    assert wrap.docs.tolist() == [[0, 0], [1, 0], [1, 3]]
    assert dropped == 0
    stream, dropped = pack(docs, form(6, "stream"))
    assert stream.tokens.tolist() == [[1, 10, 11, 12, 2, 1], [20, 2, 1, 30, 31, 32]]
    assert stream.docs.tolist() == [[0, 0], [0, 5], [1, 2]]
    assert dropped == 3
