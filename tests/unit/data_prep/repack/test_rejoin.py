"""Chunks of a stream in one packing become those of another, wherever they are cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.format.pack import RowFormat
from data_prep.repack.rejoin import Chunk, Repacking

FORMATS = [(bos, eos) for bos in (False, True) for eos in (False, True)]


def stream_of(documents: list[list[int]], form: RowFormat) -> tuple[list[int], list[int]]:
    """Tokens, and the starts of the documents that have any."""
    tokens, starts = [], []
    for ids in documents:
        whole = [*form.head, *ids, *form.tail]
        starts += [len(tokens)] if whole else []
        tokens += whole
    return tokens, starts


@given(
    documents=st.lists(st.lists(st.integers(3, 9), max_size=3), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30),
    made=st.sampled_from(FORMATS),
    wanted=st.sampled_from(FORMATS),
    eos=st.sampled_from([0, 1]),
)
def test_any_chunks_of_any_packing(documents, cuts, made, wanted, eos):
    before, after = (RowFormat(8, "stream", 0, eos, *form) for form in (made, wanted))
    if not any(made):  # empty documents are not in such a stream
        documents = [ids for ids in documents if ids]
    tokens, starts = (np.array(part, np.int64) for part in stream_of(documents, before))
    ends = np.unique(np.minimum(np.cumsum([*cuts, 999]), len(tokens)))
    chunks = [
        Chunk(tokens[a:b], starts[(starts >= a) & (starts < b)] - a) for a, b in zip([0, *ends[:-1]], ends) if a < b
    ]
    changed = Repacking(before, after, False, "x")
    found, places, empty = [], [], 0
    for n, chunk in enumerate(chunks):
        new, dropped = changed.chunk(chunk, chunks[n + 1].begins if n + 1 < len(chunks) else True)
        places += (new.starts + len(found)).tolist()
        found += new.tokens.tolist()
        empty += dropped
    assert (found, places) == stream_of(documents, after)
    assert empty == (0 if any(wanted) else documents.count([]))


def test_documents_without_their_ends_are_refused():
    changed = Repacking(RowFormat(8, "stream", 0, 1, True, True), RowFormat(8, "wrap", 0, 1, True, True), False, "x")
    for tokens, message in (([5, 1, 0, 6], "does not begin with BOS"), ([0, 5, 0, 6], "does not end with EOS")):
        with pytest.raises(DataError, match=f"x: a document {message}"):
            changed.chunk(Chunk(np.array(tokens), np.array([0, 2])), False)
