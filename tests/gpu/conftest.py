"""Tests that need a GPU. Without one they are skipped and say so."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
