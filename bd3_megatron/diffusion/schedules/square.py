"""Square: p = max(t^2, 1e-3), few masks."""

from __future__ import annotations

from typing import ClassVar

from bd3_megatron.diffusion.schedules._power import Power


class Square(Power):
    """Masks a fraction ``t^2``."""

    exponent: ClassVar[float] = 2.0
