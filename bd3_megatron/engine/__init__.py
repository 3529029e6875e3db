"""Training engines behind one small interface."""

from __future__ import annotations

from bd3_megatron.config import (
    DiffusionConfig,
    KernelConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
    ZeroConfig,
)
from bd3_megatron.engine.base import Engine
from bd3_megatron.parallel import World


def check_installed(zero: ZeroConfig) -> None:
    """Check that this machine has what the engine needs.

    Raises:
        ConfigError: DeepSpeed is not installed, or what offloading needs is not built.
    """
    if zero.stage > 0:
        from bd3_megatron.engine import ops

        ops.import_deepspeed(f"zero.stage={zero.stage}")
        if zero.offload:
            ops.load()


def build_engine(
    model: ModelConfig,
    diffusion: DiffusionConfig,
    kernels: KernelConfig,
    parallel: ParallelConfig,
    zero: ZeroConfig,
    optimization: OptimizationConfig,
    world: World,
    seed: int = 0,
) -> Engine:
    """The engine that a configuration asks for: DeepSpeed's where ``zero.stage`` is set, else Megatron's.

    Raises:
        ConfigError: as :func:`check_installed`.
    """
    if zero.stage > 0:
        from bd3_megatron.engine.zero import ZeroEngine

        return ZeroEngine(model, diffusion, kernels, parallel, zero, optimization, world, seed)
    from bd3_megatron.engine.megatron import MegatronEngine

    return MegatronEngine(model, diffusion, kernels, parallel, optimization, world, seed)
