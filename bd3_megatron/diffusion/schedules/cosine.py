"""Cosine: p = 1 - 0.999 cos(pi t / 2), w = 0.999 (pi / 2) sin(pi t / 2) / (p + 1e-3)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from bd3_megatron.diffusion.schedules import Schedule

if TYPE_CHECKING:
    from bd3_megatron.diffusion.schedules import Levels

# The cosine stops short of p = 0, and the weight's denominator stays away from it.
_SCALE, _FLOOR = 1 - 1e-3, 1e-3


class Cosine(Schedule):
    """Masks a fraction ``1 - 0.999 cos(pi t / 2)``."""

    def mask_probability(self, t: Levels) -> Levels:
        return 1 - _SCALE * np.cos(math.pi / 2 * t)

    def loss_weight(self, t: Levels) -> Levels:
        return _SCALE * math.pi / 2 * np.sin(math.pi / 2 * t) / (self.mask_probability(t) + _FLOOR)
