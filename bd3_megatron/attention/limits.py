"""What the attention backends cannot do, as far as a configuration says it: importable without torch."""

from __future__ import annotations

from dataclasses import dataclass

from bd3_megatron.config import ConfigError, DiffusionConfig, KernelConfig, ModelConfig, ParallelConfig

# From the fastest to the plainest; ``auto`` never takes the last one, whose cost is quadratic in the streams.
NAMES = ("flash", "flex", "chunked", "reference")

# Positions in a tile of the block-sparse kernels, and the widths of a head that FlashAttention's were checked with.
TILE = 128
FLASH_WIDTHS = (64, 128)


@dataclass(frozen=True)
class Demand:
    """What is asked of a backend.

    Attributes:
        precision: of queries, keys and values: fp32, bf16 or fp16.
        head_dim: width of a head.
        piece: neighbouring positions of a row that a rank holds: L, or a chunk of it with context parallelism.
        clean: positions of the clean stream.
    """

    precision: str
    head_dim: int
    piece: int
    clean: int = 0

    @classmethod
    def of(cls, model: ModelConfig, diffusion: DiffusionConfig, parallel: ParallelConfig, precision: str) -> Demand:
        """What a run asks for, before its model is built."""
        length = model.length
        piece = length if parallel.context == 1 else length // (2 * parallel.context)
        one_block = diffusion.objective == "diffusion" and diffusion.block_size == length
        return cls(precision, model.width_per_head, piece, 0 if one_block else length)


def refusal(name: str, demand: Demand) -> str | None:
    """Why the backend cannot do this on any device, or None."""
    if name == "flash":
        if demand.precision not in ("bf16", "fp16"):
            return f"takes bf16 and fp16, not {demand.precision}"
        if demand.head_dim not in FLASH_WIDTHS:
            return f"takes heads of {' or '.join(map(str, FLASH_WIDTHS))}, not {demand.head_dim}"
        for positions in (demand.piece, demand.clean):
            if positions % TILE:
                return f"takes pieces of a row in multiples of {TILE} positions, not {positions}"
    return None


def check_kernels(kernels: KernelConfig, demand: Demand) -> None:
    """Refuse a backend that the configuration already rules out, before anything starts.

    Raises:
        ConfigError: one line with the reason and what would do.
    """
    if kernels.attention != "auto" and (reason := refusal(kernels.attention, demand)):
        raise refused(kernels.attention, reason, [name for name in NAMES[:-1] if not refusal(name, demand)])


def refused(name: str, reason: str, others: list[str]) -> ConfigError:
    """The error for a backend that cannot do what is asked; ``others`` could."""
    names = ["auto", *(other for other in others if other != name)]
    return ConfigError(f"kernels.attention={name}: {reason}; use {', '.join(names[:-1])} or {names[-1]}")
