"""Process groups and random state, on one code path for any world size, on CPU and GPU."""

from __future__ import annotations

import datetime
import hashlib
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from bd3_common.errors import ConfigError
from bd3_common.text import counted
from bd3_megatron import cpu_compat
from bd3_megatron.config import ParallelConfig

COLLECTIVE_TIMEOUT_MINUTES = 120
"""a collective fails after this time"""


@dataclass(frozen=True)
class World:
    """Place of this process: its rank in the world, and its data-parallel rank.

    Ranks of one tensor, context or pipeline group have the same ``data_rank``: they work on the same rows.
    """

    rank: int
    size: int
    data_rank: int
    data_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes logs and metrics."""
        return self.rank == 0


def start(
    parallel: ParallelConfig,
    rank: int = 0,
    size: int = 1,
    local_rank: int = 0,
    store: dist.Store | None = None,
) -> World:
    """Join the process group and build Megatron's model- and data-parallel groups.

    Args:
        parallel: the layout; checked beforehand by :func:`bd3_megatron.layout.check_layout`.
        rank, size, local_rank: this process among all, and on its node (it picks the GPU).
        store: rendezvous; may be None in a world of 1.

    Raises:
        ConfigError: the backend needs a GPU and there is none, or there are fewer GPUs than ranks.
    """
    cpu_compat.install()
    cuda = torch.cuda.is_available()
    if parallel.backend == "nccl" and not cuda:
        raise ConfigError("parallel.backend=nccl: no CUDA device here; use auto or gloo")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank}: this machine has {counted(torch.cuda.device_count(), 'GPU')}; start one "
                f"rank per GPU, or run on the CPU with CUDA_VISIBLE_DEVICES="
            )
        torch.cuda.set_device(local_rank)
    # The watchdog, which names the hung rank and allows for evaluations and checkpoints, must act before a collective
    # times out.
    timeout = max(COLLECTIVE_TIMEOUT_MINUTES, math.ceil(2 * parallel.timeout_minutes) + 1)
    backend = backend_of(parallel)
    if not dist.is_initialized():
        dist.init_process_group(
            backend,
            rank=rank,
            world_size=size,
            store=dist.HashStore() if store is None and size == 1 else store,
            timeout=datetime.timedelta(minutes=timeout),
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.interleave if parallel.interleave > 1 else None,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=timeout,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    return World(
        rank=rank,
        size=size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        device=cpu_compat.device(),
    )


def backend_of(parallel: ParallelConfig) -> str:
    """The backend that :func:`start` chooses on this machine."""
    return parallel.backend if parallel.backend != "auto" else ("nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    """Destroy all process groups; then :func:`start` may be called again in the same process."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def seed_dropout(seed: int, step: int) -> None:
    """Set the dropout state as a function of (seed, step), so that a resumed run draws the same dropout.

    Megatron derives each tensor-parallel rank's state from it. Ranks with other rows, positions or layers get states
    of their own here.
    """
    rows = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    layers = parallel_state.get_pipeline_model_parallel_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(dropout_seed(seed, step, rows, layers), force_reset_rng=True)


def dropout_seed(seed: int, step: int, rows: int, layers: int) -> int:
    """Hash of the arguments, below 2^62: Megatron adds a small offset per tensor-parallel rank."""
    digest = hashlib.sha256(repr((seed, step, rows, layers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2
