"""Packing the token stream of a split into rows of one length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Packing = Literal["wrap", "stream"]


class Rows(NamedTuple):
    """Packed rows and where documents start in them."""

    tokens: np.ndarray  # [n, L], the vocabulary's dtype
    docs: np.ndarray  # [m, 2] int32: (row, position) of every document's first token, ascending


@dataclass(frozen=True)
class RowFormat:
    """Packing of a split's documents into one stream of tokens, and of the stream into rows of ``length``.

    ``wrap`` (the paper's) ends each document with EOS, cuts the stream every ``length - 2`` tokens, and writes each
    row as ``[BOS] + chunk + [EOS]``. ``stream`` concatenates ``BOS document EOS``, of which BOS and EOS are optional,
    and cuts every ``length`` tokens. In both, a row may begin within a document that starts in an earlier row.
    """

    length: int
    packing: Packing
    bos: int
    eos: int
    add_bos: bool
    add_eos: bool

    @property
    def shift(self) -> int:
        """Position of a row's first stream token."""
        return 1 if self.packing == "wrap" else 0

    @property
    def width(self) -> int:
        """Stream tokens in a row."""
        return self.length - 2 * self.shift

    @property
    def head(self) -> tuple[int, ...]:
        """Tokens before each document."""
        return (self.bos,) if self.packing == "stream" and self.add_bos else ()

    @property
    def tail(self) -> tuple[int, ...]:
        """Tokens after each document."""
        return (self.eos,) if self.packing == "wrap" or self.add_eos else ()

    def cut(self, stream: np.ndarray, starts: np.ndarray) -> Rows:
        """Cut ``stream`` ``[n * width]`` into rows; ``starts`` are the offsets of documents in it, ascending."""
        chunks = stream.reshape(-1, self.width)  # [n, width]
        tokens = np.empty((len(chunks), self.length), stream.dtype)  # [n, L]
        tokens[:, self.shift : self.shift + self.width] = chunks
        if self.packing == "wrap":
            tokens[:, 0], tokens[:, -1] = self.bos, self.eos
        row, position = np.divmod(starts, self.width)
        # A document whose first token follows the row's BOS begins at position 0: BOS belongs to it.
        position = np.where(position == 0, 0, position + self.shift)
        return Rows(tokens, np.stack([row, position], axis=1).astype("<i4"))
