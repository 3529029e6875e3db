"""The order of rows: a function of (seed, position), so that it needs no state and knows no world size."""

from __future__ import annotations

import math

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
        low = math.isqrt(rows - 1) + 1  # ceil of the square root
        self._radices = (low, -(-rows // low))

    def epoch_and_row(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, rows), int64, for stream positions int64 of any shape.

        Raises:
            ValueError: a position is negative.
        """
        positions = np.asarray(positions, np.int64)
        if (positions < 0).any():
            raise ValueError(f"position {positions.min()}: below 0; the stream begins at 0")
        epochs, index = np.divmod(positions, self.rows)
        keys = self._keys(epochs.ravel())
        value = index.ravel().astype(np.uint64)
        walking = np.arange(value.size)
        while walking.size:
            value[walking] = self._permute(value[walking], keys[:, walking])
            walking = walking[value[walking] >= self.rows]
        return epochs, value.astype(np.int64).reshape(positions.shape)

    def _keys(self, epochs: np.ndarray) -> np.ndarray:
        """Round keys ``[ROUNDS, n]``: mix(mix(mix(seed) + epoch) + round GOLDEN)."""
        distinct, which = np.unique(epochs, return_inverse=True)
        base = _mix(_mix(np.array([self.seed], np.uint64)) + distinct.astype(np.uint64))
        return _mix(base + np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None] * GOLDEN)[:, which]

    def _permute(self, value: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """One pass of the network over ``[0, a b)``; ``value`` ``[n]``, ``keys`` ``[ROUNDS, n]``."""
        a, b = (np.uint64(radix) for radix in self._radices)
        right, left = np.divmod(value, a)  # below b, below a
        for key in keys:
            # The upper 32 bits of the mix, scaled to [0, a); a is below 2^32.
            step = ((_mix(right ^ key) >> HALF) * a) >> HALF
            moved = left + step
            left, right = right, np.where(moved < a, moved, moved - a)
            a, b = b, a
        return left + right * a


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: a bijection of uint64 whose output bits depend on every input bit."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
