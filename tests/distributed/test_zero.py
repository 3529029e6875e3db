"""ZeRO computes what one Megatron process computes, and both engines go on from each other's checkpoints."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.config import ConfigError, DiffusionConfig, ModelConfig, ParallelConfig, ZeroConfig, check_layout
from bd3_megatron.engine import ops
from pretrain import checkpoint
from pretrain.load import load_run_config
from tests.distributed.spawn import run_world
from tests.distributed.workers import MEGATRON, Outcome, resume, several, train

installed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
BUILT = importlib.util.find_spec("deepspeed") is not None and ops.built()

MODELS = {
    "qwen3": ModelConfig(layers=2, hidden=32, heads=4, kv_heads=2, length=16, vocab_size=61, mask_id=60),
    "tied": ModelConfig(layers=2, hidden=32, heads=4, length=16, vocab_size=61, mask_id=60, tie_embeddings=True),
    "dit": ModelConfig(backbone="dit", layers=2, hidden=32, heads=4, length=16, vocab_size=61, mask_id=60),
}
DIFFUSION = DiffusionConfig(block_size=4)
SINGLE, TP2, PP2 = ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(pipeline=2)
TP2_SP = ParallelConfig(tensor=2, sequence=True)
ZERO = {stage: ZeroConfig(stage=stage) for stage in (1, 2, 3)}
OFFLOAD = {stage: ZeroConfig(stage=stage, offload=True) for stage in (2, 3)}
# World size, layout, ZeRO, model.
CASES = {
    "DP1-ZeRO2": (1, SINGLE, ZERO[2], "qwen3"),
    "DP2-ZeRO1": (2, SINGLE, ZERO[1], "qwen3"),
    "DP2-ZeRO2": (2, SINGLE, ZERO[2], "qwen3"),
    "DP2-ZeRO3": (2, SINGLE, ZERO[3], "qwen3"),
    "DP2-ZeRO3-tied": (2, SINGLE, ZERO[3], "tied"),
    "DP2-ZeRO3-recompute": (2, ParallelConfig(recompute="full"), ZERO[3], "dit"),
    "PP2-ZeRO1": (2, PP2, ZERO[1], "dit"),
    "TP2xDP2-ZeRO1": (4, TP2, ZERO[1], "qwen3"),
    "TP2xDP2-ZeRO3": (4, TP2, ZERO[3], "qwen3"),
    "TP2+SPxDP2-ZeRO2": (4, TP2_SP, ZERO[2], "dit"),
    "PP2xDP2-ZeRO1": (4, PP2, ZERO[1], "qwen3"),
} | {f"DP2-ZeRO{stage}-offload": (2, SINGLE, zero, "qwen3") for stage, zero in OFFLOAD.items()}
BF16 = {f"bf16-DP2-ZeRO{stage}": (2, SINGLE, zero, "qwen3") for stage, zero in ZERO.items()}
BF16["bf16-DP2-ZeRO2-offload"] = (2, SINGLE, OFFLOAD[2], "qwen3")
# Below every norm that occurs, so that each step is clipped: then equal norms and equal clipped gradients mean equal
# gradients.
CLIP, STEPS, BF16_STEPS = 0.1, 10, 4
# Run folder -> who trains it to step 2, and who from there to step 4: (world size, layout, ZeRO).
HANDOVERS = {
    "Megatron-to-TP2xDP2-ZeRO3": ((1, SINGLE, MEGATRON), (4, TP2, ZERO[3])),
    "Megatron-to-PP2-ZeRO1": ((1, SINGLE, MEGATRON), (2, PP2, ZERO[1])),
    "TP2+SPxDP2-ZeRO2-to-DP2-ZeRO3": ((4, TP2_SP, ZERO[2]), (2, SINGLE, ZERO[3])),
    "PP2xDP2-ZeRO1-to-Megatron-DP2": ((4, PP2, ZERO[1]), (2, ParallelConfig(distributed_optimizer=True), MEGATRON)),
    "DP2-ZeRO3-to-Megatron-TP2": ((2, SINGLE, ZERO[3]), (2, TP2, MEGATRON)),
    "Megatron-to-DP2-ZeRO2-offload": ((1, SINGLE, MEGATRON), (2, SINGLE, OFFLOAD[2])),
}


def possible(cases: dict) -> dict:
    """Those that need no compiled operation, or all where it is built."""
    return {name: case for name, case in cases.items() if BUILT or not case[2].offload}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """What every rank of every case found; each world's processes start once."""
    runs = tmp_path_factory.mktemp("runs")
    fp32, bf16 = {"clip_norm": CLIP}, {"clip_norm": CLIP, "precision": "bf16"}
    baseline = [(name, model, DIFFUSION, SINGLE) for name, model in MODELS.items()]
    calls: dict[int, list] = {size: [] for size in (1, 4, 2)}  # in the order in which worlds hand over checkpoints
    calls[1] = [
        ("single", train, (baseline, STEPS, fp32)),
        ("bf16-single", train, (baseline[:1], BF16_STEPS, bf16)),
        ("whole", resume, (runs / "whole", MODELS["qwen3"], DIFFUSION, SINGLE, 4, MEGATRON)),
    ]
    for size, listed in calls.items():
        for cases, steps, changes in ((CASES, STEPS, fp32), (BF16, BF16_STEPS, bf16)):
            for name, (ranks, layout, zero, model) in possible(cases).items():
                if ranks == size:
                    listed.append((name, train, ([(name, MODELS[model], DIFFUSION, layout, zero)], steps, changes)))
        for name, parts in HANDOVERS.items():
            for until, (ranks, layout, zero) in zip((2, 4), parts):
                if ranks == size and (BUILT or not zero.offload):
                    listed.append((name, resume, (runs / name, MODELS["qwen3"], DIFFUSION, layout, until, zero)))
    results: dict[str, Any] = {"runs": runs}
    for size, listed in calls.items():
        by_rank = run_world(size, several, [(function, args) for _, function, args in listed])
        for number, (name, *_) in enumerate(listed):
            results[name] = [rank[number] for rank in by_rank]
    return results


