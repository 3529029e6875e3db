"""Packing token ids of documents into rows of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Packing = Literal["wrap", "stream"]


class Rows(NamedTuple):
    """Packed rows and where documents start in them."""

    tokens: np.ndarray  # [n, L], the vocabulary's dtype
    docs: np.ndarray  # [m, 2] int32: (row, position) of every document's first token, ascending


class Packer:
    """Packs documents, in order, into rows of exactly ``length`` tokens.

    ``wrap`` (the paper's) ends each document with EOS, cuts that stream every ``length - 2`` tokens, and
    writes each row as ``[BOS] + piece + [EOS]``. ``stream`` writes ``BOS document EOS`` one after another and
    cuts every ``length`` tokens. In either, a row may begin within a document, whose start an earlier row has.

    Rows come out ``rows_per_chunk`` at a time; no more than that and one batch is held in memory.
    """

    def __init__(self, length: int, bos: int, eos: int, mode: Packing, dtype: np.dtype, rows_per_chunk: int):
        self.length, self.bos, self.eos, self.mode, self.dtype = length, bos, eos, mode, dtype
        self.shift = 1 if mode == "wrap" else 0  # position of a row's first stream token
        self.width = length - 2 * self.shift  # stream tokens in a row
        self.chunk = rows_per_chunk * self.width
        self._stream = np.empty(0, dtype)
        self._starts = np.empty(0, np.int64)  # in the pending stream

    def add(self, documents: Sequence[Sequence[int]]) -> list[Rows]:
        """Append documents (token ids each) and return the chunks of rows that they complete."""
        head = [] if self.mode == "wrap" else [self.bos]
        pieces = [np.array([*head, *ids, self.eos], self.dtype) for ids in documents]
        ends = len(self._stream) + np.cumsum([0, *map(len, pieces)])
        self._stream = np.concatenate([self._stream, *pieces])
        self._starts = np.concatenate([self._starts, ends[:-1]])
        return [self._take(self.chunk) for _ in range(len(self._stream) // self.chunk)]

    def finish(self) -> tuple[list[Rows], int]:
        """The last, smaller chunk if a row is complete, and the number of stream tokens that fill no row."""
        whole = len(self._stream) // self.width * self.width
        rows = [self._take(whole)] if whole else []
        return rows, len(self._stream)

    def _take(self, count: int) -> Rows:
        """Cut ``count`` tokens, a multiple of the row width, off the pending stream."""
        taken, self._stream = np.split(self._stream, [count])
        taken_starts, rest = np.split(self._starts, [np.searchsorted(self._starts, count)])
        self._starts = rest - count

        n = count // self.width
        tokens = np.empty((n, self.length), self.dtype)
        tokens[:, self.shift : self.shift + self.width] = taken.reshape(n, self.width)
        if self.mode == "wrap":
            tokens[:, 0], tokens[:, -1] = self.bos, self.eos

        row, position = np.divmod(taken_starts, self.width)
        # A document that begins right after the wrapping BOS begins with it.
        position = np.where(position == 0, 0, position + self.shift)
        return Rows(tokens, np.stack([row, position], axis=1).astype("<i4"))
