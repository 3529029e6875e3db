"""The order of rows: a function of (seed, position), without state and independent of the world size."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

ROUNDS = 6  # even, so that the halves end with the radices they began with
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: steps through all of uint64
HALF = np.uint64(32)


class RowOrder:
    """Visits every row once per epoch, in an order keyed by ``(seed, epoch)``, with O(1) memory.

    Position ``p`` of the endless stream belongs to epoch ``p // rows``; its row is a keyed permutation of
    ``p % rows``: a Feistel network over two digits of radices ``a`` and ``b`` with ``a b >= rows`` (Black and
    Rogaway, CT-RSA 2002), repeated until the number falls below ``rows``. Both radices are near the square
    root of ``rows``, so few numbers need a second pass. Only uint64 arithmetic is used: the order is the same
    on every machine and under every numpy.

    Raises:
        ValueError: no rows (or 2^62 and more), or a seed outside ``[0, 2^64)``.
    """

    def __init__(self, rows: int, seed: int):
        if not 0 < rows < 2**62:
            raise ValueError(f"rows={rows}: a row order needs at least one row and fewer than 2^62")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed}: not an unsigned 64-bit integer; use 0 or more")
        self.rows, self.seed = rows, seed

    def epoch_and_row(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, rows), int64, for stream positions int64 of any shape.

        Raises:
            ValueError: a position is negative.
        """
        positions = check_positions(positions)
        epochs, index = np.divmod(positions, self.rows)
        distinct, which = np.unique(epochs.ravel(), return_inverse=True)
        keys = round_keys(self.seed, distinct)[:, which]
        return epochs, permute(index.ravel(), self.rows, keys).reshape(positions.shape)


def check_positions(positions: np.ndarray) -> np.ndarray:
    """Stream positions as int64; raises ValueError where one is negative."""
    positions = np.asarray(positions, np.int64)
    if (positions < 0).any():
        raise ValueError(f"position {positions.min()}: below 0; the stream begins at 0")
    return positions


def permute(index: np.ndarray, size: int | np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Keyed permutations of ``[0, size)``, where equal sizes and keys belong to one permutation.

    Args:
        index: int64 ``[n]``, each below its size.
        size: of the permuted range, below 2^62: one for all, or int64 ``[n]``.
        keys: uint64 ``[ROUNDS, n]`` of :func:`round_keys`.

    Returns:
        int64 ``[n]``.
    """
    sizes = np.broadcast_to(np.asarray(size, np.int64), index.shape).astype(np.uint64)
    distinct, which = np.unique(sizes, return_inverse=True) if np.ndim(size) else (sizes[:1], None)
    low = np.array([math.isqrt(int(n) - 1) + 1 for n in distinct], np.uint64)  # ceil of the square root
    low = low[which] if which is not None else np.broadcast_to(low, sizes.shape) if low.size else low
    high = (sizes + low - np.uint64(1)) // low
    value = _feistel(index.astype(np.uint64), low, high, keys)
    walking = np.flatnonzero(value >= sizes)
    while walking.size:
        value[walking] = _feistel(value[walking], low[walking], high[walking], keys[:, walking])
        walking = walking[value[walking] >= sizes[walking]]
    return value.astype(np.int64)


def round_keys(seed: int, *parts: np.ndarray) -> np.ndarray:
    """Round keys ``[ROUNDS, n]`` for the numbers in ``parts`` (int64 ``[n]`` each).

    mix(mix(... mix(seed) + part ...) + round GOLDEN), where mix is a bijection of uint64.
    """
    base = np.array([seed], np.uint64)
    for part in parts:
        base = _mix(base) + part.astype(np.uint64)
    return _mix(_mix(base) + np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None] * GOLDEN)


def derive_seed(seed: int, number: int) -> int:
    """Seed of the ``number``-th data set (0 keeps ``seed``)."""
    return int(_mix(np.array([seed], np.uint64) + np.array([number], np.uint64) * GOLDEN)[0]) if number else seed


def _feistel(value: np.ndarray, a: np.ndarray, b: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One pass of the network over ``[0, a b)``; all ``[n]``, but ``keys`` ``[ROUNDS, n]``."""
    right, left = np.divmod(value, a)  # below b, below a
    for key in keys:
        # The upper 32 bits of the mix, scaled to [0, a); a is below 2^32.
        step = ((_mix(right ^ key) >> HALF) * a) >> HALF
        moved = left + step
        left, right = right, np.where(moved < a, moved, moved - a)
        a, b = b, a
    permuted: np.ndarray = left + right * a
    return permuted


class LaneOrder:
    """Visits every row once per epoch so that few shards are read at a time; for shards in an object store.

    The shards of an epoch, in an order keyed by ``(seed, epoch)``, are laid end to end. Each of ``lanes`` lanes
    has a contiguous part of these rows, and position ``i`` of the epoch is row ``i // lanes`` of lane ``i % lanes``. A
    lane reads its shards one after another and permutes the rows of each. A rank that reads some of the lanes fetches
    the shards of these lanes only. The order is a function of (seed, epoch, position); memory is one number per
    shard.

    Args:
        shard_rows: rows of each shard, int64 ``[shards]``; rows are numbered shard after shard.
        seed: in ``[0, 2^64)``.
        lanes: number of lanes; may exceed the number of rows or shards.

    Raises:
        ValueError: no rows, a bad seed, or no lanes.
    """

    def __init__(self, shard_rows: np.ndarray, seed: int, lanes: int):
        if lanes < 1:
            raise ValueError(f"lanes={lanes}: use 1 or more")
        self._shard_rows = np.asarray(shard_rows, np.int64)
        self._shard_rows_before = np.cumsum(self._shard_rows) - self._shard_rows
        self.rows, self.seed, self.lanes = int(self._shard_rows.sum()), seed, lanes
        RowOrder(self.rows, seed)  # checks both
        self._axis = lru_cache(4)(self._build_axis)

    def epoch_and_row(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, rows), int64, for stream positions int64 of any shape.

        Raises:
            ValueError: a position is negative.
        """
        positions = check_positions(positions)
        epochs, index = np.divmod(positions, self.rows)
        rows = np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._rows_of(epoch, index[here])
        return epochs, rows

    def lane(self, positions: np.ndarray) -> np.ndarray:
        """The lane that each position is read from, int64."""
        return np.asarray(positions, np.int64) % self.rows % self.lanes

    def _rows_of(self, epoch: int, index: np.ndarray) -> np.ndarray:
        shards, ends = self._axis(epoch)
        line, lane = np.divmod(index, self.lanes)
        each, extra = divmod(self.rows, self.lanes)
        start = lane * each + np.minimum(lane, extra)
        stop = start + each + (lane < extra)
        place = np.searchsorted(ends, start + line, side="right")  # which shard of the epoch's order
        # The part of that shard that belongs to this lane is permuted; it is known by where it begins.
        before = ends[place] - self._shard_rows[shards[place]]
        first = np.maximum(before, start)
        size = np.minimum(ends[place], stop) - first
        keys = round_keys(self.seed, np.full_like(first, epoch), first)
        moved = first + permute(start + line - first, size, keys)
        rows: np.ndarray = self._shard_rows_before[shards[place]] + moved - before
        return rows

    def _build_axis(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards in the epoch's order, end of each on the axis of rows)."""
        count = len(self._shard_rows)
        _, shards = RowOrder(count, self.seed).epoch_and_row(epoch * count + np.arange(count))
        return shards, np.cumsum(self._shard_rows[shards])


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: a bijection of uint64 whose output bits depend on every input bit."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
