"""Square root: p = max(t^0.5, 1e-3), many masks."""

from __future__ import annotations

from typing import ClassVar

from bd3_megatron.diffusion.schedules._power import Power


class SquareRoot(Power):
    """Masks a fraction ``t^0.5``."""

    exponent: ClassVar[float] = 0.5
