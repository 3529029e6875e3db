"""Power laws: the base class of the schedules ``p = max(t^e, 1e-3)``, ``w = e t^(e-1) / p``."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bd3_megatron.diffusion.schedules import Schedule

if TYPE_CHECKING:
    from bd3_megatron.diffusion.schedules import Levels

# The weight divides by p, which would vanish at small levels.
_FLOOR = 1e-3


class Power(Schedule):
    """A schedule that masks a fraction ``t^exponent``."""

    exponent: ClassVar[float]

    def mask_probability(self, t: Levels) -> Levels:
        return np.maximum(t**self.exponent, _FLOOR)

    def loss_weight(self, t: Levels) -> Levels:
        return self.exponent * t ** (self.exponent - 1) / self.mask_probability(t)
