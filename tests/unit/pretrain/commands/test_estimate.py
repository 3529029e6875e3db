"""`bd3 estimate`: what it counts is what real models, steps and checkpoints have."""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bd3_common.errors import ConfigError
from bd3_megatron.backbones import BACKBONES
from bd3_megatron.config import (
    DiffusionConfig,
    EngineConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
    ZeroConfig,
)
from bd3_megatron.cost.activations import Counter
from bd3_megatron.cost.memory import checkpoint_bytes, state_bytes
from bd3_megatron.cost.partition import (
    gradient_buffer,
    padded_rows,
    parameter_count,
    parameter_shapes,
    stage_chunks,
)
from bd3_megatron.engine.megatron import MegatronEngine
from bd3_megatron.engine.stage import build_stage, named_parameters
from pretrain import cli
from pretrain.bench.memory import saved_for_backward
from pretrain.bench.models import random_batch
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.commands import estimate
from pretrain.config.resolve import presets, resolve
from pretrain.config.schema import RunConfig
from pretrain.estimate import cpu_peak as footprint
from pretrain.estimate import report
from pretrain.estimate.devices import DEVICES
from pretrain.estimate.prediction import Prediction, in_flight
from tests.unit import tiny

BLOCKS = DiffusionConfig(block_size=4)
ALONE = ParallelConfig()


def model(backbone: str = "qwen3", **changes) -> ModelConfig:
    grouped = {"kv_heads": 2} if BACKBONES.instance(backbone).grouped_queries else {}
    sizes = {"layers": 3, "hidden": 64, "heads": 4, "length": 128, "vocab_size": 500, "mask_id": 499}
    return ModelConfig(**{"backbone": backbone, **sizes, **grouped, "ffn_hidden": 192, **changes})


def shrunk(preset: str) -> ModelConfig:
    """A preset's model with the proportions that matter kept: backbone, grouping, tying."""
    config, _ = resolve(estimate.EstimateOptions, ["--preset", preset], "test")
    grouped = config.model.heads // config.model.groups
    return config.model.model_copy(
        update={"layers": 2, "hidden": 64, "heads": 2 * grouped, "kv_heads": 2, "head_dim": 16, "ffn_hidden": 96}
        | {"length": 32, "vocab_size": 101, "mask_id": 100}
    )


# ---- parameters ----


@pytest.mark.parametrize("preset", presets())
def test_the_shapes_are_those_of_the_model_that_is_built(world, preset):
    shape = shrunk(preset)
    built = build_stage(tiny.config(shape, BLOCKS), world.device)
    ((chunk,),) = stage_chunks(shape, ALONE)
    assert [(n, tuple(p.shape)) for n, p, _ in named_parameters(built)] == list(parameter_shapes(shape, chunk).items())
    assert parameter_count(shape, chunk) == shape.parameters(101)


@given(vocabulary=st.integers(2, 10_000), tensor=st.integers(1, 16))
def test_the_vocabulary_is_padded_to_the_next_multiple(vocabulary, tensor):
    rows = padded_rows(vocabulary, tensor)
    assert rows % tensor == 0
    assert vocabulary <= rows < vocabulary + tensor


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    ranks=st.integers(1, 6),
    bucket=st.none() | st.integers(1, 5000),
    sharded=st.booleans(),
)
def test_every_parameter_lies_in_the_buffer_once_and_is_owned_once(sizes, ranks, bucket, sharded):
    buffer = gradient_buffer({str(n): (size,) for n, size in enumerate(sizes)}, sharded, ranks, bucket)
    assert [end - start for start, end in buffer.places] == sizes[::-1]
    assert all(a[1] <= b[0] for a, b in zip(buffer.places, buffer.places[1:]))
    assert [0, *(end for _, end in buffer.buckets)] == [*(start for start, _ in buffer.buckets), buffer.elements]
    if sharded:
        assert sum(buffer.owned(ranks)) == sum(sizes)
        assert all((end - start) % ranks == 0 for start, end in buffer.buckets)
    else:
        assert buffer.elements == sum(sizes)


# ---- activations ----

