"""Training engines behind one small interface."""

from __future__ import annotations

from bd3_megatron.config import EngineConfig
from bd3_megatron.engine.base import Engine
from bd3_megatron.layers import transformer_engine as te
from bd3_megatron.parallel import World


def check_installed(config: EngineConfig) -> None:
    """Check that the packages and devices that the engine needs are here.

    Raises:
        ConfigError: DeepSpeed or Transformer Engine is not installed, what offloading needs is not built, or the GPU
            has no FP8.
    """
    te.check(config.kernels, config.fp8)
    zero = config.zero
    if zero.stage > 0:
        from bd3_megatron.engine import ops

        ops.import_deepspeed(f"zero.stage={zero.stage}")
        if zero.offload:
            ops.load()


def build_engine(config: EngineConfig, world: World, seed: int = 0) -> Engine:
    """Build the engine of a configuration: DeepSpeed's if ``zero.stage`` is above 0, else Megatron's.

    Raises:
        ConfigError: as :func:`check_installed`.
    """
    if config.zero.stage > 0:
        from bd3_megatron.engine.zero import ZeroEngine

        return ZeroEngine(config, world, seed)
    from bd3_megatron.engine.megatron import MegatronEngine

    return MegatronEngine(config, world, seed)
