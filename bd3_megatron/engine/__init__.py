"""Training engines behind one small interface."""

from __future__ import annotations

from bd3_megatron.config import (
    DiffusionConfig,
    Fp8Config,
    KernelConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
    ZeroConfig,
)
from bd3_megatron.engine.base import Engine
from bd3_megatron.layers import transformer_engine as te
from bd3_megatron.parallel import World


def check_installed(zero: ZeroConfig, kernels: KernelConfig | None = None, fp8: Fp8Config | None = None) -> None:
    """Check that this machine has what the engine needs.

    Raises:
        ConfigError: DeepSpeed or Transformer Engine is not installed, what offloading needs is not built, or the GPU
            has no FP8.
    """
    te.check(kernels or KernelConfig(), fp8 or Fp8Config())
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
    fp8: Fp8Config | None = None,
) -> Engine:
    """The engine that a configuration asks for: DeepSpeed's where ``zero.stage`` is set, else Megatron's.

    Raises:
        ConfigError: as :func:`check_installed`.
    """
    if zero.stage > 0:
        from bd3_megatron.engine.zero import ZeroEngine

        return ZeroEngine(model, diffusion, kernels, parallel, zero, optimization, world, seed, fp8=fp8)
    from bd3_megatron.engine.megatron import MegatronEngine

    return MegatronEngine(model, diffusion, kernels, parallel, optimization, world, seed, fp8=fp8)
