"""What the training loop asks of an engine. An engine owns the model, the optimizer and how both are sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.parallel import World
from bd3_megatron.shards import ShardedTensor


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step, the same on every rank unless stated.

    Attributes:
        loss: mean over the global batch, nats per token.
        grad_norm: of the whole gradient before clipping; infinite or NaN where it is not finite.
        applied: whether weights were updated. Where loss or norm are not finite they were not, and weights, moments,
            EMA and the number of updates are bit for bit what they were.
        suspects: of a step that was not applied, which of this rank's micro-batches had a loss that is not finite;
            known to the ranks of the last pipeline stage.
    """

    loss: float
    grad_norm: float
    applied: bool = True
    suspects: tuple[int, ...] = ()


class Engine(Protocol):
    """Trains and evaluates one model; every rank calls every method, in the same order."""

    world: World
    updates: int
    """Steps that were applied: what Adam's bias correction and the EMA's warm-up count."""

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step over this data-parallel rank's micro-batches, all of one size.

        A step whose loss or gradient norm is not finite changes no state that :meth:`state` holds but the histories
        of FP8, which forget the values of this step that are not finite."""

    def forward(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Weighted nll ``[R, L]`` of each micro-batch, on the CPU, the same on all ranks of a pipeline."""

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the model computes with the EMA weights (with its own when no EMA is kept)."""

    def state(self) -> dict[str, ShardedTensor]:
        """What a checkpoint holds: this rank's chunks of fp32 tensors by ``section/global parameter name``, sections
        ``weights``, ``exp_avg``, ``exp_avg_sq`` and, when kept, ``ema``; of FP8 with delayed scaling also the section
        ``fp8``, which a checkpoint may lack. The chunks are live memory, not copies."""

    def loaded(self, updates: int) -> None:
        """To be called after the chunks of :meth:`state` were filled from a checkpoint of that many updates."""

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take whole tensors by global name as weights and EMA. Raises KeyError where one is missing."""
