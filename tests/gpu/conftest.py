"""Everything here needs a CUDA device, and is skipped with that reason where there is none."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def device() -> torch.device:
    """The CUDA device, with fp32 products that are fp32 and a seed of its own."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none")
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    return torch.device("cuda", torch.cuda.current_device())