def outcomes(found: dict[str, Any], name: str) -> list[Outcome]:
    """Of a case on every rank."""
    return [outcome for (outcome,) in found[name]]


def case(name: str) -> Any:
    needs = pytest.mark.skipif("offload" in name and not BUILT, reason=f"not built; run {ops.COMMAND}")
    return pytest.param(name, marks=needs)


@installed
@pytest.mark.parametrize("name", map(case, CASES))
def test_zero_equals_one_process(found, name):
    model = CASES[name][3]
    expected: Outcome = found["single"][0][list(MODELS).index(model)]
    assert min(expected.norms) > CLIP
    # DeepSpeed's Adam has 1 - beta2 in fp32, where it is off by 1.3e-5.
    close = 1e-4 if "offload" in name else 1e-5
    for outcome in outcomes(found, name):
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
        assert outcome.norms == pytest.approx(expected.norms, rel=1e-5)
        for ours, theirs in ((outcome.gradients, expected.gradients), (outcome.state, expected.state)):
            assert ours.keys() == theirs.keys()
            for key, tensor in theirs.items():
                difference = (ours[key] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-12)
                assert difference < close, key


@installed
@pytest.mark.parametrize("name", map(case, CASES))
def test_evaluation_with_the_sharded_average_equals_one_process(found, name):
    expected: Outcome = found["single"][0][list(MODELS).index(CASES[name][3])]
    parts = {tuple(outcome.nll.flatten().tolist()): outcome.nll for outcome in outcomes(found, name)}
    torch.testing.assert_close(torch.cat(list(parts.values())), expected.nll, rtol=1e-5, atol=1e-5)


@installed
@pytest.mark.parametrize("name", map(case, BF16))
def test_bf16_follows_the_megatron_engine(found, name):
    ((expected,),) = found["bf16-single"]
    for outcome in outcomes(found, name):
        assert outcome.losses == pytest.approx(expected.losses, rel=0.003)
        assert outcome.norms == pytest.approx(expected.norms, rel=0.01)
        assert all(tensor.dtype == torch.float32 for tensor in outcome.state.values())


@installed
@pytest.mark.parametrize("name", map(case, HANDOVERS))
def test_a_checkpoint_goes_on_in_another_engine(found, name):
    (losses,) = found["whole"]
    for by_rank in found[name]:
        assert by_rank == pytest.approx(losses[2:], rel=1e-5)
    ours, expected = (checkpoint.read_weights(checkpoint.find(found["runs"] / run)) for run in (name, "whole"))
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("parallel", "zero", "model", "words"),
    [
        (PP2, ZERO[2], "qwen3", ["zero.stage=2", "parallel.pipeline=2", "zero.stage=1"]),
        (PP2, ZERO[3], "qwen3", ["zero.stage=3", "parallel.pipeline=2", "zero.stage=1"]),
        (PP2, ZERO[1], "tied", ["zero.stage=1", "model.tie_embeddings=true", "distributed_optimizer"]),
        (ParallelConfig(context=2), ZERO[1], "qwen3", ["zero.stage=1", "parallel.context=2"]),
        (ParallelConfig(pipeline=2, interleave=2), ZERO[1], "qwen3", ["zero.stage=1", "parallel.interleave=2"]),
        (ParallelConfig(distributed_optimizer=True), ZERO[2], "qwen3", ["zero.stage=2", "distributed_optimizer"]),
        (SINGLE, ZeroConfig(stage=1, offload=True), "qwen3", ["zero.offload=true", "zero.stage=2 or 3"]),
        (SINGLE, ZeroConfig(offload=True), "qwen3", ["zero.offload=true", "zero.stage=2 or 3"]),
    ],
)
def test_what_does_not_work_is_refused_in_one_line(parallel, zero, model, words):
    model = MODELS[model].model_copy(update={"layers": 4})
    with pytest.raises(ConfigError) as refusal:
        check_layout(model, DIFFUSION, parallel, 4, zero)
    line = str(refusal.value)
    assert "\n" not in line
    assert all(word in line for word in words), line


def test_a_missing_deepspeed_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"^zero\.stage=2: DeepSpeed is not installed; run pip install .*$"):
        ops.import_deepspeed("zero.stage=2")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_stage_can_be_given_on_the_command_line(stage):
    assert load_run_config(["--zero.stage", str(stage)]).zero.stage == stage


@installed
def test_offloading_does_not_build_while_training(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"^zero\.offload=true: .* is not built .*; run {ops.COMMAND}$"):
        ops.load()


@installed
def test_building_without_a_compiler_fails_in_one_line(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"^no-such-compiler: not found; install a C\+\+ compiler"):
        ops.build()


@installed
def test_the_lock_of_a_killed_build_is_removed(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)  # anything that exists
    lock = tmp_path / ops.OP / "lock"
    lock.parent.mkdir()
    lock.touch()
    ops.import_deepspeed("zero.offload=true")
    from deepspeed.ops.op_builder import CPUAdamBuilder

    locked = []
    monkeypatch.setattr(CPUAdamBuilder, "jit_load", lambda *_, **__: locked.append(lock.exists()))
    assert not ops.built()
    ops.build()
    assert ops.built()
    ops.build()
    assert locked == [False]  # built once, without waiting for the lock
