"""Engine interface: an engine owns the model and the optimizer, and shards both."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.parallel import World
from bd3_megatron.shards import ShardedTensor


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step, the same on every rank unless stated.

    Attributes:
        loss: mean over the global batch, nats per token.
        grad_norm: norm of the whole gradient before clipping; may be infinite or NaN.
        applied: True if weights were updated. A step with a non-finite loss or norm is not applied: weights, moments,
            EMA and the number of updates keep their bits.
        nonfinite_batches: for a step that was not applied, numbers of this rank's micro-batches with a non-finite
            loss. Only ranks of the last pipeline stage know them.
        blocks: statistics over the blocks of the global batch, if they were asked for
            (:meth:`bd3_megatron.diffusion.block_statistics.BlockStatistics.fields`).
    """

    loss: float
    grad_norm: float
    applied: bool = True
    nonfinite_batches: tuple[int, ...] = ()
    blocks: Mapping[str, float | None] = field(default_factory=dict)


class Engine(Protocol):
    """Trains and evaluates one model. Every rank calls every method, in the same order."""

    world: World
    updates: int
    """number of applied steps; Adam's bias correction and the EMA's warm-up depend on it"""

    def train_step(self, batches: Sequence[Batch], lr: float, statistics: bool = False) -> StepResult:
        """Run one optimizer step over this data-parallel rank's micro-batches, all of one size.

        A step with a non-finite loss or gradient norm changes nothing in :meth:`state` except the FP8 histories,
        from which the non-finite values of the step are removed.

        Args:
            lr: learning rate of this step.
            statistics: also take those over blocks. There are none for the causal objective, nor where
                context-parallel ranks share blocks.
        """

    def gradient_norm(self, batches: Sequence[Batch]) -> float | None:
        """Norm of the mean gradient over these micro-batches, without an update; None if the engine cannot tell.

        State and FP8 histories keep their bits.
        """

    def forward(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Weighted nll ``[R, L]`` of each micro-batch, on the CPU, the same on all ranks of a pipeline."""

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the model computes with the EMA weights, or with its own if there is no EMA."""

    def state(self) -> dict[str, ShardedTensor]:
        """Sharded state dict for checkpoints: this rank's chunks by ``section/global parameter name``, fp32.

        Sections are ``weights``, ``exp_avg``, ``exp_avg_sq``, with an EMA ``ema``, and with delayed FP8 scaling
        ``fp8``, which a checkpoint may lack. The chunks are live memory, not copies.
        """

    def loaded(self, updates: int) -> None:
        """Take over the chunks of :meth:`state`, which were filled from a checkpoint of ``updates`` updates."""

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set weights and EMA from whole tensors by global name.

        Raises:
            KeyError: a parameter has no tensor.
        """
