"""Layouts that `bd3 bench parity` compares with one process, importable without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from bd3_megatron.config import EngineConfig, ParallelConfig, ZeroConfig

if TYPE_CHECKING:
    from pretrain.bench.parity import Task


class Layout(NamedTuple):
    """A way to spread the model over ``size`` processes."""

    size: int
    parallel: ParallelConfig
    zero: ZeroConfig = ZeroConfig()

    def config(self, task: Task) -> EngineConfig:
        """The task under this layout."""
        sections = {name: getattr(task, name) for name in ("model", "diffusion", "kernels", "fp8")}
        return EngineConfig(parallel=self.parallel, zero=self.zero, **sections)


def _layout(size: int, zero: int = 0, **options: Any) -> Layout:
    return Layout(size, ParallelConfig(**options), ZeroConfig(stage=zero))


LAYOUTS: dict[str, Layout] = {
    "TP2": _layout(2, tensor=2),
    "TP2+SP": _layout(2, tensor=2, sequence=True),
    "PP2": _layout(2, pipeline=2),
    "PP2-uneven": _layout(2, pipeline=2, head_weight=2),
    "PP2-interleaved": _layout(2, pipeline=2, interleave=2),
    "CP2": _layout(2, context=2),
    "DP2": _layout(2),
    "DP2+distopt": _layout(2, distributed_optimizer=True),
    "ZeRO1": _layout(2, zero=1),
    "ZeRO2": _layout(2, zero=2),
    "ZeRO3": _layout(2, zero=3),
    "selective": _layout(1, recompute="selective"),
    "TP2+SP-full": _layout(2, tensor=2, sequence=True, recompute="full"),
    "PP4": _layout(4, pipeline=4),
    "TP2xPP2": _layout(4, tensor=2, pipeline=2),
    "TP2+SPxCP2": _layout(4, tensor=2, sequence=True, context=2),
    "CP2xPP2": _layout(4, context=2, pipeline=2),
    "CP2xDP2+distopt": _layout(4, context=2, distributed_optimizer=True),
    "TP2+SPxPP2-interleaved": _layout(4, tensor=2, sequence=True, pipeline=2, interleave=2),
    "TP2xDP2+distopt": _layout(4, tensor=2, distributed_optimizer=True),
    "PP2xDP2": _layout(4, pipeline=2),
    "TP2xZeRO1": _layout(4, zero=1, tensor=2),
    "TP2xZeRO3": _layout(4, zero=3, tensor=2),
    "TP2+SPxZeRO2": _layout(4, zero=2, tensor=2, sequence=True),
    "PP2xZeRO1": _layout(4, zero=1, pipeline=2),
}
