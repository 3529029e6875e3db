"""Optimizer shards: this rank's fp32 master weights, Adam moments and EMA weights, by global name.

Both engines cut a model differently (whole parameters, flat ranges of them, partitions of flattened groups), and all
cuts are ranges of flattened tensor-parallel shards. Everything that follows from that is here once: the state that
checkpoints hold, the EMA, and weights given from outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.engine.base import StepResult
from bd3_megatron.engine.scaling import Fp8State
from bd3_megatron.engine.stage import nonfinite_batches
from bd3_megatron.shards import ShardedTensor, ShardSpec, sharded_tensor


@dataclass(frozen=True)
class Master:
    """The part of one parameter that this rank updates, fp32, contiguous, all of one shape.

    Attributes:
        spec: where the parameter's tensor-parallel shard lies in the whole tensor.
        weight, exp_avg, exp_avg_sq: live tensors of the optimizer; they hold the elements ``start`` to
            ``start + numel`` of the flattened shard.
    """

    spec: ShardSpec
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    start: int = 0


class MasterWeights:
    """State of one rank by global parameter name.

    Args:
        masters: what this rank updates.
        publish: makes the model compute with the current master weights; called on every rank.
        ema_decay: decay of the average; 0 keeps none.
    """

    def __init__(self, masters: dict[str, Master], publish: Callable[[], None], ema_decay: float = 0.0):
        self.masters, self.publish, self.ema_decay = masters, publish, ema_decay
        self.ema: dict[str, Tensor] = {}
        if ema_decay > 0:
            self.ema = {name: master.weight.detach().clone() for name, master in masters.items()}

    def state(self) -> dict[str, ShardedTensor]:
        """See :meth:`bd3_megatron.engine.base.Engine.state`."""
        state = {}
        for name, master in self.masters.items():
            sections = {"weights": master.weight, "exp_avg": master.exp_avg, "exp_avg_sq": master.exp_avg_sq}
            if self.ema_decay > 0:
                sections["ema"] = self.ema[name]
            state |= {
                f"{key}/{name}": sharded_tensor(tensor, master.spec, master.start) for key, tensor in sections.items()
            }
        return state

    @torch.no_grad()
    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Take whole tensors by global name as master weights and EMA, and publish them.

        Raises:
            KeyError: a parameter has no tensor.
        """
        for name, master in self.masters.items():
            sharded_tensor(master.weight, master.spec, master.start).fill(weights[name])
            if self.ema_decay > 0:
                self.ema[name].copy_(master.weight)
        self.publish()

    @torch.no_grad()
    def update_ema(self, updates: int) -> None:
        """EMA with decay ``min(ema_decay, (1 + n) / (10 + n))`` after n updates (the paper's recipe)."""
        if self.ema_decay > 0 and self.masters:
            decay = min(self.ema_decay, (1 + updates) / (10 + updates))
            weights = [master.weight.detach() for master in self.masters.values()]
            torch._foreach_lerp_([self.ema[name] for name in self.masters], weights, 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the model computes with the EMA: the two exchange places, one tensor at a time."""
        if self.ema_decay <= 0:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, master in self.masters.items():
            own = master.weight.detach().clone()
            master.weight.copy_(self.ema[name])
            self.ema[name].copy_(own)
        self.publish()


class OwnsMasters:
    """Methods of :class:`bd3_megatron.engine.base.Engine` that both engines implement with their master weights."""

    masters: MasterWeights
    fp8: Fp8State

    def _finish_step(
        self,
        loss: float,
        norm: float,
        applied: bool,
        outputs: Sequence[Tensor],
        blocks: Mapping[str, float | None],
    ) -> StepResult:
        """Count the update and average the weights, or, without one, forget what non-finite values left behind."""
        if not applied:
            self.fp8.forget_overflow()
            return StepResult(loss, norm, applied=False, nonfinite_batches=nonfinite_batches(outputs))
        self.updates += 1
        self.masters.update_ema(self.updates)
        return StepResult(loss, norm, blocks=blocks)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        return self.masters.averaged()

    def state(self) -> dict[str, ShardedTensor]:
        return self.masters.state() | self.fp8.state()
