"""Noise schedules: mask probability ``p(t)`` and loss weight ``w(t)`` (arXiv 2503.09573, section 5 and appendix).

``w = p'(t) / p(t)``, so that ``E_t[w * nll at masked positions]`` bounds the negative log-likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Levels = NDArray[np.float64]

# p is kept away from zero where the power law would divide by it, and the cosine stops short of p = 0.
_FLOOR = 1e-3
_COSINE = 1 - 1e-3


def _loglinear(t: Levels) -> tuple[Levels, Levels]:
    return t, 1 / t


def _power(exponent: float) -> Callable[[Levels], tuple[Levels, Levels]]:
    def schedule(t: Levels) -> tuple[Levels, Levels]:
        p = np.maximum(t**exponent, _FLOOR)
        return p, exponent * t ** (exponent - 1) / p

    return schedule


def _log(t: Levels) -> tuple[Levels, Levels]:
    p = np.log2(1 + t)
    return p, 1 / (p * math.log(2) * (1 + t))


def _cosine(t: Levels) -> tuple[Levels, Levels]:
    angle = math.pi / 2 * t
    p = 1 - _COSINE * np.cos(angle)
    return p, _COSINE * math.pi / 2 * np.sin(angle) / (p + _FLOOR)


SCHEDULES: dict[str, Callable[[Levels], tuple[Levels, Levels]]] = {
    "loglinear": _loglinear,
    "square": _power(2.0),
    "square_root": _power(0.5),
    "log": _log,
    "cosine": _cosine,
}


def mask_probability_and_weight(schedule: str, t: Levels) -> tuple[Levels, Levels]:
    """Mask probability and loss weight at noise levels ``t`` in (0, 1], elementwise in float64.

    Raises:
        KeyError: unknown schedule name.
    """
    return SCHEDULES[schedule](np.asarray(t, dtype=np.float64))


def mean_mask_probability(schedule: str, beta: float, omega: float) -> float:
    """Expected fraction of masked tokens for ``t ~ U[beta, omega]``."""
    return float(mask_probability_and_weight(schedule, np.linspace(beta, omega, 1001))[0].mean())
