"""Clip intervals of noise levels: their law of counts, and the variance of the loss by interval from counts alone.

Given the number k of masked tokens of a block the mask is uniform among the subsets of that size, so every interval
shares the same moments of the block's nll given k. What differs is a one-dimensional integral over levels:

    P_I(k | t)  probability of k masked tokens at level t, with the draws that resampling rejects left out
    a_I(k) = mean over t in I of w(t) P_I(k | t)          b_I(k) = mean over t in I of w(t)^2 P_I(k | t)
    Var_I  = sum_k b_I(k) E[S^2 | k] / B'^2 - (sum_k a_I(k) E[S | k] / B')^2

S is the nll summed over the masked tokens of a block. One set of draws by counts so gives the variance of every
interval (data-driven clipping, arXiv 2503.09573, section 5.3), without the heavy tail of ``1 / t^2``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bd3_megatron.config import LOWEST_LEVEL, WHOLE_INTERVAL, DiffusionConfig
from bd3_megatron.diffusion.schedules import SCHEDULES
from bd3_megatron.diffusion.strata import Strata

Floats = NDArray[np.float64]
Interval = tuple[float, float]

JACKKNIFE = 8
"""groups of rows that standard errors are computed from"""
_PANELS, _NODES = 15, 60  # of the quadrature over levels


def default_grid(block_size: int) -> tuple[Interval, ...]:
    """Intervals that are searched: the whole one, and widths .5 to .9 at offsets of .05, 36 in all.

    Blocks of one token have two: all levels, and every token masked.
    """
    if block_size == 1:
        return ((LOWEST_LEVEL, 1.0), (1.0, 1.0))
    found = [(LOWEST_LEVEL, 1.0)]
    for width in (50, 60, 70, 80, 90):
        for low in range(0, 100 - width + 1, 5):
            found.append((low / 100 if low else LOWEST_LEVEL, (low + width) / 100))
    return tuple(found)


@dataclass(frozen=True)
class CountsOfLevels:
    """Law of the count of a block's masked tokens under an interval of levels, BOS counted as another token.

    Attributes:
        probability: q(k), ``[B' + 1]``.
        first: a(k), ``[B' + 1]``: expectation of the weight where k tokens are masked.
        second: b(k), ``[B' + 1]``: expectation of its square.
    """

    probability: Floats
    first: Floats
    second: Floats

    @property
    def weights(self) -> Floats:
        """Mean weight given k, ``a(k) / q(k)``: with q, the law of counts that has the same expected loss."""
        q = self.probability
        return np.divide(self.first, q, out=np.zeros_like(q), where=q > 0)


def count_law(diffusion: DiffusionConfig) -> CountsOfLevels:
    """Law of counts of the objective's schedule on its interval, with resampling if it resamples."""
    return _law(
        diffusion.schedule,
        diffusion.beta,
        diffusion.omega,
        diffusion.block_size,
        diffusion.resample and not diffusion.full_interval,
        diffusion.noise_version,
    )


@functools.lru_cache(maxsize=256)
def _law(schedule: str, beta: float, omega: float, size: int, resample: bool, version: int) -> CountsOfLevels:
    t, share = _quadrature(beta, omega)
    p, w = SCHEDULES.instance(schedule).mask_probability(t), SCHEDULES.instance(schedule).loss_weight(t)
    k = np.arange(size + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log(size + 1 - k[1:]) - np.log(k[1:]))])
    p = np.clip(p, 0.0, 1.0)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = log_choose + np.where(k > 0, k * np.log(p), 0.0) + np.where(size - k > 0, (size - k) * np.log1p(-p), 0.0)
    given_t = np.exp(logs)  # [nodes, B' + 1]
    if resample:
        given_t = given_t * accepted(size, beta, omega, version)
        given_t /= given_t.sum(1, keepdims=True)
    return CountsOfLevels(*(np.asarray((share * w**power) @ given_t) for power in range(3)))


def accepted(size: int, beta: float, omega: float, version: int = 2) -> NDArray[np.bool_]:
    """Counts 0..B' that resampling keeps: masked fractions inside the interval, ``[B' + 1]``.

    An end of the whole interval excludes nothing (version 2): a block without a mask, or all masks, is one of its
    draws. Version 1 redrew blocks without a mask there, too.
    """
    if version > 1:
        beta, omega = (0.0 if beta <= LOWEST_LEVEL else beta), (1.0 if omega >= 1 else omega)
    fraction = np.arange(size + 1) / size
    return np.asarray((fraction >= beta - 1e-9) & (fraction <= omega + 1e-9))


def _quadrature(beta: float, omega: float) -> tuple[Floats, Floats]:
    """Levels and their shares of ``U[beta, omega]``: Gauss-Legendre on panels whose edges are geometric in t."""
    if beta == omega:
        return np.array([beta]), np.array([1.0])
    edges = np.geomspace(beta, omega, _PANELS + 1)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    low, high = edges[:-1, None], edges[1:, None]
    t = (low + high) / 2 + (high - low) / 2 * nodes
    share = (high - low) / 2 * weights / (omega - beta)
    return t.ravel(), share.ravel()


def search_objective(diffusion: DiffusionConfig) -> DiffusionConfig:
    """The draws that :class:`CountMoments` are made from: k uniform on 1..B' in every block, BOS as another token."""
    size = diffusion.block_size
    given = {
        **WHOLE_INTERVAL,
        "masking": "counts",
        "stratify": True,
        "noise_version": 2,
        "draws": 1,
        "coupling": "independent",
        "count_probabilities": (0.0, *[1 / size] * size),
        "count_weights": (0.0, *[1.0] * size),
    }
    return DiffusionConfig(**diffusion.model_dump() | given)


def jackknife_groups(strata: Strata, slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Group of each row for standard errors, ``[b]``: rows dealt in the order of their strata, to and fro.

    So the draws of every group, and of all groups but one, are spread evenly over the unit interval, as those of the
    whole are. Groups of other rows would have levels or counts of their own, and the error would be theirs.

    Args:
        strata: of one draw per row.
        slots: indices of the rows in the global batch, ``[b]``.
    """
    turn = np.array([strata.place(int(slot)) for slot in slots], np.int64) % (2 * JACKKNIFE)
    return np.minimum(turn, 2 * JACKKNIFE - 1 - turn)


class CountMoments:
    """Sums of S and S^2 over blocks by drawn count k, in groups of rows: all that the search has to know.

    They are sums over rows, so they do not depend on how rows are spread over ranks.

    Args:
        size: B'.
        sums: ``[3, groups, B' + 1]``: numbers of blocks, sums of S, sums of S^2; None: zeros.
    """

    def __init__(self, size: int, sums: Floats | None = None):
        self.size = size
        self.sums = np.zeros((3, JACKKNIFE, size + 1)) if sums is None else sums

    def add(self, groups: NDArray[np.int64], counts: NDArray[np.int64], nll: Floats) -> None:
        """Add rows: their groups (:func:`jackknife_groups`) ``[b]``, and of their blocks the drawn counts
        ``[b, L / B']`` and the nll ``[b, L / B']``."""
        at = (np.repeat(groups, counts.shape[1]), counts.ravel())
        for power in range(3):
            np.add.at(self.sums[power], at, nll.ravel() ** power)

    def variances(self, laws: Sequence[CountsOfLevels]) -> tuple[Floats, Floats, Floats]:
        """Of each interval: mean loss ``[n]``, variance of the block loss ``[n]``, its leave-one-out values
        ``[groups, n]``."""
        whole, parts = self.sums.sum(1), [self.sums.sum(1) - self.sums[:, group] for group in range(JACKKNIFE)]
        # Of one form for all, or the error would be that between the forms.
        by_count = min(part[0, 1:].min() for part in parts) >= JACKKNIFE - 1
        mean, variance = self._mean_and_variance(whole, laws, by_count)
        return mean, variance, np.array([self._mean_and_variance(part, laws, by_count)[1] for part in parts])

    def _mean_and_variance(self, sums: Floats, laws: Sequence[CountsOfLevels], by_count: bool) -> tuple[Floats, Floats]:
        number, first, second = sums
        if by_count:
            n = np.maximum(number, 1)
            m1, m2 = first / n / self.size, second / n / self.size**2
        else:  # few blocks for many counts: every draw with its weight 1 / q(k)
            total = number.sum() / self.size
            m1, m2 = first / total / self.size, second / total / self.size**2
        mean = np.array([law.first @ m1 for law in laws])
        return mean, np.array([law.second @ m2 for law in laws]) - mean**2


class DirectMoments:
    """Sums of the block loss and of its square, drawn once for every interval: for checking :class:`CountMoments`.

    Args:
        size: B'.
        intervals: n.
    """

    def __init__(self, size: int, intervals: int):
        self.size = size
        self.sums = np.zeros((3, JACKKNIFE, intervals))

    def add(self, interval: int, groups: NDArray[np.int64], nats: Floats) -> None:
        """Add rows: their groups ``[b]``, and the weighted nll of each block, ``[b, L / B']``, drawn under the interval
        of this number."""
        of_blocks = np.repeat(groups, nats.shape[1])
        for power in range(3):
            np.add.at(self.sums[power, :, interval], of_blocks, (nats.ravel() / self.size) ** power)

    def variances(self, laws: Sequence[CountsOfLevels]) -> tuple[Floats, Floats, Floats]:
        """As :meth:`CountMoments.variances`, for the intervals in their order."""
        whole = self._mean_and_variance(self.sums.sum(1))
        left = [self._mean_and_variance(self.sums.sum(1) - self.sums[:, group])[1] for group in range(JACKKNIFE)]
        return whole[0], whole[1], np.array(left)

    @staticmethod
    def _mean_and_variance(sums: Floats) -> tuple[Floats, Floats]:
        number, first, second = sums
        mean = first / number
        return mean, second / number - mean**2


@dataclass(frozen=True)
class ClipChoice:
    """Outcome of a search.

    Attributes:
        interval: to train on from now on.
        best: number of the interval of least variance in the grid.
        means, variances: of each interval, nats and nats^2 per token.
        differences, errors: of each interval's variance to that of the present interval, and its standard error.
    """

    interval: Interval
    best: int
    means: Floats
    variances: Floats
    differences: Floats
    errors: Floats


def choose(
    moments: CountMoments | DirectMoments,
    diffusion: DiffusionConfig,
    grid: Sequence[Interval],
    significance: float = 2.0,
) -> ClipChoice:
    """The interval of least variance, if it is better than the present one by so many standard errors.

    Without that, the interval would wander at every search among those that are about the same.

    Args:
        diffusion: with the present interval.
    """
    now = (diffusion.beta, diffusion.omega)
    laws = [count_law(diffusion.model_copy(update={"beta": b, "omega": o})) for b, o in (*grid, now)]
    means, variances, left = moments.variances(laws)
    differences = variances[:-1] - variances[-1]
    spread = left[:, :-1] - left[:, -1:]
    errors = np.sqrt((JACKKNIFE - 1) * spread.var(axis=0))
    best = int(np.argmin(np.where(np.isfinite(variances[:-1]), variances[:-1], np.inf)))
    better = differences[best] < -significance * errors[best]
    return ClipChoice(grid[best] if better else now, best, means[:-1], variances[:-1], differences, errors)
