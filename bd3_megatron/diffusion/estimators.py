"""Estimators of the likelihood bound: the noise of every pass over the evaluated rows, by name."""

from __future__ import annotations

import math

import numpy as np

from bd3_common.errors import ConfigError
from bd3_megatron.config import LOWEST_LEVEL, WHOLE_INTERVAL, DiffusionConfig
from bd3_megatron.diffusion.noise import Noise, Purpose, SampleKeys, draw_noise

MOST_PASSES = 4095
"""passes over the rows that ``exact`` may take: blocks of 12 tokens"""


class LikelihoodEstimator:
    """The bound on the negative log-likelihood of rows, by passes that are averaged or (``exact``) summed.

    - ``counts``: how many tokens of each block are masked is drawn (:class:`bd3_megatron.diffusion.counts.CountLaw`);
    - ``levels``: a noise level is drawn for each block on the whole interval, log-linear schedule;
    - ``exact``: every subset of a block's tokens is masked once, in ``2^B' - 1`` passes.

    All three have the same expectation, up to the levels below 1e-3 that ``levels`` leaves out. With blocks of one
    token all are masked, and each gives the exact value. The causal objective has no noise.

    Args:
        diffusion: objective of the engine; of it count the block size and K, the draws in one pass.
        name: ``counts``, ``levels`` or ``exact``.
        draws: passes of ``counts`` and ``levels``.

    Raises:
        ConfigError: ``exact`` with blocks that would take more than :data:`MOST_PASSES`.
    """

    def __init__(self, diffusion: DiffusionConfig, name: str = "counts", draws: int = 1):
        self.name, self.size = name, diffusion.block_size
        self.objective = likelihood_objective(diffusion, name)
        causal = diffusion.objective == "causal"
        if name == "exact" and not causal and self.size > int(math.log2(MOST_PASSES + 1)):
            raise ConfigError(
                f"estimator=exact: blocks of {self.size} tokens have 2^{self.size} - 1 masks; use counts, or a block "
                f"size of {int(math.log2(MOST_PASSES + 1))} or less"
            )
        self.passes = 1 if causal else 2**self.size - 1 if name == "exact" else draws
        self.share = 1.0 if name == "exact" else 1 / self.passes
        """factor of the nats of one pass in the sum over passes"""

    def noise(self, length: int, seed: int, keys: SampleKeys, number: int) -> Noise:
        """Noise of pass ``number``, from 0; ``keys`` have it as their epoch and batch."""
        if self.name == "exact":
            return _subset(self.size, length, len(keys.rows), self.objective.draws, number + 1)
        return draw_noise(self.objective, length, seed, keys, Purpose.EVALUATE)


def likelihood_objective(diffusion: DiffusionConfig, name: str = "counts") -> DiffusionConfig:
    """Objective of an estimator: its draws are an unbiased estimate of the bound, whatever training draws.

    The bound does not depend on the schedule, but on a clipped interval it is none. With blocks of one token all are
    masked (t = 1): the expectation is the same, and the value exact.
    """
    full = {**WHOLE_INTERVAL, "stratify": True}
    given = {"count_probabilities": None, "count_weights": None}
    if name == "levels":
        full |= {"masking": "levels", "beta": 1.0 if diffusion.block_size == 1 else LOWEST_LEVEL}
    elif diffusion.objective == "diffusion":
        full |= {"masking": "counts", "noise_version": 2, "coupling": "independent"}
    return DiffusionConfig(**diffusion.model_dump() | full | given)


def _subset(size: int, length: int, rows: int, draws: int, pattern: int) -> Noise:
    """Every block of every row masked where ``pattern`` has a bit, in all draws of a pass alike.

    A subset of k of n tokens has the weight ``1 / (k C(n, k))`` in the bound. In the first block, whose first token is
    never masked, the patterns without that token are the subsets; the others count for nothing.
    """
    bits = (pattern >> np.arange(size)) & 1 == 1
    k = int(bits.sum())
    masked = np.tile(bits, (draws, rows, length // size))
    weight = np.full((draws, rows, length), 1 / (k * math.comb(size, k)))
    first = slice(0, size)
    if bits[0]:
        masked[..., first] = False
    else:
        weight[..., first] = 1 / (k * math.comb(size - 1, k))
    levels = np.full((draws, rows, length // size), k / size)
    return Noise(levels, masked, np.where(masked, weight, 0).astype(np.float32))
