"""The DeepSpeed engine: ZeRO stages 1 to 3 over Megatron's tensor-parallel layers, stage 1 also under pipelines."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from bd3_megatron import cpu_compat
from bd3_megatron.config import EngineConfig, OptimizationConfig, ZeroConfig
from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.engine import ops
from bd3_megatron.engine.base import StepResult
from bd3_megatron.engine.masters import Master, MasterWeights, OwnsMasters
from bd3_megatron.engine.scaling import Fp8State
from bd3_megatron.engine.stage import (
    build_stage,
    forward_rows,
    forward_step,
    global_loss,
    measured,
    named_parameters,
    parameter_spec,
    run_schedule,
)
from bd3_megatron.model import BlockDiffusionModel
from bd3_megatron.parallel import World


class ZeroEngine(OwnsMasters):
    """Implements :class:`bd3_megatron.engine.base.Engine`.

    Args:
        world: from :func:`bd3_megatron.parallel.start`.
        config: with ``model.vocab_size`` and ``model.mask_id`` resolved.
        seed: seed of the initial weights.

    Raises:
        ConfigError: DeepSpeed is not installed, or what offloading needs is not built.
    """

    def __init__(self, config: EngineConfig, world: World, seed: int = 0):
        zero, optimization = config.zero, config.optimization
        deepspeed = ops.import_deepspeed(f"zero.stage={zero.stage}")
        if zero.offload:
            ops.load()
        self.world, self.zero, self.optimization = world, zero, optimization
        # Transformer Engine's layers keep weights for backward passes, which stage 3 releases.
        if zero.stage == 3 and config.kernels.layers == "auto":
            config = config.replace(kernels=config.kernels.model_copy(update={"layers": "local"}))
        (self.module,) = build_stage(config, world.device, seed)
        if optimization.bf16:
            self.module.bfloat16()
        # Stage 3 leaves parameters without a shape, so all that depends on it comes first.
        self.specs = {name: parameter_spec(name, p, module) for name, p, module in named_parameters([self.module])}
        _sum_over_tensor_group(self.module)
        adam = _adam(deepspeed, self.module, zero, optimization)
        _forget_earlier_world(deepspeed)
        with self._local_rank():
            self.engine, *_ = deepspeed.initialize(
                model=self.module,
                optimizer=adam,
                mpu=_ModelParallelUnit,
                config=_configuration(zero, optimization, world),
                dist_init_required=False,
            )
        self.adam, self.optimizer = adam, self.engine.optimizer
        _check_groups(self.engine)
        for flat in self._partitions():
            self._create_moments(flat)
        self.updates = 0
        self.fp8 = Fp8State([self.module])
        self.masters = MasterWeights(self._masters(), self._publish, optimization.ema_decay)

    def gradient_norm(self, batches: Sequence[Batch]) -> float | None:
        return None  # DeepSpeed computes norms in its step alone

    def train_step(self, batches: Sequence[Batch], lr: float, statistics: bool = False) -> StepResult:
        self.engine.train()
        for group in self.adam.param_groups:
            group["lr"] = lr
        with self._local_rank(), measured(self.module, statistics) as blocks:
            # Stage 1 reduces nothing before the step, so any schedule may run the module. Stages 2 and 3 reduce during
            # the backward pass of each micro-batch, and DeepSpeed's engine has to run it.
            if self.zero.stage == 1:
                losses = run_schedule([self.module], batches, forward_only=False)
            else:
                losses = self._accumulate(batches)
            self.engine.step()  # changes nothing if the norm is not finite
        norm = float(self.engine.get_global_grad_norm())
        norm = norm if norm >= 0 else float("inf")  # DeepSpeed may report -1 for a non-finite norm
        loss, finite = global_loss(losses, norm, self.world)
        if finite != self.engine.was_step_applied():
            raise RuntimeError(f"loss {loss}, gradient norm {norm}: DeepSpeed decided otherwise about the update")
        if not finite:
            self._clear_up()
        return self._finish_step(loss, norm, finite, losses, blocks())

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch]) -> list[Tensor]:
        self.engine.eval()
        with self._local_rank(), self.fp8.untouched():
            return forward_rows([self.module], self.module.context, batches)

    def loaded(self, updates: int) -> None:
        self.updates = updates
        for slots in self.adam.state.values():
            slots["step"] = self._count(updates)
        self._publish()

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.masters.fill(weights)

    def _local_rank(self) -> contextlib.AbstractContextManager[None]:
        """Context in which DeepSpeed finds its device. The variable is not left behind, because a launcher's
        variables tell other code that this process is one of many."""
        return ops.environment("LOCAL_RANK", str(self.world.device.index or 0))

    def _accumulate(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Gradients of the mean over the micro-batches; their losses."""
        losses, iterator = [], iter(batches)
        self.fp8.weights_changed()  # Megatron's schedules see to it themselves
        with cpu_compat.redirected():
            for _ in batches:
                output, loss = forward_step(False, iterator, self.engine)
                mean, reported = loss(output)
                self.engine.backward(mean / len(batches))
                losses.append(reported)
        return losses

    def _partitions(self) -> list[Tensor]:
        """This rank's flat fp32 partitions, one or more for each group of parameters."""
        for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
            if hasattr(self.optimizer, name):
                return getattr(self.optimizer, name)
        raise AttributeError(f"{type(self.optimizer).__name__} has no fp32 partitions")

    def _create_moments(self, flat: Tensor) -> None:
        """Adam's moments exist before the first step, so that a checkpoint can be read into them."""
        slots = self.adam.state[flat]
        slots["step"] = self._count(0)
        slots["exp_avg"] = torch.zeros_like(flat, requires_grad=False)
        slots["exp_avg_sq"] = torch.zeros_like(flat, requires_grad=False)

    def _count(self, updates: int) -> Tensor | int:
        """Adam's step counter: torch keeps a tensor, DeepSpeed an int."""
        return updates if self.zero.offload else torch.tensor(float(updates))

    def _masters(self) -> dict[str, Master]:
        """Master weights of this rank: the ranges of parameters in its partitions, without padding."""
        masters, flats = {}, self._partitions()
        for name, parameter, _ in named_parameters([self.module]):
            group, at, start, count = self._place(parameter)
            if count > 0:
                slots = self.adam.state[flats[group]]
                parts = (flats[group], slots["exp_avg"], slots["exp_avg_sq"])
                masters[name] = Master(self.specs[name], *(x.detach()[at : at + count] for x in parts), start)
        return masters

    def _place(self, parameter: Tensor) -> tuple[int, int, int, int]:
        """(partition, offset in it, offset in the flattened shard, elements) of the range that this rank updates."""
        if self.zero.stage == 3:  # every parameter is split into one padded chunk per data-parallel rank
            group, at, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            start = self.world.data_rank * size
            return group, at, start, min(size, parameter.ds_numel - start)
        fragment = parameter._hp_mapping  # the flattened group is cut, regardless of parameters
        if fragment is None:
            return 0, 0, 0, 0
        part, shard = fragment.hp_fragment_address, fragment.lp_fragment_address
        return fragment.param_group_index, part.start, shard.start, part.numel

    @torch.no_grad()
    def _publish(self) -> None:
        """Let the model compute with the master weights."""
        if self.zero.stage < 3:
            self.optimizer.update_lp_params()
            return
        self.optimizer._partition_all_parameters()
        for group in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self._gather_small()

    def _clear_up(self) -> None:
        """Clean up after a step that was not applied; DeepSpeed does so after updates only."""
        self._gather_small()  # stage 3 has released them
        if self.zero.stage == 2:  # with offloading the sums that are not finite would stay, and be added to
            self.optimizer.averaged_gradients.update(dict.fromkeys(self.optimizer.averaged_gradients))

    def _gather_small(self) -> None:
        """Gather the small parameters, which stage 3 keeps whole on every rank."""
        small = self.optimizer.persistent_parameters if self.zero.stage == 3 else []
        if small:
            small[0].all_gather(small)


