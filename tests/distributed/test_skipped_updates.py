"""A loss that is not finite on one rank: no rank updates anything, and training goes on as on one process."""

from __future__ import annotations

import functools
import importlib.util
import math

import pytest
import torch

from bd3_megatron.config import DiffusionConfig, ModelConfig, ParallelConfig, ZeroConfig
from bd3_megatron.engine import ops
from pretrain.bench import parity
from pretrain.bench.parity import LAYOUTS, Layout, Task
from pretrain.distributed.spawn import run_world
from tests.distributed.selection import collected, with_long
from tests.distributed.workers import Skipping, train_spoiled

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
BUILT = DEEPSPEED and ops.built()
SPOILED, STEPS = 1, 4
MODEL = ModelConfig(layers=4, hidden=32, heads=4, kv_heads=2, length=16, vocab_size=61, mask_id=60)
# Large enough that stage 3 really partitions its matrices.
WIDE = ModelConfig(layers=2, hidden=320, heads=4, length=16, vocab_size=401, mask_id=400)
TASKS = {
    "fp32": Task(MODEL, DiffusionConfig(block_size=4), steps=STEPS),
    "bf16": Task(MODEL, DiffusionConfig(block_size=4), steps=STEPS, precision="bf16"),
    "wide": Task(WIDE, DiffusionConfig(block_size=4), steps=STEPS),
}
MORE = LAYOUTS | {
    "DP1-ZeRO2": Layout(1, ParallelConfig(), ZeroConfig(stage=2)),
    "PP2-ZeRO1": Layout(2, ParallelConfig(pipeline=2), ZeroConfig(stage=1)),
    "ZeRO2-offload": Layout(2, ParallelConfig(), ZeroConfig(stage=2, offload=True)),
    "ZeRO3-offload": Layout(2, ParallelConfig(), ZeroConfig(stage=3, offload=True)),
}
CASES = [
    *(("fp32", name) for name in ("TP2", "PP2", "PP2-interleaved", "CP2", "DP2", "DP2+distopt")),
    *(("fp32", name) for name in ("ZeRO1", "ZeRO2", "ZeRO3", "DP1-ZeRO2", "PP2-ZeRO1")),
    *(("fp32", name) for name in ("ZeRO2-offload", "ZeRO3-offload", "TP2xDP2+distopt", "TP2xZeRO3")),
    *(("bf16", name) for name in ("DP2+distopt", "TP2", "ZeRO1", "ZeRO2", "ZeRO3", "ZeRO2-offload", "ZeRO3-offload")),
    ("wide", "ZeRO3"),
]

LONG = [
    *(("fp32", name) for name in ("TP2", "DP2", "ZeRO1", "ZeRO2", "DP1-ZeRO2", "PP2-ZeRO1", "TP2xZeRO3")),
    *(("bf16", name) for name in ("TP2", "ZeRO1", "ZeRO3", "ZeRO2-offload")),
]


def possible(layout: str) -> bool:
    zero = MORE[layout].zero
    return zero.stage == 0 or (BUILT if zero.offload else DEEPSPEED)


@pytest.fixture(scope="module")
def outcomes(request) -> dict[tuple[str, str], list[Skipping]]:
    """By (task, layout), of every rank; layout "" is one process of the Megatron engine."""
    runs = {
        (task, name): (MORE[name], TASKS[task])
        for task, name in sorted(collected(request, "task", "layout"))
        if name and possible(name)
    }
    runs |= {(task, ""): (Layout(1, ParallelConfig()), TASKS[task]) for task in TASKS}
    found = {}
    for size in sorted({layout.size for layout, _ in runs.values()}):
        keys = [key for key, (layout, _) in runs.items() if layout.size == size]
        named = [(" ".join(key), *runs[key]) for key in keys]
        by_rank = run_world(size, functools.partial(train_spoiled, spoiled=SPOILED), named)
        found |= {key: [outcomes[number] for outcomes in by_rank] for number, key in enumerate(keys)}
    return found


@pytest.mark.parametrize(("task", "layout"), [*with_long(CASES, LONG), *((task, "") for task in TASKS)])
def test_all_ranks_leave_the_update_out_and_nothing_changes(outcomes, task, layout):
    if layout and not possible(layout):
        pytest.skip("DeepSpeed, or its optimizer for the CPU, is not there")
    ranks = outcomes[task, layout]
    for outcome in ranks:
        assert [result.applied for result in outcome.results] == [step != SPOILED for step in range(STEPS)]
        assert not math.isfinite(outcome.results[SPOILED].loss)
        assert not math.isfinite(outcome.results[SPOILED].grad_norm)
        assert outcome.unchanged
        assert outcome.updates == STEPS - 1
    world = MORE[layout].parallel if layout else ParallelConfig()
    micro = TASKS[task].global_batch // TASKS[task].micro_batch
    replicas = len(ranks) // (world.tensor * world.pipeline * world.context)
    found = {outcome.results[SPOILED].nonfinite_batches for outcome in ranks} - {()}
    assert found == {(micro // replicas - 1,)}


@pytest.mark.parametrize(("task", "layout"), with_long(CASES, LONG))
def test_training_goes_on_as_on_one_process(outcomes, task, layout):
    if not possible(layout):
        pytest.skip("DeepSpeed, or its optimizer for the CPU, is not there")
    ranks, (alone,) = outcomes[task, layout], outcomes[task, ""]
    good = [step for step in range(STEPS) if step != SPOILED]
    loss, norm = (0.003, 0.01) if task == "bf16" else (1e-5, 1e-4)
    for outcome in ranks:
        for step in good:
            assert outcome.results[step].loss == pytest.approx(alone.results[step].loss, rel=loss)
            assert outcome.results[step].grad_norm == pytest.approx(alone.results[step].grad_norm, rel=norm)
    if task == "bf16":
        return
    state, expected = parity.whole(outcome.state for outcome in ranks), parity.whole([alone.state])
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
