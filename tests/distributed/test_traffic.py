"""Traffic of a training step as `bd3 estimate` counts it, compared with that of real ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from bd3_megatron import parallel
from bd3_megatron.config import DiffusionConfig, EngineConfig, ModelConfig, ParallelConfig
from bd3_megatron.engine.megatron import MegatronEngine
from pretrain.bench.models import random_batch
from pretrain.config.schema import LogConfig, RunConfig, TrainConfig
from pretrain.distributed.spawn import run_world
from pretrain.estimate.devices import DEVICES
from pretrain.estimate.prediction import Prediction

MODEL = ModelConfig(layers=4, hidden=64, heads=4, kv_heads=2, length=256, vocab_size=62, mask_id=61)
MODELS = {"qwen3": MODEL, "tied": MODEL.model_copy(update={"tie_embeddings": True, "vocab_size": 1000})}
BLOCKS = DiffusionConfig(block_size=4)
TRAIN = TrainConfig(precision="fp32", global_batch=8, micro_batch=2)
LAYOUTS = {
    "TP2": {"tensor": 2},
    "TP2+SP": {"tensor": 2, "sequence": True},
    "TP2+SP-full": {"tensor": 2, "sequence": True, "recompute": "full"},
    "PP2": {"pipeline": 2},
    "PP2-interleaved": {"pipeline": 2, "interleave": 2},
    "CP2": {"context": 2},
    "CP2-selective": {"context": 2, "recompute": "selective"},
    "DP2": {},
    "DP2+distopt": {"distributed_optimizer": True},
}
CASES = [*(("qwen3", layout) for layout in LAYOUTS), ("tied", "PP2")]


# Collectives by what they send of the whole tensor, times (r - 1) / r.
SHARES = {
    "allreduce_": 2,
    "allreduce_coalesced_": 2,
    "_allgather_base_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
}


class Sent(TorchDispatchMode):
    """Bytes that this rank sends in collectives over r ranks, by the ring algorithms, and point to point."""

    def __init__(self):
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__ if func.namespace == "c10d" else ""
        if name == "send":
            self.bytes += sum(tensor.nbytes for tensor in args[0])
        elif name in SHARES:
            groups = [x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())]
            size = dist.ProcessGroup.unbox(groups[0]).size()
            # Input and output, of which the larger is the whole; one of many tensors where calls are coalesced.
            sides = [x if isinstance(x, list) else [x] for x in args if isinstance(x, list | torch.Tensor)]
            whole = max(sum(tensor.nbytes for tensor in side) for side in sides)
            self.bytes += SHARES[name] * (size - 1) / size * whole
        return func(*args, **(kwargs or {}))


def sent(rank: int, size: int, store: dist.Store, cases: list[tuple[str, str]]) -> list[tuple[int, float]]:
    """(pipeline stage, bytes sent in a step) of this rank by case."""
    found = []
    for model, layout in cases:
        options = ParallelConfig(**LAYOUTS[layout])
        world = parallel.start(options, rank, size, rank, dist.PrefixStore(f"{model} {layout}", store))
        config = EngineConfig(model=MODELS[model], diffusion=BLOCKS, parallel=options, optimization=TRAIN)
        engine = MegatronEngine(config, world)
        batches = [random_batch(MODELS[model], BLOCKS, 2, step) for step in range(4 // world.data_size)]
        with Sent() as counted:
            engine.train_step(batches, lr=1e-4)
        found.append((parallel_state.get_pipeline_model_parallel_rank(), counted.bytes))
        parallel.stop()
    return found


@pytest.fixture(scope="module")
def worlds() -> dict[tuple[str, str], list[tuple[int, float]]]:
    by_rank = run_world(2, sent, CASES)
    return {case: [found[n] for found in by_rank] for n, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_a_step_sends_what_is_counted(worlds, case):
    model, layout = case
    options = ParallelConfig(**LAYOUTS[layout])
    config = RunConfig(model=MODELS[model], diffusion=BLOCKS, parallel=options, train=TRAIN, log=LogConfig())
    data_size = 2 // (options.tensor * options.pipeline * options.context)
    prediction = Prediction(config, 2, data_size, DEVICES["h100-sxm"], 0.5, 8)
    for stage, measured in worlds[case]:
        counted = sum(traffic.sent for traffic in prediction.stages[stage].traffic)
        assert counted == pytest.approx(measured, rel=0.05)
