"""Rotary frequencies of models whose rows became longer than those of their first training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bd3_megatron.config import RopeScaling


def scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies ``[d / 2]``, radians per position, after scaling.

    ``linear`` divides all by the factor (arXiv 2306.15595). ``llama3`` (arXiv 2407.21783, the released models'
    configuration) does so below ``low`` turns over the first training's rows, keeps those above ``high`` turns, and
    interpolates between.
    """
    if scaling.kind == "none":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_length * frequencies / (2 * math.pi)
    kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return torch.lerp(frequencies / scaling.factor, frequencies, kept)
