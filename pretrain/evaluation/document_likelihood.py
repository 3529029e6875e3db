"""Evaluation by document: nll of every document, summed over its rows, and statistics over documents."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core import parallel_state
from numpy.typing import NDArray

from bd3_common.atomic import write_bytes
from bd3_common.errors import ConfigError
from data_prep.read.reader import RowReader
from data_prep.read.stream import RowStream
from pretrain.distributed.messages import all_gather_values

_ROWS = 4096  # rows per chunk


class JsonRecord:
    """Base of results that are dataclasses."""

    def record(self: Any) -> dict[str, float | int | None]:
        """Fields for JSON, which has no NaN: the standard error of a single sample is null."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class DocumentEvaluation(JsonRecord):
    """Statistics over whole documents, the independent samples. Position 0 of a row belongs to no document.

    Attributes:
        documents: number of those that lie wholly in the evaluated rows and have a token that counts.
        documents_cut: number of those left out, because they go on in other rows.
        document_tokens: number of all their tokens.
        document_nelbo, document_nelbo_stderr: nats per token over all tokens, an upper bound on the negative
            log-likelihood, and its standard error: that of a ratio estimator over documents.
        document_perplexity, document_perplexity_stderr: exp(document_nelbo), and its standard error to first order.
        document_mean, document_mean_stderr: mean over documents of each one's nats per token.
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


@dataclass(frozen=True)
class Documents:
    """Documents of the evaluated rows that have a token that counts.

    Attributes:
        numbers: in the split, ``[n]``.
        nats: sums of the weighted nll over the evaluated rows, ``[n]``.
        tokens: ``[n]``.
        whole: False for those that go on in other rows, ``[n]``.
    """

    numbers: NDArray[np.int64]
    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    whole: NDArray[np.bool_]

    @property
    def cut(self) -> int:
        """Number of documents that go on in other rows."""
        return int((~self.whole).sum())

    def only_whole(self) -> Documents:
        """The documents that lie wholly in the evaluated rows."""
        whole = self.whole
        return Documents(self.numbers[whole], self.nats[whole], self.tokens[whole], whole[whole])

    def summarize(self) -> DocumentEvaluation:
        """Statistics over the whole documents.

        Raises:
            ConfigError: there is none.
        """
        whole = self.only_whole()
        if not len(whole.numbers):
            raise ConfigError("rows: no document lies wholly in the rows evaluated; use more of them, or all")
        nelbo, error = ratio(whole.nats, whole.tokens)
        perplexity = math.exp(min(nelbo, 700.0))
        mean, mean_error = ratio(whole.nats / whole.tokens, 1)
        counts = len(whole.numbers), self.cut, int(whole.tokens.sum())
        return DocumentEvaluation(*counts, nelbo, error, perplexity, perplexity * error, mean, mean_error)

    def write(self, path: Path) -> None:
        """Write one line of JSON per whole document, in the order of their numbers, atomically."""
        whole = self.only_whole()
        columns = whole.numbers.tolist(), whole.tokens.tolist(), whole.nats.tolist()
        lines = [json.dumps({"document": d, "tokens": t, "nats": x}) + "\n" for d, t, x in zip(*columns)]
        write_bytes(path, "".join(lines).encode())


class DocumentTally:
    """Sums of nll by document, over the rows that this rank evaluates."""

    def __init__(self, reader: RowReader | RowStream):
        self.reader = reader
        self._rows: list[np.ndarray] = []
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # numbers, nats, tokens

    def add(self, rows: NDArray[np.int64], nats: NDArray[np.float64], counted: NDArray[np.bool_]) -> None:
        """Add ``nats`` ``[n, L]`` of the tokens of ``rows`` ``[n]``; ``counted`` ``[n, L]`` masks those that count."""
        numbers, place = np.unique(self.reader.documents(rows), return_inverse=True)
        place = place.ravel()
        self._rows.append(rows)
        tokens = np.bincount(place, counted.ravel(), len(numbers)).astype(np.int64)
        self._parts.append((numbers, np.bincount(place, nats.ravel(), len(numbers)), tokens))

    def gather(self) -> Documents:
        """All-gather the documents of all data-parallel ranks' rows."""
        mine = [np.concatenate(column) for column in (self._rows, *zip(*self._parts))]
        gathered = all_gather_values(mine, parallel_state.get_data_parallel_group())
        rows, numbers, nats, tokens = (np.concatenate(column) for column in zip(*gathered))
        numbers, place = np.unique(numbers, return_inverse=True)
        place = place.ravel()
        nats, tokens = (np.bincount(place, x, len(numbers)) for x in (nats, tokens))
        # The only token of a document may be at position 0 of a row.
        present = tokens > 0
        whole = ~np.isin(numbers, cut_documents(self.reader, rows))
        return Documents(
            numbers[present], nats[present].astype(np.float64), tokens[present].astype(np.int64), whole[present]
        )


def cut_documents(reader: RowReader | RowStream, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the documents that ``rows`` cut: they also lie in a neighbouring row that is not one of ``rows``.

    Documents that the end of a data set may have cut are among them. A token at position 0 of a row, which no
    evaluation counts, does not continue a document.
    """
    chosen = np.zeros(len(reader), bool)
    chosen[rows] = True
    cut = [reader.unfinished]
    # Neighbouring rows of which only one is chosen.
    edges = np.flatnonzero(chosen[:-1] != chosen[1:])
    for some in _chunks(edges):
        before, after = reader.documents(some)[:, -1], reader.documents(some + 1)[:, 1]
        cut.append(before[before == after])
    return np.concatenate(cut)


def ratio(sums: NDArray[np.float64], counts: NDArray[np.int64] | int) -> tuple[float, float]:
    """Sum of ``sums`` ``[n]`` over the sum of ``counts`` (one for all, or ``[n]``), and its standard error.

    The n pairs are independent samples. The error is that of a ratio estimator (Cochran, Sampling Techniques, 2.11);
    for equal counts it is that of the mean. For a single sample it is NaN.
    """
    count = len(sums)
    mean = float((sums / np.mean(counts)).mean())
    residuals = ratio_residuals(sums, counts)
    return mean, float(residuals.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan


def ratio_residuals(sums: NDArray[np.float64], counts: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """Values ``[n]`` with the mean of :func:`ratio`; their spread gives its standard error."""
    mean_count = np.mean(counts)
    scaled = sums / mean_count
    # Equal to ``scaled`` for equal counts. Their mean is the ratio itself, which std subtracts.
    return np.asarray(scaled - scaled.mean() * (counts / mean_count - 1))


def _chunks(numbers: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(numbers), _ROWS):
        yield numbers[start : start + _ROWS]