MEASURED = {
    "qwen3": (model(), BLOCKS, "fp32", "none"),
    "qwen3 bf16": (model(), BLOCKS, "bf16", "none"),
    "one key head": (model(kv_heads=1), DiffusionConfig(block_size=64), "fp32", "none"),
    "draws": (model(), DiffusionConfig(block_size=16, draws=2), "fp32", "none"),
    "mdlm": (model(), DiffusionConfig(block_size=128), "fp32", "none"),
    "long": (model(length=1024, layers=2), DiffusionConfig(block_size=16), "fp32", "none"),
    "packed": (model(), BLOCKS, "fp32", "none"),
    "llama": (model("llama"), BLOCKS, "fp32", "none"),
    "llama bf16": (model("llama"), BLOCKS, "bf16", "none"),
    "dit": (model("dit", dropout=0.1), BLOCKS, "fp32", "none"),
    "dit bf16": (model("dit", dropout=0.1), BLOCKS, "bf16", "none"),
    "selective": (model(), BLOCKS, "fp32", "selective"),
    "selective bf16": (model(), BLOCKS, "bf16", "selective"),
    "dit selective": (model("dit"), BLOCKS, "fp32", "selective"),
    "full": (model(), BLOCKS, "fp32", "full"),
    "one layer": (model(layers=1), BLOCKS, "fp32", "full"),
    "dit full bf16": (model("dit", dropout=0.1), BLOCKS, "bf16", "full"),
}


@pytest.mark.parametrize("name", MEASURED)
def test_activations_are_those_that_autograd_keeps(world, name):
    shape, diffusion, precision, recompute = MEASURED[name]
    packed = name == "packed"
    layout = ParallelConfig(recompute=recompute)
    config = tiny.config(shape, diffusion, precision, parallel=layout)
    engine = MegatronEngine(config, world)
    batch = random_batch(shape, diffusion, 3, 0)
    if packed:  # one document, which hides no key
        batch = replace(batch, documents=torch.zeros(3, shape.length, dtype=torch.int64))
    with saved_for_backward(engine.module.parameters()) as saved:
        engine.train_step([batch], lr=1e-4)
    rate = (batch.weight != 0).float().mean().item()
    counter = Counter(config, 3, rate, packed=packed)
    ((chunk,),) = stage_chunks(shape, layout)
    assert counter.peak(chunk) == pytest.approx(saved.peak, rel=0.01)


