"""Packing keeps every token, in order, and knows where documents start."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.pack import Packer, Rows

BOS, EOS = 1, 2
documents = st.lists(st.lists(st.integers(3, 60_000), max_size=30), max_size=30)


def pack(docs, length, mode, rows_per_chunk=3, batch=4) -> tuple[list[Rows], int]:
    packer = Packer(length, BOS, EOS, mode, np.dtype("<u2"), rows_per_chunk)
    chunks = [chunk for i in range(0, len(docs), batch) for chunk in packer.add(docs[i : i + batch])]
    last, dropped = packer.finish()
    assert all(len(chunk.tokens) == rows_per_chunk for chunk in chunks)
    return chunks + last, dropped


def stack(chunks: list[Rows], length: int) -> np.ndarray:
    return np.concatenate([np.empty((0, length), "<u2"), *(chunk.tokens for chunk in chunks)])


@given(documents, st.integers(4, 20), st.integers(1, 5), st.integers(1, 7))
def test_wrap_keeps_the_stream(docs, length, rows_per_chunk, batch):
    chunks, dropped = pack(docs, length, "wrap", rows_per_chunk, batch)
    stream = [token for doc in docs for token in (*doc, EOS)]
    rows = stack(chunks, length)
    assert (rows[:, 0] == BOS).all()
    assert (rows[:, -1] == EOS).all()
    assert rows[:, 1:-1].ravel().tolist() == stream[: len(stream) - dropped]
    assert 0 <= dropped < length - 2


@given(documents, st.integers(4, 20), st.integers(1, 5), st.integers(1, 7))
def test_stream_keeps_the_stream(docs, length, rows_per_chunk, batch):
    chunks, dropped = pack(docs, length, "stream", rows_per_chunk, batch)
    stream = [token for doc in docs for token in (BOS, *doc, EOS)]
    assert stack(chunks, length).ravel().tolist() == stream[: len(stream) - dropped]
    assert 0 <= dropped < length


@pytest.mark.parametrize("mode", ["wrap", "stream"])
@given(docs=documents, length=st.integers(4, 20))
def test_document_starts(mode, docs, length):
    """A start is where a document has its first token; the wrapping BOS belongs to the one that begins behind it."""
    chunks, _ = pack(docs, length, mode)
    shift, width = (1, length - 2) if mode == "wrap" else (0, length)
    pieces = [[*doc, EOS] if mode == "wrap" else [BOS, *doc, EOS] for doc in docs]
    is_start = [i == 0 for piece in pieces for i in range(len(piece))]
    row = 0
    for chunk in chunks:
        for i in range(len(chunk.tokens)):
            new = [p for p in range(width) if is_start[(row + i) * width + p]]
            expected = [p + shift if p else 0 for p in new]
            assert chunk.docs[chunk.docs[:, 0] == i, 1].tolist() == expected
        row += len(chunk.tokens)
        assert chunk.docs.dtype == np.dtype("<i4")


def test_golden_rows():
    docs = [[10, 11, 12], [20], [30, 31, 32, 33, 34]]
    (wrap,), dropped = pack(docs, 6, "wrap")
    assert wrap.tokens.tolist() == [[1, 10, 11, 12, 2, 2], [1, 20, 2, 30, 31, 2], [1, 32, 33, 34, 2, 2]]
    assert wrap.docs.tolist() == [[0, 0], [1, 0], [1, 3]]
    assert dropped == 0
    (stream,), dropped = pack(docs, 6, "stream")
    assert stream.tokens.tolist() == [[1, 10, 11, 12, 2, 1], [20, 2, 1, 30, 31, 32]]
    assert stream.docs.tolist() == [[0, 0], [0, 5], [1, 2]]
    assert dropped == 3


def test_one_document_longer_than_many_chunks():
    chunks, dropped = pack([list(range(3, 1003))], 10, "wrap", rows_per_chunk=2)
    assert sum(len(chunk.tokens) for chunk in chunks) == 1001 // 8
    assert dropped == 1001 % 8
