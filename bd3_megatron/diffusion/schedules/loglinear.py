"""Log-linear: p = t, w = 1 / t."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bd3_megatron.diffusion.schedules import Schedule

if TYPE_CHECKING:
    from bd3_megatron.diffusion.schedules import Levels


class LogLinear(Schedule):
    """Masks a fraction ``t``; named after its noise level ``-log(1 - t)``."""

    linear: ClassVar[bool] = True

    def mask_probability(self, t: Levels) -> Levels:
        return t

    def loss_weight(self, t: Levels) -> Levels:
        return 1 / t
