"""The Megatron-core engine: its schedules, data parallelism and optimizer, for a world of 1 as for many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from bd3_megatron import cpu_compat
from bd3_megatron.config import EngineConfig, OptimizationConfig
from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.engine.base import StepResult
from bd3_megatron.engine.masters import Master, MasterWeights, OwnsMasters
from bd3_megatron.engine.scaling import Fp8State
from bd3_megatron.engine.stage import (
    build_stage,
    forward_rows,
    global_loss,
    measured,
    named_parameters,
    parameter_spec,
    run_schedule,
)
from bd3_megatron.model import BlockDiffusionModel
from bd3_megatron.parallel import World
from bd3_megatron.shards import sharded_tensor


class MegatronEngine(OwnsMasters):
    """Implements :class:`bd3_megatron.engine.base.Engine`.

    Args:
        world: from :func:`bd3_megatron.parallel.start`.
        config: with ``model.vocab_size`` and ``model.mask_id`` resolved; ``zero`` is ignored.
        seed: seed of the initial weights.
        training: False builds the model without an optimizer, for evaluation and sampling.
    """

    def __init__(self, config: EngineConfig, world: World, seed: int = 0, training: bool = True):
        self.world, self.parallel, self.optimization = world, config.parallel, config.optimization
        bf16 = self.optimization.bf16
        self.modules = build_stage(config, world.device, seed, main_grads=training)
        self.config = self.modules[0].config
        self.chunks = [Float16Module(self.config, module) if bf16 else module for module in self.modules]
        self.updates = 0
        self.masters: MasterWeights | None = None
        self.fp8 = Fp8State(self.modules if training else ())
        if training:
            self._prepare_training()

    @property
    def module(self) -> BlockDiffusionModel:
        """The model chunk of a rank that has only one."""
        (module,) = self.modules
        return module

    def _prepare_training(self) -> None:
        sharded, overlap = self.parallel.distributed_optimizer, self.parallel.overlap
        reduction = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=sharded
        )
        self.chunks = [DistributedDataParallel(self.config, reduction, chunk) for chunk in self.chunks]
        with cpu_compat.redirected():
            self.optimizer = get_megatron_optimizer(_optimizer_config(self.optimization, sharded), self.chunks)
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        if overlap:  # gradients are reduced once, in the backward pass of the last micro-batch
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._create_optimizer_state()
        self.masters = MasterWeights(self._masters(), self._publish, self.optimization.ema_decay)

    def train_step(self, batches: Sequence[Batch], lr: float, statistics: bool = False) -> StepResult:
        with measured(self.modules[-1], statistics) as blocks:
            outputs = self._accumulate(batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.optimization.weight_decay * group.get("wd_mult", 1.0)
        with cpu_compat.redirected():
            self.optimizer.prepare_grads()
            norm = float(self.optimizer.get_grad_norm())
            loss, finite = global_loss(outputs, norm, self.world)
            if finite:
                self._clip(norm)
                self.optimizer.step_with_ready_grads()
        return self._finish_step(loss, norm, finite, outputs, blocks())

    def gradient_norm(self, batches: Sequence[Batch]) -> float | None:
        with self.fp8.untouched():
            self._accumulate(batches)
        with cpu_compat.redirected():
            self.optimizer.prepare_grads()
            return float(self.optimizer.get_grad_norm())

    def _accumulate(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Gradients of the micro-batches, in place of those before; their losses on the last stage."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return run_schedule(self.chunks, batches, forward_only=False)

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch]) -> list[Tensor]:
        for chunk in self.chunks:
            chunk.eval()
        with self.fp8.untouched():
            return forward_rows(self.chunks, self.modules[-1].context, batches)

    def loaded(self, updates: int) -> None:
        self.updates = updates
        for part in self._parts():
            for slots in part.optimizer.state.values():
                slots["step"].fill_(updates)
            _count(part.optimizer, updates)
        self._publish()

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        if self.masters is not None:
            self.masters.fill(weights)
            return
        for name, parameter, module in named_parameters(self.modules):
            sharded_tensor(parameter, parameter_spec(name, parameter, module)).fill(weights[name])

    def _clip(self, norm: float) -> None:
        """Scale the prepared gradients down to ``clip_norm``, as Megatron's own ``step`` does."""
        if self.optimization.clip_norm > 0:
            for part in self._parts():
                clip_grad_by_total_norm_fp32(part.get_parameters(), self.optimization.clip_norm, norm)

    def _parts(self) -> list:
        """Megatron's optimizers, one per kind of parameters, without those that have none on this rank."""
        return [part for part in self.optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)]

    def _masters(self) -> dict[str, Master]:
        """Master weights of this rank: whole parameters, or its ranges of them under the distributed optimizer."""
        masters = {}
        for name, parameter, module in named_parameters(self.modules):
            spec = parameter_spec(name, parameter, module)
            if not self.parallel.distributed_optimizer:
                weight = getattr(parameter, "main_param", parameter)  # the parameter itself in fp32 training
                slots = self._slots(weight)
                masters[name] = Master(spec, weight, slots["exp_avg"], slots["exp_avg_sq"])
                continue
            for part in self._parts():
                if parameter in part.model_param_group_index_map:
                    group, place = part.model_param_group_index_map[parameter]
                    weight = part.optimizer.param_groups[group]["params"][place]
                    slots = part.optimizer.state[weight]
                    start = part._get_model_param_range_map(parameter)["param"].start
                    masters[name] = Master(spec, weight, slots["exp_avg"], slots["exp_avg_sq"], start)
        return masters

    def _slots(self, weight: Tensor) -> dict[str, Tensor]:
        for part in self._parts():
            if weight in part.optimizer.state:
                return part.optimizer.state[weight]
        raise KeyError("a parameter has no optimizer state")

    def _create_optimizer_state(self) -> None:
        """Adam's moments exist before the first step, so that a checkpoint can be read into them."""
        for part in self._parts():
            _count(part.optimizer, 0)
            for group in part.optimizer.param_groups:
                for weight in group["params"]:
                    slots = part.optimizer.state[weight]
                    slots["step"] = torch.zeros((), dtype=torch.float32)
                    slots["exp_avg"] = torch.zeros_like(weight, requires_grad=False)
                    slots["exp_avg_sq"] = torch.zeros_like(weight, requires_grad=False)

    @torch.no_grad()
    def _publish(self) -> None:
        """Let the model compute with the master weights."""
        with cpu_compat.redirected():
            if self.parallel.distributed_optimizer:
                for part in self._parts():
                    part._copy_main_params_to_model_params()
                for chunk in self.chunks:
                    chunk.start_param_sync(force_sync=True)
                return
            for _, parameter, _ in named_parameters(self.modules):
                master = getattr(parameter, "main_param", None)
                if master is not None:
                    parameter.copy_(master)


def _count(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set Adam's number of updates. torch's Adam counts by parameter; Transformer Engine's, which Megatron prefers if
    it is installed, and Apex's count by group."""
    for group in optimizer.param_groups:
        group["step"] = updates


def _optimizer_config(optimization: OptimizationConfig, sharded: bool) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=0.0,  # set at every step
        min_lr=0.0,
        adam_beta1=optimization.beta1,
        adam_beta2=optimization.beta2,
        adam_eps=optimization.adam_eps,
        use_distributed_optimizer=sharded,
        weight_decay=optimization.weight_decay,
        clip_grad=optimization.clip_norm,
        bf16=optimization.bf16,
        params_dtype=torch.bfloat16 if optimization.bf16 else torch.float32,
    )
