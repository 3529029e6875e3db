"""Masking by counts: how many tokens of a block are masked is drawn, instead of a noise level.

Given the number k of masked tokens of a block, the mask is uniform among the subsets of that size, whatever the noise
level was; and the model does not see the level. Integrated over levels in (0, 1], the log-linear objective of a block
of n tokens is ``mean over k = 1..n of (n / k) E[nll summed over the masked tokens | k]``. So k uniform on 1..n, a
uniform subset of k tokens and the weight n / k estimate the same bound (arXiv 2503.09573, eq. 8) without the variance
that the drawn level has given k. Order-agnostic autoregressive diffusion (arXiv 2110.02037) draws a position in a
random order, which is the same law; LLaDA (arXiv 2502.09992, eq. 6) evaluates whole sequences with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bd3_megatron.config import DiffusionConfig

Floats = NDArray[np.float64]


class CountLaw:
    """Law of the count of a block's masked tokens, and its loss weights.

    Position 0 (BOS) is never masked, so the first block has n = B' - 1 maskable tokens and all others B'. A block
    without maskable tokens (B' = 1) has no loss. Pairs of draws (``coupling``):

    - ``antithetic``: counts k and n + 1 - k, each with weight n / k, and subsets that are independent;
    - ``complementary``: k uniform on 0..n and the n - k tokens that the first leaves, weight ``(n + 1) / k``.

    With ``count_probabilities`` or ``count_weights`` k is drawn from 0..B' in every block and the subset from all B'
    positions; then BOS, if it is in the subset, is unmasked. This is the law of any interval of levels, whose bits are
    drawn for BOS too (:func:`bd3_megatron.diffusion.clips.count_law`).

    Args:
        blocks: L / B'.
    """

    def __init__(self, diffusion: DiffusionConfig, blocks: int):
        size = diffusion.block_size
        self.size, self.blocks, self.coupling = size, blocks, diffusion.coupling
        self.maskable = np.full(blocks, size)
        self.given = diffusion.count_probabilities is not None or diffusion.count_weights is not None
        if self.given:
            probabilities, self.weights = given_law(size, diffusion.count_probabilities, diffusion.count_weights)
            self.cumulative = np.cumsum(probabilities)
        else:
            self.maskable[0] -= 1

    def counts(self, u: Floats) -> NDArray[np.int64]:
        """Counts ``[D, L / B']`` from mirrored uniforms ``[D, L / B']`` (u, and 1 - u of a pair)."""
        n = self.maskable
        if self.given:
            found = np.searchsorted(self.cumulative, u * self.cumulative[-1], side="right")
            return np.asarray(np.minimum(found, np.flatnonzero(np.diff(self.cumulative, prepend=0.0))[-1]))
        if self.coupling == "complementary":
            first = np.minimum((u[0] * (n + 1)).astype(np.int64), n)
            return np.stack([first, n - first])
        first = np.minimum((u[0] * n).astype(np.int64) + 1, n)
        return np.stack([first, np.where(n > 0, n + 1 - first, 0)][: len(u)])

    def loss_weights(self, counts: NDArray[np.int64]) -> Floats:
        """Weight of each masked token's nll, ``[D, L / B']``; 0 where nothing is masked."""
        if self.given:
            return self.weights[counts]
        total = self.maskable + (self.coupling == "complementary")
        return np.where(counts > 0, total / np.maximum(counts, 1), 0.0)

    def draw(self, u: Floats, streams: Sequence[Callable[[int], Floats]]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Masked fractions ``[D, L / B']``, weights ``[D, L / B']`` and masks ``[D, L]`` of D coupled draws of a row.

        Args:
            u: mirrored uniforms ``[D, L / B']``.
            streams: further uniforms of the sample, one stream for each draw.
        """
        counts = self.counts(u)
        if self.coupling == "complementary":
            ranks = self._ranks(streams[0])
            first = ranks < counts[0][:, None]
            masked = np.stack([first, ~first & (ranks < self.maskable[:, None])])
        else:
            masked = np.stack([self._ranks(stream) < k[:, None] for k, stream in zip(counts, streams)])
        fractions = counts / np.maximum(self.maskable, 1)
        return fractions, self.loss_weights(counts), masked.reshape(len(u), -1)

    def _ranks(self, stream: Callable[[int], Floats]) -> NDArray[np.int64]:
        """Random order of the tokens of each block, ``[L / B', B']``, tokens that are never masked last."""
        r = stream(self.blocks * self.size).reshape(self.blocks, self.size)
        if not self.given:
            r[0, 0] = 2.0
        return np.argsort(np.argsort(r, axis=1, kind="stable"), axis=1, kind="stable")


def given_law(
    size: int, probabilities: Sequence[float] | None, weights: Sequence[float] | None
) -> tuple[Floats, Floats]:
    """Probabilities and weights of the counts 0..B', each ``[B' + 1]``.

    Without ``probabilities`` the counts 1..B' have the same. Without ``weights`` they are ``1 / (k q(k))``, which
    makes the loss an estimate of the bound, whatever the probabilities q are.
    """
    k = np.arange(size + 1)
    q = np.where(k > 0, 1 / size, 0.0) if probabilities is None else np.asarray(probabilities, np.float64)
    if weights is not None:
        return q, np.asarray(weights, np.float64)
    return q, np.divide(1.0, k * q, out=np.zeros(size + 1), where=k * q > 0)
