"""What the training loop asks of an engine. An engine owns the model, the optimizer and how both are sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bd3_megatron.diffusion.batch import Batch
from bd3_megatron.parallel import World
from bd3_megatron.shards import Held


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step: mean loss in nats per token over the global batch, gradient norm before clipping."""

    loss: float
    grad_norm: float


class Engine(Protocol):
    """Trains and evaluates one model; every rank calls every method, in the same order."""

    world: World

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step over this data-parallel rank's micro-batches, all of one size."""

    def forward(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Weighted nll ``[R, L]`` of each micro-batch, on the CPU, the same on all ranks of a pipeline."""

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the model computes with the EMA weights (with its own when no EMA is kept)."""

    def state(self) -> dict[str, Held]:
        """What a checkpoint holds: this rank's boxes of fp32 tensors by ``section/global parameter name``, sections
        ``weights``, ``exp_avg``, ``exp_avg_sq`` and, when kept, ``ema``; of FP8 with delayed scaling also the section
        ``fp8``, which a checkpoint may lack. The boxes are live memory, not copies."""

    def loaded(self, steps: int) -> None:
        """To be called after the boxes of :meth:`state` were filled from a checkpoint of that many steps."""

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take whole tensors by global name as weights and EMA. Raises KeyError where one is missing."""
