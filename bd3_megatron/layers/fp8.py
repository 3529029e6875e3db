"""Checks of FP8 against the other sections, without torch.

Transformer Engine multiplies FP8 matrices whose rows begin at multiples of 16 bytes; block scaling needs tiles of 128.
The weight gradient is a product over tokens, so both the widths of a layer and its number of tokens must be multiples.
"""

from __future__ import annotations

from bd3_common.errors import ConfigError
from bd3_megatron.config import EngineConfig, Fp8Config, ModelConfig, ParallelConfig


def check_fp8(config: EngineConfig) -> None:
    """Check FP8 against the other sections; :mod:`.transformer_engine` checks the machine.

    Raises:
        ConfigError: one line with the key, its value and what to use instead.
    """
    fp8, model, parallel, optimization = config.fp8, config.model, config.parallel, config.optimization
    if not fp8.enabled:
        return
    if config.kernels.layers == "local":
        raise ConfigError("fp8.enabled=true: kernels.layers=local has no FP8; use kernels.layers=te or auto")
    if optimization.precision != "bf16":
        raise ConfigError(
            f"fp8.enabled=true: weights of train.precision={optimization.precision}; use train.precision=bf16"
        )
    if config.zero.stage == 3:
        raise ConfigError(
            "fp8.enabled=true: with zero.stage=3 every rank would keep whole weights in FP8; use zero.stage=1 or 2"
        )
    _check_bf16_layers(fp8, model, parallel)
    _check_widths(fp8, model, parallel)
    _check_length(config)


def _check_bf16_layers(fp8: Fp8Config, model: ModelConfig, parallel: ParallelConfig) -> None:
    kept = fp8.first_last_bf16
    if kept and fp8.recipe == "delayed":
        raise ConfigError(
            f"fp8.first_last_bf16={kept}: delayed scales are updated for all layers at once; "
            f"use 0, or fp8.recipe=current or block"
        )
    most = min((model.layers - 1) // 2, model.layers // parallel.pipeline)
    if kept > most:
        raise ConfigError(
            f"fp8.first_last_bf16={kept}: too many for model.layers={model.layers} "
            f"(parallel.pipeline={parallel.pipeline}); use {most} or less"
        )


def _check_widths(fp8: Fp8Config, model: ModelConfig, parallel: ParallelConfig) -> None:
    size, tensor, width = fp8.multiple, parallel.tensor, model.width_per_head
    widths = [
        (f"model.hidden={model.hidden}", model.hidden, 1),
        (f"model.heads={model.heads} of {width}", model.heads * width, tensor),
        (f"model.kv_heads={model.groups} of {width}", (model.heads + 2 * model.groups) * width, tensor),
        (f"model.ffn_hidden={model.ffn}", model.ffn, tensor),
    ]
    for name, value, ranks in widths:
        if value % (ranks * size):
            shared = f" on each of parallel.tensor={tensor} ranks" if ranks > 1 else ""
            raise ConfigError(
                f"fp8.enabled=true: {name} makes {value // ranks} rows or columns{shared}, not a multiple of {size} "
                f"(fp8.recipe={fp8.recipe}); change it, or use fp8.enabled=false"
            )


def _check_length(config: EngineConfig) -> None:
    """If the positions of a row on a rank are a multiple, so are those of all streams, whatever the micro-batch."""
    fp8, model, parallel = config.fp8, config.model, config.parallel
    needed = config.token_multiple * parallel.context
    if model.length % needed:
        raise ConfigError(
            f"fp8.enabled=true: model.length={model.length} is not a multiple of {needed} "
            f"(fp8.recipe={fp8.recipe}, parallel.context={parallel.context}"
            f"{f', parallel.tensor={parallel.tensor} with parallel.sequence' if parallel.sequence else ''}); "
            f"use {max(1, model.length // needed) * needed}"
        )
