"""Logarithmic: p = log2(1 + t), w = 1 / (p ln 2 (1 + t))."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from bd3_megatron.diffusion.schedules import Schedule

if TYPE_CHECKING:
    from bd3_megatron.diffusion.schedules import Levels


class Log(Schedule):
    """Masks a fraction ``log2(1 + t)``."""

    def mask_probability(self, t: Levels) -> Levels:
        return np.log2(1 + t)

    def loss_weight(self, t: Levels) -> Levels:
        return 1 / (self.mask_probability(t) * math.log(2) * (1 + t))
