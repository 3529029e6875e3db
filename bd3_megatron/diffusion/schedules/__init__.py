"""Noise schedules: mask probability ``p(t)`` and loss weight ``w(t)`` (arXiv 2503.09573, section 5 and appendix).

Each module of this folder is one schedule. With ``w = p' / p`` the weighted nll of masked tokens bounds the negative
log-likelihood of the row: ``E_t[w(t) sum over masked positions of nll]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from bd3_common.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Levels = NDArray[np.float64]


class Schedule(ABC):
    """A noise schedule. Both methods are elementwise, in float64, for noise levels ``t`` in (0, 1] of any shape."""

    linear: ClassVar[bool] = False
    """True if ``p(t) = t``: then ``p`` of mirrored levels ``t`` and ``1 - t`` adds up to 1"""

    @abstractmethod
    def mask_probability(self, t: Levels) -> Levels:
        """``p(t)`` in (0, 1], rising: the probability that a token is masked at level ``t``."""

    @abstractmethod
    def loss_weight(self, t: Levels) -> Levels:
        """``w(t) = p'(t) / p(t)``: the weight of a masked token's nll at level ``t``."""

    def mean_mask_probability(self, beta: float, omega: float) -> float:
        """Expected fraction of masked tokens for ``t ~ U[beta, omega]``."""
        import numpy as np

        return float(self.mask_probability(np.linspace(beta, omega, 1001)).mean())


SCHEDULES = Registry(Schedule, "noise schedule", "diffusion.schedule", "bd3_megatron.schedules")
