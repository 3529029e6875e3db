"""Duplicate rows: found by 64-bit hashes, confirmed by comparing the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, as in splitmix64
_KEY = 0x62643372  # seed of the multipliers; any works, because rows of equal hashes are compared
_AT_ONCE = 1 << 24  # bytes of rows compared at once
_LOOKED_UP = 1 << 20  # hashes


@dataclass(frozen=True)
class Duplicates:
    """Rows with equal tokens, numbered through the splits in order."""

    rows: np.ndarray  # [n] int64: every row that occurs more than once, sorted by (group, row)
    groups: np.ndarray  # [n] int64: the first row with the same tokens

    def pairs(self, most: int) -> list[tuple[int, int]]:
        """The first ``most`` pairs of (first row of a group, another row of it)."""
        again = np.flatnonzero(self.rows != self.groups)[:most]
        return list(zip(self.groups[again].tolist(), self.rows[again].tolist()))


def row_hashes(rows: np.ndarray) -> np.ndarray:
    """A 64-bit hash ``[n]`` of each row ``[n, L]``: a sum of its 8-byte words, mixed, times random odd numbers.

    Multilinear hashing (Carter and Wegman 1979) modulo 2^64 loses differences in the upper bits of words, so words are
    mixed first, by a bijection.
    """
    size = rows.shape[1] * rows.dtype.itemsize
    words = np.zeros((len(rows), -(-size // 8)), np.uint64)
    words.view(np.uint8)[:, :size] = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), size)
    words ^= words >> np.uint64(32)
    words *= _ODD
    words ^= words >> np.uint64(29)
    keys = np.random.Generator(np.random.Philox(_KEY)).integers(0, 2**64, words.shape[1], np.uint64) | np.uint64(1)
    hashes: np.ndarray = words @ keys
    hashes ^= hashes >> np.uint64(31)
    return hashes


def find_duplicates(hashes: np.ndarray, read: Callable[[np.ndarray], np.ndarray]) -> Duplicates:
    """Groups of rows with equal tokens. Memory: 16 bytes per row, and 40 per row with a repeated hash.

    Args:
        hashes: ``[n]`` uint64, equal for equal rows.
        read: rows ``[m, L]`` for row numbers ``[m]``.
    """
    left = _candidates(hashes)
    left = left[np.lexsort((left, hashes[left]))]
    rows, groups = [], []
    while len(left):  # once, unless different rows have the same hash
        key = hashes[left]
        begins = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
        leader = np.repeat(left[begins], np.diff([*begins, len(left)]))
        same = np.concatenate([(read(a) == read(b)).all(1) for a, b in _chunks(left, leader, read)])
        rows.append(left[same])
        groups.append(leader[same])
        left = left[~same]
    row, group = (np.concatenate(part) if part else np.empty(0, np.int64) for part in (rows, groups))
    order = np.lexsort((row, group))
    row, group = row[order], group[order]
    again = np.isin(group, group[row != group])
    return Duplicates(row[again], group[again])


def _candidates(hashes: np.ndarray) -> np.ndarray:
    """Rows whose hash another row has, too, ascending."""
    ordered = np.sort(hashes)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(twice):
        return np.empty(0, np.int64)
    found = []
    for begin in range(0, len(hashes), _LOOKED_UP):
        chunk = hashes[begin : begin + _LOOKED_UP]
        near = twice[np.minimum(np.searchsorted(twice, chunk), len(twice) - 1)]
        found.append(np.flatnonzero(near == chunk) + begin)
    return np.concatenate(found)


def _chunks(
    left: np.ndarray, leader: np.ndarray, read: Callable[[np.ndarray], np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    step = max(1, _AT_ONCE // max(1, read(left[:1]).nbytes))
    for begin in range(0, len(left), step):
        yield left[begin : begin + step], leader[begin : begin + step]
