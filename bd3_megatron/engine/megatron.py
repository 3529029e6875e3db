"""The Megatron-core engine: its schedules, data parallelism and optimizer, for a world of 1 as for many."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from bd3_megatron import cpu_compat
from bd3_megatron.config import DiffusionConfig, KernelConfig, ModelConfig, OptimizationConfig, ParallelConfig
from bd3_megatron.diffusion.batch import Batch
from bd3_megatron.engine.base import StepResult
from bd3_megatron.model import BlockDiffusionModel, global_name, initialize, vocabulary_rows
from bd3_megatron.parallel import World
from bd3_megatron.shards import local_shard, whole_view


class MegatronEngine:
    """Implements :class:`bd3_megatron.engine.base.Engine`.

    Args:
        world: from :func:`bd3_megatron.parallel.start`.
        seed: of the initial weights.
        training: False builds the model alone, for evaluation and sampling.
    """

    def __init__(
        self,
        model: ModelConfig,
        diffusion: DiffusionConfig,
        kernels: KernelConfig,
        parallel: ParallelConfig,
        optimization: OptimizationConfig,
        world: World,
        seed: int = 0,
        training: bool = True,
    ):
        self.world = world
        self.optimization = optimization
        bf16 = optimization.precision == "bf16"
        with cpu_compat.redirected():  # tied weights over stages are shared by a call that names CUDA
            self.module = BlockDiffusionModel(
                model,
                diffusion,
                kernels,
                parallel,
                bf16=bf16,
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
            )
        initialize(self.module, seed)
        self.module.to(world.device)
        self.chunk = Float16Module(self.module.config, self.module) if bf16 else self.module
        self.updates = 0
        self.ema: dict[str, Tensor] = {}
        if training:
            self._prepare_training(bf16)

    def _prepare_training(self, bf16: bool) -> None:
        config = self.module.config
        reduction = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
        self.chunk = DistributedDataParallel(config, reduction, self.chunk)
        with cpu_compat.redirected():
            self.optimizer = get_megatron_optimizer(_optimizer_config(self.optimization, bf16), [self.chunk])
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        self._create_optimizer_state()
        if self.optimization.ema_decay > 0:
            self.ema = {name: master.detach().clone() for name, master in self._masters().items()}

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        self.chunk.train()
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._run(batches, forward_only=False)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.optimization.weight_decay * group.get("wd_mult", 1.0)
        with cpu_compat.redirected():
            _, norm, _ = self.optimizer.step()
            norm = self.optimizer.get_grad_norm() if norm is None else norm
        self.updates += 1
        self._update_ema()
        losses = torch.stack(outputs).double().mean() if outputs else torch.zeros((), dtype=torch.float64)
        return StepResult(self._mean_over_ranks(losses), float(norm))

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch]) -> list[Tensor]:
        self.chunk.eval()
        outputs = [x.cpu() for x in self._run(batches, forward_only=True)]
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            shared: list = [outputs]
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast_object_list(shared, source, parallel_state.get_pipeline_model_parallel_group())
            outputs = shared[0]
        return outputs

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        if not self.ema:
            yield
            return
        parameters = dict(self._parameters())
        own = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            self._copy_to_model(self.ema)
            yield
        finally:
            self._copy_to_model(own)

    def state(self) -> dict[str, Tensor]:
        state = {}
        for name, master in self._masters().items():
            slots = self._slots(master)
            held = {"weights": master, "exp_avg": slots["exp_avg"], "exp_avg_sq": slots["exp_avg_sq"]}
            if self.ema:
                held["ema"] = self.ema[name]
            rows = vocabulary_rows(name, self.module.model)
            state |= {f"{section}/{name}": whole_view(tensor, master, rows) for section, tensor in held.items()}
        return state

    def loaded(self, steps: int) -> None:
        self.updates = steps
        masters = self._masters()
        for master in masters.values():
            self._slots(master)["step"].fill_(steps)
        self._copy_to_model(masters)

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take whole tensors by global name as master weights, EMA and model weights.

        Raises:
            KeyError: a parameter has no tensor.
        """
        masters = self._masters()
        for name, master in masters.items():
            master.copy_(local_shard(weights[name], master))
            if self.ema:
                self.ema[name].copy_(master)
        self._copy_to_model(masters)

    def _run(self, batches: Sequence[Batch], forward_only: bool) -> list[Tensor]:
        """Megatron's schedule over the micro-batches; outputs of the last stage: losses, or weighted nll."""
        rows, length = batches[0].input_ids.shape
        with cpu_compat.redirected():
            return get_forward_backward_func()(
                forward_step_func=partial(_forward_step, forward_only),
                data_iterator=iter(batches),
                model=[self.chunk],
                num_microbatches=len(batches),
                seq_length=length,
                micro_batch_size=rows,
                forward_only=forward_only,
            )

    def _mean_over_ranks(self, loss: Tensor) -> float:
        """Mean over data-parallel ranks of the last stage's loss, known to every rank."""
        loss = loss.to(self.world.device)
        dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        dist.broadcast(
            loss,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
        return loss.item() / self.world.data_size

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield global_name(name, self.module), parameter

    def _masters(self) -> dict[str, Tensor]:
        """fp32 master weight of every parameter: the parameter itself in fp32 training."""
        return {name: getattr(p, "main_param", p) for name, p in self._parameters()}

    def _slots(self, master: Tensor) -> dict[str, Tensor]:
        for part in self.optimizer.chained_optimizers:
            if master in part.optimizer.state:
                return part.optimizer.state[master]
        raise KeyError("a parameter has no optimizer state")

    def _create_optimizer_state(self) -> None:
        """Adam's moments exist before the first step, so that a checkpoint can be read into them."""
        for part in self.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                for master in group["params"]:
                    slots = part.optimizer.state[master]
                    slots["step"] = torch.zeros((), dtype=torch.float32)
                    slots["exp_avg"] = torch.zeros_like(master, requires_grad=False)
                    slots["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)

    @torch.no_grad()
    def _copy_to_model(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters():
            parameter.copy_(values[name])

    @torch.no_grad()
    def _update_ema(self) -> None:
        """EMA with decay ``min(ema_decay, (1 + n) / (10 + n))`` after n updates (the paper's recipe)."""
        if not self.ema:
            return
        decay = min(self.optimization.ema_decay, (1 + self.updates) / (10 + self.updates))
        masters = self._masters()
        torch._foreach_lerp_([self.ema[name] for name in masters], [m.detach() for m in masters.values()], 1 - decay)


def _forward_step(forward_only: bool, data_iterator: Iterator[Batch], model: torch.nn.Module):
    """Megatron's ``forward_step_func``: the stage's output, and what to make of the last stage's."""
    batch = next(data_iterator).to(cpu_compat.device())

    def loss(weighted_nll: Tensor) -> tuple[Tensor, Tensor]:
        mean = weighted_nll.sum() / batch.tokens
        # The schedule divides the loss in place, so what is reported is a copy.
        return mean, weighted_nll if forward_only else mean.detach().clone()

    return model(batch), loss


def _optimizer_config(optimization: OptimizationConfig, bf16: bool) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=0.0,  # set at every step
        min_lr=0.0,
        adam_beta1=optimization.beta1,
        adam_beta2=optimization.beta2,
        adam_eps=optimization.adam_eps,
        weight_decay=optimization.weight_decay,
        clip_grad=optimization.clip_norm,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=False,
    )
