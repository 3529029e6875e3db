"""Transformer Engine: availability on this machine, and Megatron-core's wrappers of its modules.

Megatron-core 0.16.1 and 0.19 name them ``TELayerNormColumnParallelLinear``, ``TERowParallelLinear`` and ``TENorm``,
with the same arguments.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch

from bd3_common.errors import ConfigError
from bd3_megatron.config import Fp8Config, KernelConfig

_HOPPER = (9, 0)
_BLOCK_CUDA = (12, 9)


class Modules(NamedTuple):
    """``column``: norm and column-parallel linear in one; ``row``: row-parallel linear; ``norm``: a norm alone."""

    column: type
    row: type
    norm: type


def modules() -> Modules:
    """Megatron's wrappers, which add tensor parallelism."""
    from megatron.core.extensions import transformer_engine as te

    return Modules(te.TELayerNormColumnParallelLinear, te.TERowParallelLinear, te.TENorm)


def missing() -> str | None:
    """Reason why Transformer Engine does not run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    if find_spec("transformer_engine") is None:
        return "not installed: pip install 'bd3-megatron[gpu]'"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a library that it was built against is absent or of another version
        return f"does not load: {' '.join(str(error).split())}"
    return None


def chosen(kernels: KernelConfig) -> bool:
    """True if the layers are Transformer Engine's."""
    return kernels.layers == "te" or (kernels.layers == "auto" and missing() is None)


def check(kernels: KernelConfig, fp8: Fp8Config) -> None:
    """Check that this machine can run the configured layers and FP8 recipe.

    Raises:
        ConfigError: Transformer Engine is absent, or the GPU or CUDA too old for FP8.
    """
    absent = missing()
    if kernels.layers == "te" and absent:
        raise ConfigError(f"kernels.layers=te: needs Transformer Engine ({absent}); use local or auto")
    if not fp8.enabled:
        return
    if absent:
        raise ConfigError(f"fp8.enabled=true: needs Transformer Engine ({absent}); use fp8.enabled=false")
    found = torch.cuda.get_device_capability()
    if found < _HOPPER:
        raise ConfigError(
            f"fp8.enabled=true: {torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}, below "
            f"9.0 (Hopper); use fp8.enabled=false"
        )
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if fp8.recipe == "block" and cuda < _BLOCK_CUDA:
        raise ConfigError(
            f"fp8.recipe=block: needs CUDA 12.9 or later, torch was built for {torch.version.cuda}; use current"
        )
