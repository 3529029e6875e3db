"""The stream of rows that a run is trained on: one data set or a mix of several, in a seeded order.

The row at a position of the stream depends on the data sets, the order's options and the seed alone, so that a run may
resume with another number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from data_prep.errors import DataError
from data_prep.format.manifest import Manifest
from data_prep.read.order import ROUNDS, LaneOrder, RowOrder, check_positions, derive_seed, permute, round_keys
from data_prep.read.reader import RowReader

PERIOD = 1 << 16  # slots over which the shares of a mix are exact
Order = Literal["global", "lanes"]


class Mix:
    """Divides a stream among data sets: of every ``PERIOD`` positions, data set ``d`` has ``counts[d]``.

    The counts are the weights times the period, rounded so that they add up (largest remainder), and 1 at least. The
    positions of a period are assigned in an order keyed by ``(seed, period)``. Each data set's own positions are
    used in order, none left out: 0, 1, 2, ...

    Raises:
        ValueError: a weight is not a positive number, or there are none or more than ``PERIOD``.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        if not 0 < len(weights) <= PERIOD:
            raise ValueError(f"a mix of {len(weights)} data sets: use 1 to {PERIOD}")
        for number, weight in enumerate(weights):
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"weight {weight} of data set {number} of the mix: use a number above 0")
        self.seed, self.counts = seed, _shares(np.array(weights, float))
        # Data set of each slot of a period, before the shuffle.
        self._owners = np.repeat(np.arange(len(weights)), self.counts)
        self._before = np.cumsum(self.counts) - self.counts
        self._period = lru_cache(4)(self._build_period)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(data sets, own positions), int64 ``[n]``, for positions int64 ``[n]`` of the stream."""
        periods, slots = np.divmod(positions, PERIOD)
        owners, own = np.empty_like(slots), np.empty_like(slots)
        for period in np.unique(periods).tolist():
            here = periods == period
            owner, earlier = self._period(period)
            owners[here] = owner[slots[here]]
            own[here] = period * self.counts[owners[here]] + earlier[slots[here]]
        return owners, own

    def positions(self, position: int) -> np.ndarray:
        """Number of positions of each data set before ``position`` of the stream, int64 ``[data sets]``."""
        period, slot = divmod(position, PERIOD)
        inside = np.bincount(self._period(period)[0][:slot], minlength=len(self.counts))
        return period * self.counts + inside

    def _build_period(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """(data set of each slot, number of earlier slots of the same data set)."""
        keys = np.broadcast_to(round_keys(self.seed, np.array([period])), (ROUNDS, PERIOD))
        owner = self._owners[permute(np.arange(PERIOD), PERIOD, keys)]
        earlier = np.empty(PERIOD, np.int64)
        earlier[np.argsort(owner, kind="stable")] = np.arange(PERIOD) - self._before[self._owners]
        return owner, earlier


class RowStream:
    """Rows of one split of one or several data sets, in the order of training.

    Rows are numbered through all data sets, those of the second after those of the first. So a row number is unique,
    and with it the noise, which is keyed by epoch and row number. Each data set has its own epochs; an epoch has each
    of its rows once.

    Args:
        readers: the data sets, all with the same row length, vocabulary, special ids and tokenizer.
        weights: share of each in the stream, in any unit; None: equal shares.
        seed: seed of the order, in ``[0, 2^64)``.
        order: ``global`` permutes all rows of a data set (:class:`RowOrder`); ``lanes`` reads few shards at a time
            (:class:`LaneOrder`).
        lanes: number of lanes of order ``lanes``.

    Raises:
        DataError: two data sets differ in length, vocabulary, special ids or tokenizer, or one has no rows.
        ValueError: a bad seed, weight or number of lanes.
    """

    def __init__(
        self,
        readers: Sequence[RowReader],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        order: Order = "global",
        lanes: int = 64,
    ):
        _check_alike(readers)
        self.readers = list(readers)
        weights = [1.0] * len(readers) if weights is None else weights
        if len(weights) != len(readers):
            raise ValueError(f"{len(weights)} weights for {len(readers)} data sets; give one for each")
        self.mix = Mix(weights, seed) if len(readers) > 1 else None
        self.length, self.dtype, self.remote = readers[0].length, readers[0].dtype, any(r.remote for r in readers)
        seeds = [derive_seed(seed, number) for number in range(len(readers))]
        self.orders: list[LaneOrder] | list[RowOrder]
        if order == "lanes":
            self.orders = [LaneOrder(r.shard_rows(), own, lanes) for r, own in zip(readers, seeds)]
        else:
            self.orders = [RowOrder(len(r), own) for r, own in zip(readers, seeds)]
        self._first = np.cumsum([0, *map(len, readers)])
        self._first_document = np.cumsum([0, *(reader.documents_started for reader in readers)])

    def __len__(self) -> int:
        """Number of rows of all data sets."""
        return int(self._first[-1])

    @property
    def documents_started(self) -> int:
        """Number of documents that start in the rows; 0 if a data set has no document starts."""
        counts = [reader.documents_started for reader in self.readers]
        return sum(counts) if all(counts) else 0

    @property
    def manifests(self) -> list[Manifest]:
        """The manifest of each data set."""
        return [reader.manifest for reader in self.readers]

    @property
    def unfinished(self) -> np.ndarray:
        """Numbers, int64, of documents that may be truncated: the last one of each data set."""
        return np.concatenate([reader.unfinished + first for reader, first in zip(self.readers, self._first_document)])

    @property
    def unigram_perplexity(self) -> float:
        """Perplexity of the validation rows under each data set's own train counts.

        For several data sets: exp of their mean nats per token, weighted by the tokens of their validation splits.
        """
        if len(self.readers) == 1:
            return self.readers[0].manifest.validation_unigram_perplexity
        tokens = [manifest.splits["validation"].tokens for manifest in self.manifests]
        nats = [manifest.validation_unigram_nats for manifest in self.manifests]
        return math.exp(np.average(nats, weights=tokens))

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, row numbers), int64 ``[n]``, at these positions ``[n]``; epochs are counted per data set.

        Raises:
            ValueError: a position is negative.
        """
        epochs, rows = np.empty((2, len(positions)), np.int64)
        for number, here, own in self._split(positions):
            epochs[here], rows[here] = self.orders[number].epoch_and_row(own)
            rows[here] += self._first[number]
        return epochs, rows

    def positions(self, position: int) -> list[int]:
        """Number of rows of each data set before ``position`` of the stream."""
        return [position] if self.mix is None else self.mix.positions(position).tolist()

    def slots(self, step: int, batch: int, rank: int, size: int) -> np.ndarray:
        """Slots of global batch ``step`` that one of ``size`` ranks takes, int64 ``[batch / size]``, ascending.

        The slots are consecutive. With lanes they are those of consecutive lanes, the same in every step, so that a
        rank reads few shards. Where lanes do not divide evenly among ranks, as in a mix, neighbours share one.

        Args:
            batch: rows of a global batch, a multiple of ``size``.
        """
        share = batch // size
        mine = np.arange(rank * share, (rank + 1) * share)
        if size == 1 or not isinstance(self.orders[0], LaneOrder):
            return mine
        lane = np.empty(batch, np.int64)
        for number, here, own in self._split(step * batch + np.arange(batch)):
            lane[here] = self.orders[number].lane(own)
        return np.sort(np.argsort(lane, kind="stable")[mine])

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Rows ``[n, length]`` in the stored type for row numbers ``[n]``; errors as in :meth:`RowReader.rows`."""
        if len(self.readers) == 1:
            return self.readers[0].rows(numbers)
        out = np.empty((len(numbers), self.length), self.dtype)
        for reader, here, own in self._owners(numbers):
            if here.any():
                out[here] = reader.rows(own)
        return out

    def documents(self, numbers: np.ndarray) -> np.ndarray:
        """Document number of each position, int64 ``[n, length]``, numbered through all data sets."""
        if len(self.readers) == 1:
            return self.readers[0].documents(numbers)
        out = np.empty((len(numbers), self.length), np.int64)
        for number, (reader, here, own) in enumerate(self._owners(numbers)):
            if here.any():
                out[here] = reader.documents(own) + self._first_document[number]
        return out

    def locate(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """Location of each of the rows ``[n]``, for messages and records.

        Keys: ``data`` (path or URL), ``row`` (of its split), ``shard`` (file name) and ``row_in_shard``.
        """
        found: list[dict[str, Any]] = [{}] * len(numbers)
        for reader, here, own in self._owners(numbers):
            ends = np.cumsum(reader.shard_rows())
            shards = np.searchsorted(ends, own, side="right")
            for place, row, shard in zip(np.flatnonzero(here).tolist(), own.tolist(), shards.tolist()):
                first = int(ends[shard]) - reader.shards[shard].rows
                found[place] = {
                    "data": str(reader.folder),
                    "row": row,
                    "shard": reader.shards[shard].name,
                    "row_in_shard": row - first,
                }
        return found

    def prefetch(self, numbers: np.ndarray) -> None:
        """Fetch the remote shards of rows ``[n]`` in the background, in the order of the rows."""
        if self.remote:
            for reader, here, own in self._owners(numbers):
                if reader.remote and here.any():
                    reader.prefetch(own)

    def _owners(self, numbers: np.ndarray) -> Iterator[tuple[RowReader, np.ndarray, np.ndarray]]:
        """For each data set: its reader, a mask of the rows that belong to it, and their numbers in the data set."""
        numbers = np.asarray(numbers)
        outside = numbers[(numbers < 0) | (numbers >= len(self))]
        if outside.size:
            raise IndexError(f"row {outside[0]}: there are rows 0 to {len(self) - 1}")
        owner = np.searchsorted(self._first, numbers, side="right") - 1
        for number, reader in enumerate(self.readers):
            here = owner == number
            yield reader, here, numbers[here] - self._first[number]

    def _split(self, positions: np.ndarray) -> Iterator[tuple[int, slice | np.ndarray, np.ndarray]]:
        """For each data set: its number, a mask of the positions that belong to it, and their places in its order."""
        positions = check_positions(positions)
        if self.mix is None:
            yield 0, slice(None), positions
            return
        owner, own = self.mix.at(positions)
        for number in range(len(self.readers)):
            here = owner == number
            yield number, here, own[here]


def _shares(weights: np.ndarray) -> np.ndarray:
    """Integers proportional to the weights, at least 1 each, that add up to ``PERIOD``."""
    exact = weights / weights.max()
    exact = exact / exact.sum() * PERIOD
    counts: np.ndarray = np.maximum(np.floor(exact).astype(np.int64), 1)
    # The largest remainders get what is missing. Where the minimum of 1 makes the sum too large, the smallest give.
    missing = PERIOD - int(counts.sum())
    if missing > 0:
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    for _ in range(-missing):
        counts[np.argmax(counts - exact + (counts <= 1) * -2.0 * PERIOD)] -= 1
    return counts


def _check_alike(readers: Sequence[RowReader]) -> None:
    if not readers:
        raise ValueError("a stream needs at least one data set")
    first = readers[0]
    for reader in readers:
        if len(reader) == 0:
            raise DataError(f"{reader.folder}: its {reader.split} split has no rows; leave it out or write more text")
        for name in ("length", "dtype", "vocab_size", "bos_id", "eos_id", "mask_id", "tokenizer_sha256"):
            one, other = getattr(first.manifest, name), getattr(reader.manifest, name)
            if one != other:
                one, other = (str(value)[:12] for value in (one, other))
                raise DataError(
                    f"{name}: {first.folder} has {one}, {reader.folder} has {other}; a mix needs the same in all: "
                    "write them with the same tokenizer and length (bd3 prep --tokenizer)"
                )