class _ModelParallelUnit:
    """Megatron's groups under the names that DeepSpeed asks for; model parallel is tensor times pipeline."""

    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)

    @staticmethod
    def get_model_parallel_world_size() -> int:
        return dist.get_world_size(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_model_parallel_rank() -> int:
        return dist.get_rank(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())


def _forget_earlier_world(deepspeed: Any) -> None:
    """DeepSpeed keeps process groups in globals; take the groups that are there now."""
    deepspeed.utils.groups._release_process_group_references()
    deepspeed.comm.comm.cdb = None
    deepspeed.comm.init_distributed()


def _check_groups(engine: Any) -> None:
    """Check that both libraries use the same groups of ranks."""
    theirs, ours = engine.optimizer.dp_process_group, parallel_state.get_data_parallel_group()
    if dist.get_process_group_ranks(theirs) != dist.get_process_group_ranks(ours):
        raise RuntimeError("DeepSpeed and Megatron have different data-parallel groups")
    if engine.mp_world_size != dist.get_world_size(parallel_state.get_model_parallel_group()):
        raise RuntimeError("DeepSpeed and Megatron have different model-parallel groups")


def _sum_over_tensor_group(module: BlockDiffusionModel) -> None:
    """Sum partial gradients over the tensor-parallel group, as Megatron's ``finalize_model_grads`` does.

    A rank has only part of the gradient of parameters that are applied to its shard of the sequence, and of the norms
    of queries and keys, which see its heads only. DeepSpeed does not know that.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.float().clone()
        dist.all_reduce(total, group=group)
        return total.to(gradient.dtype)

    for name, parameter in module.named_parameters():
        if getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name:
            parameter.register_hook(summed)


def _adam(
    deepspeed: Any, module: BlockDiffusionModel, zero: ZeroConfig, optimization: OptimizationConfig
) -> torch.optim.Optimizer:
    """AdamW without weight decay for biases and norms, like Megatron's; the learning rate is set at every step."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optimization.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    kind = deepspeed.ops.adam.DeepSpeedCPUAdam if zero.offload else torch.optim.AdamW
    return kind(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(optimization.beta1, optimization.beta2),
        eps=optimization.adam_eps,
    )


def _configuration(zero: ZeroConfig, optimization: OptimizationConfig, world: World) -> dict[str, Any]:
    sharding: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": False,
        # Buffers that DeepSpeed's own backward pass would fill, which stage 1 goes without.
        "contiguous_gradients": zero.stage > 1,
        "memory_efficient_linear": False,  # would replace torch's for the whole process
    }
    if zero.offload:
        sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its statistics only
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step is over when step() is called
        "gradient_clipping": optimization.clip_norm,
        "zero_optimization": sharding,
        "bf16": {"enabled": optimization.precision == "bf16", "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
