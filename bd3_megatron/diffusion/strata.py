"""Strata of the unit interval: one for every block of a global batch and every draw (stratified sampling)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio


class Strata:
    """Assignment of the ``G D L / B'`` strata of a global batch of G rows with D draws (or pairs of draws) each.

    Version 2 spreads each row: its blocks take one stratum in each of ``L / B'`` equal parts of the interval, in random
    order. The place within the parts is that of the row (and draw): neighbours in the batch take mirrored places, and
    the pairs are far apart. So every row spans the interval, and an even number of rows, as ranks have them, has the
    interval's mean. Places are rotated and mirrored at random in every batch, which makes every single uniform exactly
    uniform.

    Version 1 gives neighbouring blocks neighbouring strata, from a random start per batch, so that a row sees a short
    part of the interval; runs that began with it keep it.

    Args:
        version: ``diffusion.noise_version``.
        batch_rows: G.
        groups: D.
        blocks: L / B'.
        coupled: draws that share a stratum: 1, or 2 for pairs.
        start: uniform in [0, 1), that of the batch.
    """

    def __init__(self, version: int, batch_rows: int, groups: int, blocks: int, coupled: int, start: float):
        self.version, self.batch_rows, self.groups, self.blocks = version, batch_rows, groups, blocks
        self.coupled = coupled
        self.count = batch_rows * groups * blocks
        self.start = start

    def uniforms(self, slot: int, group: int, stream: Callable[[int], NDArray[np.float64]]) -> NDArray[np.float64]:
        """Uniforms ``[L / B']`` of one row, each within its stratum.

        Args:
            slot: index of the row in the global batch.
            group: number of the draw, or of the pair.
            stream: uniforms of the sample.
        """
        if self.version == 1:
            u = stream(self.blocks)
            # Pairs of a row get distant strata, independent draws adjacent ones.
            first = slot * self.groups + group if self.coupled == 1 else group * self.batch_rows + slot
            strata = int(self.start * self.count) + first * self.blocks + np.arange(self.blocks)
        else:
            parts = np.argsort(stream(self.blocks), kind="stable")
            u = stream(self.blocks)
            strata = parts * (self.batch_rows * self.groups) + self.place(slot * self.groups + group)
        return np.asarray((strata % self.count + u) / self.count)

    def place(self, number: int) -> int:
        """Place within the parts of draw ``number`` of the batch: a permutation of ``range(G D)``, random by batch.

        In version 1 the draws lie in their order.
        """
        if self.version == 1:
            return number
        count = self.batch_rows * self.groups
        random = int(self.start * count)
        if count % 2:
            return int(mirrored_pairs(count)[(number + random) % count])
        place = int(mirrored_pairs(count)[(number + random // 2 * 2) % count])
        return count - 1 - place if random % 2 else place


@functools.lru_cache(maxsize=8)
def mirrored_pairs(count: int) -> NDArray[np.int64]:
    """Permutation ``[count]`` of pairs x and ``count - 1 - x`` in which neighbouring pairs are far apart.

    The pairs are ordered by multiples of the golden ratio (Weyl sequence). With an odd count the middle comes last.
    """
    with np.errstate(over="ignore"):
        multiples = np.arange(count // 2, dtype=np.uint64) * _GOLDEN
    places = np.empty(count, np.int64)
    places[0 : count // 2 * 2 : 2][np.argsort(multiples, kind="stable")] = np.arange(count // 2)
    places[1::2] = count - 1 - places[0 : count // 2 * 2 : 2]
    if count % 2:
        places[-1] = count // 2
    places.flags.writeable = False
    return places
