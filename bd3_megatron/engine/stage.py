"""Parts that both engines share: this rank's pipeline stage, and Megatron's schedules over it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_common.machine import memory_limit
from bd3_megatron import cpu_compat
from bd3_megatron.attention.context import ContextShard
from bd3_megatron.backbones import EMBEDDING
from bd3_megatron.config import EngineConfig
from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.diffusion.block_statistics import BlockStatistics
from bd3_megatron.layers.specs import transformer_config
from bd3_megatron.model import BlockDiffusionModel, global_name, initialize, vocabulary_rows
from bd3_megatron.parallel import World
from bd3_megatron.shards import ShardSpec, shard_spec


def build_stage(
    config: EngineConfig, device: torch.device, seed: int = 0, main_grads: bool = False
) -> list[BlockDiffusionModel]:
    """This rank's model chunks with initial weights: one, or ``parallel.interleave`` of them.

    Args:
        main_grads: the chunks will be wrapped by Megatron's data parallelism.
    """
    _check_room(config)
    # Shared, because the schedules read it from the first chunk.
    megatron = transformer_config(config, main_grads)
    modules, chunks = [], config.parallel.interleave
    for number in range(chunks):
        chunk = number if chunks > 1 else None
        with cpu_compat.redirected():  # tied weights over stages are shared by a call that names CUDA
            module = BlockDiffusionModel(
                config,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
                chunk=chunk,
                megatron=megatron,
            )
        initialize(module, seed)
        modules.append(module.to(device))
    return modules


def _check_room(config: EngineConfig) -> None:
    """Refuse a model that this machine cannot hold, before memory is filled in trying."""
    model, parallel = config.model, config.parallel
    count = model.parameters(model.vocab_size or 0)
    share = 4 * count // (parallel.tensor * parallel.pipeline)
    if share > memory_limit():
        raise ConfigError(
            f"model.layers={model.layers}, model.hidden={model.hidden}, model.vocab_size={model.vocab_size}: the "
            f"{count:,} parameters take {share / 1e9:.0f} GB on each rank, the machine has {memory_limit() / 1e9:.0f}; "
            "make the model smaller, or give more tensor-parallel ranks"
        )


def named_parameters(modules: Iterable[BlockDiffusionModel]) -> Iterator[tuple[str, Tensor, BlockDiffusionModel]]:
    """(global name, parameter, its module) of this rank's chunks."""
    for module in modules:
        for name, parameter in module.named_parameters():
            yield global_name(name, module), parameter, module


def parameter_spec(name: str, parameter: Tensor, module: BlockDiffusionModel) -> ShardSpec:
    """Place in the whole tensor of a parameter of full local shape."""
    # The head's copy of a tied embedding on another stage than the first.
    duplicate = name == EMBEDDING and not module.pre_process
    return shard_spec(parameter, vocabulary_rows(name, module.model), duplicate)


def run_schedule(chunks: Sequence[torch.nn.Module], batches: Sequence[Batch], forward_only: bool) -> list[Tensor]:
    """Megatron's schedule over the micro-batches; outputs of the last stage: losses, or weighted nll.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        batches: micro-batches of whole rows, all of one size.
    """
    streams = get_attr_wrapped_model(chunks[0], "streams")
    iterators = [iter(batches) for _ in chunks]
    with cpu_compat.redirected():
        return get_forward_backward_func()(
            forward_step_func=partial(forward_step, forward_only),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=streams.tokens,
            micro_batch_size=len(batches[0].input_ids) // streams.count,
            forward_only=forward_only,
        )


def forward_rows(chunks: Sequence[torch.nn.Module], context: ContextShard, batches: Sequence[Batch]) -> list[Tensor]:
    """Weighted nll ``[R, L]`` of each micro-batch, on the CPU, the same on all ranks that share the rows."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    # The interleaved schedule needs a multiple of the stages: the last micro-batch fills up.
    missing = -len(batches) % stages if len(chunks) > 1 else 0
    outputs = run_schedule(chunks, [*batches, *[batches[-1]] * missing], forward_only=True)[: len(batches)]
    outputs = [context.gather(x.transpose(0, 1)).transpose(0, 1) for x in outputs]
    if stages > 1:  # only the last one has outputs
        whole = torch.empty(len(batches), *batches[0].labels.shape, device=cpu_compat.device())  # [n, R, L]
        if outputs:
            torch.stack(outputs, out=whole)
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(whole, source, parallel_state.get_pipeline_model_parallel_group())
        outputs = list(whole)
    return [x.cpu() for x in outputs]


def global_loss(outputs: Sequence[Tensor], norm: float, world: World) -> tuple[float, bool]:
    """(loss of the global batch, True if it and the gradient norm are finite), the same on every rank.

    Context-parallel ranks have terms of a sum, data-parallel ranks terms of a mean; only the last stage has them.

    Args:
        outputs: losses that the schedule returned on this rank.
        norm: gradient norm, the same on all ranks of a replica of the model. Replicas may round it differently, so
            the decision whether it is finite is reduced like the loss.
    """
    loss = torch.stack(list(outputs)).double().mean() if outputs else torch.zeros((), dtype=torch.float64)
    numbers = torch.stack([loss, loss.new_tensor(0.0 if math.isfinite(norm) else 1.0)]).to(world.device)
    dist.all_reduce(numbers, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.broadcast(
        numbers,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        parallel_state.get_pipeline_model_parallel_group(),
    )
    total, overflows = numbers.tolist()
    return total / world.data_size, math.isfinite(total) and overflows == 0


@contextlib.contextmanager
def measured(module: BlockDiffusionModel, wanted: bool) -> Iterator[Callable[[], Mapping[str, float | None]]]:
    """Collect statistics over blocks while the context is entered.

    Args:
        module: last model chunk of this rank.

    Yields:
        function that adds them up over ranks, to be called by all: numbers for metrics, empty if there are none.
    """
    size, context = module.streams.block_size, module.context
    if not wanted or not module.streams.noisy or (context.size > 1 and context.chunk % size):
        yield dict
        return
    statistics = BlockStatistics(size, cpu_compat.device())
    module.statistics = statistics

    def total() -> Mapping[str, float | None]:
        dist.all_reduce(statistics.sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        dist.broadcast(
            statistics.sums,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
        return BlockStatistics.fields(size, statistics.sums)

    try:
        yield total
    finally:
        module.statistics = None


def nonfinite_batches(outputs: Sequence[Tensor]) -> tuple[int, ...]:
    """Numbers of the micro-batches with a non-finite loss."""
    return tuple(number for number, loss in enumerate(outputs) if not math.isfinite(loss.item()))


def forward_step(forward_only: bool, data_iterator: Iterator[Batch], model: torch.nn.Module):
    """Megatron's ``forward_step_func``: the stage's output, and the function that turns the last one into a loss."""
    batch = next(data_iterator)
    batch = batch.take(ContextShard.of_this_rank(batch.labels.shape[1])).to(cpu_compat.device())

    def loss(output: Tensor) -> tuple[Tensor, Tensor]:
        if forward_only:
            return output.sum(), output
        mean = output / batch.tokens
        # The schedule divides the loss in place, so the reported one is a copy.
        reported = mean.detach().clone()
        # A non-finite loss gets a NaN gradient: libraries that check only the norm then skip the step.
        output.register_hook(lambda gradient: torch.where(reported.isfinite(), gradient, torch.nan))
        return mean, reported

    return model(batch, total=not forward_only), loss