class Alive(TorchDispatchMode):
    """The most bytes of tensors made inside that are alive at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in (x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [model(hidden=128), model("dit", hidden=128), model(vocab_size=9000, mask_id=8999)])
def test_an_evaluation_has_the_counted_tensors_alive(world, shape, precision):
    config = tiny.config(shape, BLOCKS, precision)
    engine = MegatronEngine(config, world, training=False)
    batch = random_batch(shape, BLOCKS, 16, 0)
    engine.forward([batch])  # masks and rotary embeddings stay
    with Alive() as alive:
        engine.forward([batch])
    rate = (batch.weight != 0).float().mean().item()
    counter = Counter(config, 16, rate)
    ((chunk,),) = stage_chunks(shape, ALONE)
    assert max(map(sum, counter.evaluating(chunk))) == pytest.approx(alive.peak, rel=0.1)


@pytest.mark.parametrize(
    ("layout", "stage", "micro_batches", "counts"),
    [
        ((1, 1), 0, 8, [1]),
        ((4, 1), 0, 8, [4]),
        ((4, 1), 3, 8, [1]),
        ((4, 1), 0, 2, [2]),
        ((2, 2), 0, 8, [3, 2]),  # Megatron takes 2 + 2 chunks ahead on the first of two stages, and one more
        ((2, 2), 1, 8, [2, 1]),
        ((2, 2), 0, 2, [2, 2]),
    ],
)
def test_micro_batches_in_flight(layout, stage, micro_batches, counts):
    assert in_flight(*layout, stage, micro_batches) == counts


# ---- checkpoints ----


@pytest.mark.parametrize("ema", [0.0, 0.99])
@pytest.mark.parametrize(
    "shape",
    [
        model(layers=1, vocab_size=61, mask_id=60, hidden=32, ffn_hidden=64),
        model("dit"),
        model(hidden=256, ffn_hidden=768, vocab_size=4000, mask_id=3999, tie_embeddings=True),
    ],
    ids=["tiny", "dit", "3.2M"],
)
def test_a_checkpoint_has_the_predicted_size(world, tmp_path, shape, ema):
    config = tiny.config(shape, BLOCKS, optimization=OptimizationConfig(precision="fp32", ema_decay=ema))
    engine = MegatronEngine(config, world)
    folder = save_checkpoint(tmp_path, engine, 1, {"tokens": 1, "data": "0" * 64}, keep=1)
    written = sum(file.stat().st_size for file in folder.iterdir())
    assert checkpoint_bytes(config, 1) == pytest.approx(written, rel=0.02)


# ---- the whole prediction ----


def predicted(*args: object) -> Prediction:
    config, options = resolve(estimate.EstimateOptions, [str(arg) for arg in args], "bd3 estimate")
    return estimate.predict(config, options)


SEVEN = ("--preset", "7b", "--model.vocab-size", 50258)


def test_layouts_change_memory_where_they_should():
    whole, sharded = (
        predicted(*SEVEN, "--world-size", 64),
        predicted(*SEVEN, "--world-size", 64, "--parallel.distributed-optimizer"),
    )
    assert whole.parameters == sharded.parameters == whole.model.parameters(50258)
    a, b = whole.heaviest.state, sharded.heaviest.state
    assert b.moments == pytest.approx(a.moments / 16, rel=0.01)
    assert b.masters == pytest.approx(a.masters / 16, rel=0.01)
    assert b.gradients == pytest.approx(a.gradients, rel=0.001)
    full = predicted(*SEVEN, "--world-size", 64, "--parallel.recompute", "full")
    assert full.heaviest.activations.total < whole.heaviest.activations.total / 10
    assert full.seconds["matrix products"] == pytest.approx(whole.seconds["matrix products"] * 4 / 3)


def test_stages_together_hold_the_model_and_its_work():
    one = predicted(*SEVEN, "--parallel.tensor", 1, "--parallel.no-sequence")
    four = predicted(*SEVEN, "--parallel.tensor", 1, "--parallel.no-sequence", "--parallel.pipeline", 4)
    assert sum(stage.parameters for stage in four.stages) == one.stages[0].parameters
    assert sum(stage.forward for stage in four.stages) == pytest.approx(one.stages[0].forward)
    assert [stage.in_flight for stage in four.stages] == [4, 3, 2, 1]
    assert four.seconds["pipeline bubble"] > 0 == one.seconds["pipeline bubble"]


def test_traffic_of_each_kind():
    """Against counts made by hand."""
    world = predicted(*SEVEN, "--world-size", 8)
    activation = 2 * 4096 * 4096 * 2  # two streams of L, h, bf16; the last layer and the head send less
    (tensor, data) = world.heaviest.traffic
    sums = 32 * (2 * 2 + 2 * 2 + 2) + 2 + 1  # per layer forward, backward, gathered again; embedding; head
    assert tensor.sent == pytest.approx(512 * 3 / 4 * activation * sums, rel=0.02)
    assert (tensor.span, data.span) == (4, 8)
    assert data.sent == world.heaviest.state.gradients  # 2 (r - 1) / r for two ranks
    assert data.hidden


def test_one_rank_sends_nothing():
    assert predicted("--preset", "125m", "--model.vocab-size", 50258).heaviest.traffic == []


def test_a_slower_link_or_device_takes_longer():
    fast, slow = (predicted(*SEVEN, "--world-size", 64, "--gpus-per-node", n) for n in (8, 2))
    assert slow.step_seconds > fast.step_seconds
    other = predicted(*SEVEN, "--world-size", 64, "--device", "a100-80gb")
    assert other.seconds["matrix products"] == pytest.approx(fast.seconds["matrix products"] * 989 / 312)
    assert other.utilization()["useful"] < other.efficiency


def test_the_table_of_devices_is_the_list_of_the_option():
    field = estimate.EstimateOptions.model_fields["device"]
    assert {*field.annotation.__args__} == {*DEVICES, "cpu"}


def test_zero_and_offload():
    def state(stage: int, **options):
        return state_bytes(EngineConfig(model=model(), zero=ZeroConfig(stage=stage, **options)), 4)[0]

    plain = state(0)
    assert state(1).moments == pytest.approx(plain.moments / 4, rel=0.01)
    assert state(2).gradients == pytest.approx(plain.gradients / 4, rel=0.01)
    assert state(2, offload=True).total == state(2).weights


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("device", ["h100-sxm", "cpu"])
def test_every_preset_has_a_prediction_in_finite_numbers(preset, device, monkeypatch):
    monkeypatch.setattr(estimate, "this_cpu", lambda: estimate.Device("CPU", 1e11, None, 1e11, 2e10, 1e10, 1e10, 1e10))
    found = predicted("--preset", preset, "--model.vocab-size", 50258, "--device", device)
    text = "\n".join(report.report_lines(found))
    assert f"{found.parameters:,}" in text
    assert ("peak of the process" in text) == (device == "cpu")
    values = json.loads(json.dumps(report.record(found), allow_nan=False))
    assert values["step_seconds"] == pytest.approx(sum(values["seconds"].values()))
    parts = values["stages"][0]["memory"]
    assert sum(parts.values()) == pytest.approx(values["stages"][0]["total_bytes"])


def test_what_is_not_counted_is_said():
    args = ("--preset", "125m", "--model.vocab-size", 50258)
    assert not any("not counted" in line for line in report.report_lines(predicted(*args)))
    for more in (["--data.document-mask"], ["--kernels.attention", "reference"]):
        assert sum("not counted" in line for line in report.report_lines(predicted(*args, *more))) == 1


# ---- the command ----


def test_the_command_asks_for_a_vocabulary(capsys):
    assert cli.main(["estimate", "--preset", "tiny-cpu"]) == 2
    assert capsys.readouterr().err.startswith("model.vocab_size=null: ")


def test_the_command_says_what_does_not_fit(capsys):
    args = [*map(str, SEVEN), "--parallel.tensor", "1", "--parallel.no-sequence"]
    assert cli.main(["estimate", *args]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert cli.main(["estimate", *args, "--world-size", "3"]) == 2
    assert capsys.readouterr().err.startswith("train.global_batch=1024: ")


def test_fp8_asks_for_a_device_that_has_it_and_is_said_not_to_count():
    args = ("--preset", "1b", "--model.vocab-size", 50258, "--fp8.enabled", "--kernels.layers", "te")
    lines = report.report_lines(predicted(*args))
    assert [line for line in lines if "not counted" in line] == [
        "  fp8.enabled=true: memory and time are those of bf16; FP8 copies and faster products are not counted"
    ]
    with pytest.raises(ConfigError, match=r"^fp8.enabled=true: --device=a100-80gb has no FP8; use .*h100-sxm"):
        predicted(*args, "--device", "a100-80gb")


def test_the_vocabulary_of_a_data_set(monkeypatch):
    class Manifest:
        vocab_size = 123

    monkeypatch.setattr(estimate, "load_manifest", lambda folder: Manifest if folder == "here" else None)
    config = RunConfig(data={"path": "here"})
    assert estimate.with_vocabulary(config).model.vocab_size == 123
    with pytest.raises(ConfigError, match="vocab-size"):
        estimate.with_vocabulary(RunConfig(data={"path": "s3://bucket/data"}))


def test_the_parts_of_a_process(monkeypatch):
    monkeypatch.setattr(estimate, "this_cpu", lambda: estimate.Device("CPU", 1e11, None, 1e11, 2e10, 1e10, 1e10, 1e10))
    args = ("--preset", "tiny-cpu", "--model.vocab-size", 1027, "--device", "cpu")
    parts = footprint.process_peak(predicted(*args))
    assert parts["state"] == 20 * predicted(*args).parameters  # weights, gradients, two moments, EMA in fp32
    assert parts["checkpoint copies"] == 16 * predicted(*args).parameters
    one_checkpoint = footprint.process_peak(predicted(*args, "--checkpoint.every", 0))
    assert sum(one_checkpoint.values()) < sum(parts.values())
    assert math.isfinite(sum(parts.values()))


def test_other_versions_are_measured(monkeypatch):
    monkeypatch.setattr(footprint, "_VERSIONS", {"torch": "0"})
    monkeypatch.setattr(footprint, "_measured_imports", lambda: 7e6)
    assert footprint.baseline_bytes() == 7e6 + footprint._RUNTIME
