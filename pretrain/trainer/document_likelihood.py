"""Evaluation by document: each one's nll, joined over the rows it lies in, and statistics over documents."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray

from bd3_common.atomic import write_bytes
from bd3_common.errors import ConfigError
from data_prep.read.reader import RowReader
from data_prep.read.stream import RowStream

_ROWS = 4096  # rows whose documents are read at once


@dataclass(frozen=True)
class DocumentEvaluation:
    """Result over whole documents, which are the independent units. Position 0 of a row is no token of any.

    Attributes:
        documents: how many lie wholly in the rows evaluated and have a token that counts.
        documents_cut: how many were left out because a part of them lies in other rows.
        document_tokens: of the documents, together.
        document_nelbo, document_nelbo_stderr: nats per token over all of them, each weighted by its tokens: an upper
            bound on the negative log-likelihood; its standard error, of a ratio estimator over documents.
        document_perplexity, document_perplexity_stderr: exp of that, and its standard error to first order.
        document_mean, document_mean_stderr: mean over documents of nats per token, each weighted alike.
    """

    documents: int
    documents_cut: int
    document_tokens: int
    document_nelbo: float
    document_nelbo_stderr: float
    document_perplexity: float
    document_perplexity_stderr: float
    document_mean: float
    document_mean_stderr: float

    def record(self) -> dict[str, float | int | None]:
        """The fields for JSON, which has no NaN: the standard error of a single document is null."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Documents:
    """Whole documents ``[n]``: their numbers in the split, nats (sums of weighted nll) and tokens; and how many others
    were cut."""

    numbers: NDArray[np.int64]
    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    cut: int

    def summarize(self) -> DocumentEvaluation:
        """Statistics over the documents.

        Raises:
            ConfigError: there is none.
        """
        if not len(self.numbers):
            raise ConfigError("rows: no document lies wholly in the rows evaluated; use more of them, or all")
        nelbo, error = ratio(self.nats, self.tokens)
        perplexity = math.exp(min(nelbo, 700.0))
        mean, mean_error = ratio(self.nats / self.tokens, 1)
        counts = len(self.numbers), self.cut, int(self.tokens.sum())
        return DocumentEvaluation(*counts, nelbo, error, perplexity, perplexity * error, mean, mean_error)

    def write(self, path: Path) -> None:
        """One line of JSON per document, in the order of their numbers; the file is whole or as it was before."""
        columns = self.numbers.tolist(), self.tokens.tolist(), self.nats.tolist()
        lines = [json.dumps({"document": d, "tokens": t, "nats": x}) + "\n" for d, t, x in zip(*columns)]
        write_bytes(path, "".join(lines).encode())


class DocumentTally:
    """Adds up nll by document while rows are evaluated, on every rank those of its rows."""

    def __init__(self, reader: RowReader | RowStream):
        self.reader = reader
        self._rows: list[np.ndarray] = []
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # numbers, nats, tokens

    def add(self, rows: NDArray[np.int64], nats: NDArray[np.float64], counted: NDArray[np.bool_]) -> None:
        """Add ``nats`` ``[n, L]`` of the tokens of ``rows`` ``[n]``; ``counted`` ``[n, L]`` says where one counts."""
        numbers, place = np.unique(self.reader.documents(rows), return_inverse=True)
        place = place.ravel()
        self._rows.append(rows)
        tokens = np.bincount(place, counted.ravel(), len(numbers)).astype(np.int64)
        self._parts.append((numbers, np.bincount(place, nats.ravel(), len(numbers)), tokens))

    def gather(self) -> Documents:
        """The whole documents among the rows of all data-parallel ranks; every rank calls it and gets all."""
        group = parallel_state.get_data_parallel_group()
        gathered: list[tuple] = [()] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (np.concatenate(self._rows), self._parts), group)
        rows = np.concatenate([rows for rows, _ in gathered])
        columns = zip(*(part for _, parts in gathered for part in parts))
        numbers, nats, tokens = (np.concatenate(column) for column in columns)
        numbers, place = np.unique(numbers, return_inverse=True)
        place = place.ravel()
        nats, tokens = (np.bincount(place, x, len(numbers)) for x in (nats, tokens))
        # A document may have no token but one at position 0 of a row.
        present = tokens > 0
        cut = np.isin(numbers, cut_documents(self.reader, rows))
        whole = present & ~cut
        return Documents(numbers[whole], nats[whole], tokens[whole].astype(np.int64), int((present & cut).sum()))


def cut_documents(reader: RowReader | RowStream, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the documents of ``rows`` that go on in the row before or after, where that is not one of ``rows``,
    or may go on where a data set ends.

    Position 0 of a row, which no evaluation counts, does not make a document go on there.
    """
    chosen = np.zeros(len(reader), bool)
    chosen[rows] = True
    cut = [reader.unfinished]
    # Pairs of rows one after the other of which one was chosen.
    edges = np.flatnonzero(chosen[:-1] != chosen[1:])
    for some in _pieces(edges):
        before, after = reader.documents(some)[:, -1], reader.documents(some + 1)[:, 1]
        cut.append(before[before == after])
    return np.concatenate(cut)


def ratio(sums: NDArray[np.float64], counts: NDArray[np.int64] | int) -> tuple[float, float]:
    """Sum of ``sums`` ``[n]`` over the sum of ``counts`` (one for all, or ``[n]``), and its standard error.

    The n pairs are independent samples; the error is that of a ratio estimator (Cochran, Sampling Techniques, 2.11),
    which for equal counts is the mean's. A single sample has none: NaN.
    """
    count, mean_count = len(sums), np.mean(counts)
    scaled = sums / mean_count
    mean = float(scaled.mean())
    # With equal counts exactly ``scaled``. The mean of the residuals is the ratio itself, which std subtracts.
    residuals = scaled - mean * (counts / mean_count - 1)
    return mean, float(residuals.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan


def _pieces(numbers: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(numbers), _ROWS):
        yield numbers[start : start + _ROWS]
