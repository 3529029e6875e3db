"""Transformer Engine layers against Megatron's own: the same function, the same names, the same checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bd3_common.errors import ConfigError
from bd3_megatron.config import (
    DiffusionConfig,
    Fp8Config,
    KernelConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
)
from bd3_megatron.engine import build_engine
from bd3_megatron.engine.megatron import MegatronEngine
from bd3_megatron.hf.mapping import entries
from bd3_megatron.layers import specs as layers
from bd3_megatron.layers import transformer_engine as te
from bd3_megatron.model import BlockDiffusionModel, global_name, initialize
from pretrain.checkpoint.reader import find_checkpoint, read_weights, restore
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.config.resolve import save_config
from pretrain.config.schema import RunConfig
from pretrain.run_folder import layout
from pretrain.trainer.resume import check_same_run
from tests.unit import fake_te, tiny
from tests.unit.fake_te import Column

LOCAL, TE = KernelConfig(layers="local"), KernelConfig(layers="te")
DIFFUSION = DiffusionConfig(block_size=4)
SWITCHES = [name for name, field in KernelConfig.model_fields.items() if field.default is True]
DELAYED = Fp8Config(enabled=True, recipe="delayed", amax_history=3)


@pytest.fixture(autouse=True)
def _installed(world):
    with fake_te.installed():
        yield


def by_name(model: BlockDiffusionModel) -> dict[str, torch.Tensor]:
    return {global_name(name, model): parameter for name, parameter in model.named_parameters()}


def build(model: ModelConfig, kernels: KernelConfig, diffusion: DiffusionConfig = DIFFUSION) -> BlockDiffusionModel:
    return tiny.build(model, diffusion, tiny.weights_of(model), kernels)


def loss_and_gradients(network: BlockDiffusionModel, batch) -> tuple[float, dict[str, torch.Tensor]]:
    loss = network(batch, total=True)
    loss.backward()
    return loss.item(), {name: x.grad for name, x in by_name(network).items()}


def engine(world, kernels: KernelConfig, fp8: Fp8Config | None = None, backbone: str = "qwen3", **options):
    optimization = OptimizationConfig(**{"precision": "bf16" if fp8 else "fp32", "ema_decay": 0.5, **options})
    config = tiny.config(
        tiny.shape(backbone), DIFFUSION, kernels=kernels, fp8=fp8 or Fp8Config(), optimization=optimization
    )
    made = MegatronEngine(config, world, seed=1)
    made.set_weights(tiny.weights_of(tiny.shape(backbone)))
    return made


def train(engine, first: int, last: int) -> list[float]:
    model = tiny.shape()
    return [
        engine.train_step([tiny.batch_of(model, DIFFUSION, 2, seed) for seed in (step, 100 + step)], 1e-2).loss
        for step in range(first, last + 1)
    ]


# ---- the same model ----


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_parameters_have_the_names_shapes_and_tags_of_the_local_layers(backbone):
    model = tiny.shape(backbone)
    made = build(model, TE)
    assert any(isinstance(module, Column) for module in made.modules())
    found, expected = by_name(made), by_name(build(model, LOCAL))
    assert set(found) == set(expected) == {entry.name for entry in entries(model)}
    for name, parameter in expected.items():
        for tag in ("shape", "dtype", "tensor_model_parallel", "partition_dim", "partition_stride"):
            assert getattr(found[name], tag, None) == getattr(parameter, tag, None), (name, tag)
        assert getattr(found[name], "sequence_parallel", False) == getattr(parameter, "sequence_parallel", False)


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_initial_weights_are_the_same(backbone):
    first, second = (
        BlockDiffusionModel(tiny.config(tiny.shape(backbone), DIFFUSION, kernels=kernels)) for kernels in (LOCAL, TE)
    )
    for made in (first, second):
        for parameter in made.parameters():
            parameter.data.fill_(7.0)
        initialize(made, seed=3)
    expected = by_name(first)
    for name, parameter in by_name(second).items():
        assert torch.equal(parameter, expected[name]), name
        if "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all()


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
@pytest.mark.parametrize("draws", [0, 1, 2])
@pytest.mark.parametrize("saving", [True, False])
def test_loss_and_gradients_equal_those_of_the_local_layers(backbone, draws, saving):
    model = tiny.shape(backbone)
    diffusion = (
        DiffusionConfig(block_size=4, draws=draws) if draws else DiffusionConfig(objective="causal", block_size=1)
    )
    batch = tiny.batch_of(model, diffusion, 2)
    results = []
    for kernels in (LOCAL, TE):
        kernels = kernels.model_copy(update={"skip_last_clean_queries": saving})
        results.append(loss_and_gradients(build(model, kernels, diffusion), batch))
    (loss, gradients), (found_loss, found) = results
    assert found_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


def test_the_last_layer_runs_its_mlp_on_noisy_tokens_only():
    model = tiny.shape()
    network, seen = build(model, TE), []
    for layer in network.decoder.layers:
        layer.self_attention.linear_qkv.register_forward_hook(lambda _, x, y: seen.append(("qkv", len(x[0]))))
        layer.self_attention.linear_proj.register_forward_hook(lambda _, x, y: seen.append(("proj", len(x[0]))))
        layer.mlp.linear_fc1.register_forward_hook(lambda _, x, y: seen.append(("fc1", len(x[0]))))
    network(tiny.batch_of(model, DIFFUSION, 2), total=True)
    whole = network.streams.tokens
    assert whole == 16 + 12
    assert seen == [("qkv", whole), ("proj", whole), ("fc1", whole), ("qkv", whole), ("proj", 16), ("fc1", 16)]


def test_a_block_is_sampled_from_the_same_logits():
    from bd3_megatron.attention.core import BlockCache

    model = tiny.shape()
    ids = torch.from_numpy(tiny.rows_of(model, 2)[:, :4])
    logits = []
    for kernels in (LOCAL, TE):
        network = build(model, kernels).eval()
        for layer in network.decoder.layers:
            layer.self_attention.core_attention.cache = BlockCache()
        with torch.no_grad():
            logits.append(network.logits(network.block_states(ids, 0)))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


# ---- checkpoints ----


@pytest.mark.parametrize(("before", "after"), [(LOCAL, TE), (TE, LOCAL)])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_a_run_may_change_its_layers_at_a_checkpoint(world, tmp_path, backbone, before, after):
    first = engine(world, before, backbone=backbone)
    train(first, 1, 2)
    save_checkpoint(tmp_path, first, 2, {}, keep=1)
    second = engine(world, after, backbone=backbone)
    restore(find_checkpoint(tmp_path), second)
    expected = tiny.state(first)
    found = tiny.state(second)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert train(second, 3, 4) == pytest.approx(train(first, 3, 4), rel=1e-6)
    weights = read_weights(find_checkpoint(tmp_path))
    assert set(weights) == {entry.name for entry in entries(tiny.shape(backbone))}


def ours(caplog) -> list[str]:
    """Messages of the project; torch's checkpoint logs too."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("pretrain.")]


def test_delayed_scaling_resumes_exactly(world, tmp_path, caplog):
    first = engine(world, TE, DELAYED)
    train(first, 1, 3)
    scales = {name: x.clone() for name, x in tiny.state(first).items() if name.startswith("fp8/")}
    assert len(scales) == 2 * 4 * 4
    name = "fp8/decoder.layers.1.mlp.linear_fc2/forward/"
    assert scales[f"{name}scale"].shape == (3,)
    assert scales[f"{name}scale"][0] != 1
    assert scales[f"{name}amax_history"].shape == (3, 3)
    save_checkpoint(tmp_path, first, 3, {}, keep=1)
    went_on = train(first, 4, 5)

    again = engine(world, TE, DELAYED)
    caplog.set_level("INFO", "pretrain")
    restore(find_checkpoint(tmp_path), again)
    assert not ours(caplog)
    assert all(torch.equal(tiny.state(again)[name], x) for name, x in scales.items())
    assert train(again, 4, 5) == went_on
    assert all(torch.equal(tiny.state(again)[name], x) for name, x in tiny.state(first).items())

    lost = engine(world, TE, DELAYED)  # the state matters: without it the run goes another way
    restore(find_checkpoint(tmp_path), lost)
    for x in lost.fp8.tensors.values():
        x.fill_(1)
    assert train(lost, 4, 5) != went_on


@pytest.mark.parametrize("before", [None, DELAYED.model_copy(update={"amax_history": 5})])
def test_scales_that_a_checkpoint_lacks_start_anew_with_a_message(world, tmp_path, before, caplog):
    first = engine(world, TE, before, precision="bf16")
    train(first, 1, 1)
    save_checkpoint(tmp_path, first, 1, {}, keep=1)
    second = engine(world, TE, DELAYED)
    caplog.set_level("INFO", "pretrain")
    restore(find_checkpoint(tmp_path), second)
    assert ours(caplog) == [
        f"{tmp_path}/checkpoints/step-00000001: has no FP8 scales of this recipe and history; they start anew"
    ]
    assert all((x == name.endswith("scale")).all() for name, x in second.fp8.tensors.items())
    assert torch.equal(tiny.state(second)["exp_avg/final_norm.weight"], tiny.state(first)["exp_avg/final_norm.weight"])


def test_a_run_without_delayed_scaling_takes_no_scales(world, tmp_path):
    first = engine(world, TE, DELAYED)
    train(first, 1, 1)
    save_checkpoint(tmp_path, first, 1, {}, keep=1)
    for fp8 in (None, Fp8Config(enabled=True)):
        second = engine(world, TE, fp8, precision="bf16")
        assert {name.partition("/")[0] for name in tiny.state(second)} == {"weights", "exp_avg", "exp_avg_sq", "ema"}
        restore(find_checkpoint(tmp_path), second)
    assert not any("fp8" in name for name in read_weights(find_checkpoint(tmp_path)))


def test_an_evaluation_leaves_the_scales_as_they_were(world):
    made = engine(world, TE, DELAYED)
    train(made, 1, 1)
    before = {name: x.clone() for name, x in made.fp8.tensors.items()}
    with made.averaged():
        made.forward([tiny.batch_of(tiny.shape(), DIFFUSION, 2, seed=9)])
    assert all(torch.equal(x, before[name]) for name, x in made.fp8.tensors.items())


def test_weights_are_cast_once_in_every_step_and_in_every_evaluation(world):
    made = engine(world, TE, DELAYED)
    columns = [module for module in made.module.modules() if isinstance(module, Column)]
    train(made, 1, 1)  # two micro-batches
    assert {module.casts for module in columns} == {1}
    with made.averaged():
        made.forward([tiny.batch_of(tiny.shape(), DIFFUSION, 2, seed) for seed in (1, 2)])
    assert {module.casts for module in columns} == {2}
    train(made, 2, 2)
    assert {module.casts for module in columns} == {3}


def test_a_run_may_go_on_with_other_kernels_and_another_recipe(tmp_path):
    """A run that began with kernels of a GPU goes on where they are refused."""
    run = RunConfig(kernels=KernelConfig(attention="flash"))
    save_config(run, tmp_path / layout.CONFIG)
    others = [KernelConfig(attention="chunked"), *(KernelConfig(**{name: False}) for name in SWITCHES)]
    for kernels, fp8 in ((TE, DELAYED), *((kernels, Fp8Config()) for kernels in others)):
        check_same_run(tmp_path, run.model_copy(update={"kernels": kernels, "fp8": fp8}))
    other = run.model_copy(update={"diffusion": DIFFUSION.model_copy(update={"block_size": 2})})
    with pytest.raises(ConfigError, match=r"^diffusion.block_size=2: the run in"):
        check_same_run(tmp_path, other)


# ---- what Megatron is told ----


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, {"fp8": None}),
        ({"enabled": True}, {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": False}),
        ({"enabled": True, "recipe": "block"}, {"fp8": "e4m3", "fp8_recipe": "blockwise"}),
        ({"enabled": True, "recipe": "block", "format": "hybrid"}, {"fp8": "hybrid", "fp8_recipe": "blockwise"}),
        (
            {"enabled": True, "recipe": "delayed", "amax_history": 16, "margin": 1},
            {
                "fp8": "hybrid",
                "fp8_recipe": "delayed",
                "fp8_amax_history_len": 16,
                "fp8_margin": 1,
                "fp8_amax_compute_algo": "max",
            },
        ),
        (
            {"enabled": True, "first_last_bf16": 2},
            {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 2},
        ),
    ],
)
def test_megatron_is_told_the_recipe(section, expected):
    model = tiny.shape(layers=6)
    made = layers.transformer_config(tiny.config(model, DIFFUSION, "bf16", kernels=TE, fp8=Fp8Config(**section)))
    assert {name: getattr(made, name) for name in expected} == expected
    assert made.fp8_param is False


def test_streams_have_tokens_that_fit():
    from bd3_megatron.model import streams_of

    model = ModelConfig(layers=2, hidden=64, heads=4, length=256, vocab_size=41, mask_id=40)
    fp8 = Fp8Config(enabled=True)
    for size in (1, 4, 16, 32, 256):
        diffusion = DiffusionConfig(block_size=size)
        for parallel in (ParallelConfig(), ParallelConfig(tensor=2, sequence=True), ParallelConfig(context=2)):
            config = tiny.config(model, diffusion, parallel=parallel)
            streams = streams_of(config.replace(fp8=fp8))
            shared = 2 if parallel.sequence else 1
            held = streams.length // parallel.context
            clean = min(streams.clean, held)
            assert (held + clean) % (16 * shared) == held % (16 * shared) == 0
            assert streams.clean >= streams_of(config).clean
    for size, clean in ((4, 256), (32, 224)):
        assert streams_of(tiny.config(model, DiffusionConfig(block_size=size), fp8=fp8)).clean == clean


# ---- fusions ----


@pytest.fixture
def fused(monkeypatch):
    """Megatron's fused functions, as they are written: compiling them is the compiler's affair."""
    on = {"bias_activation_fusion": True, "bias_dropout_fusion": True}
    off = {"apply_rope_fusion": False, "gradient_accumulation_fusion": False}
    monkeypatch.setattr(layers, "fusions", lambda kernels, main_grads: on | off)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_fused_functions_are_the_same_functions(backbone, fused, monkeypatch):
    model = tiny.shape(backbone)
    batch = tiny.batch_of(model, DIFFUSION, 2)
    network = build(model, LOCAL)
    assert network.config.bias_activation_fusion
    assert network.config.activation_func is (F.gelu if backbone == "dit" else F.silu)
    loss, gradients = loss_and_gradients(network, batch)
    monkeypatch.undo()
    plain = build(model, LOCAL)
    assert not plain.config.bias_activation_fusion
    plain_loss, expected = loss_and_gradients(plain, batch)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    for name, gradient in expected.items():
        atol = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=atol, msg=name)


def test_nothing_is_fused_without_cuda_or_when_switched_off(monkeypatch):
    assert not any(layers.fusions(KernelConfig(), main_grads=True).values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not any(layers.fusions(KernelConfig(fusions=False), main_grads=True).values())
    assert all(layers.fusions(TE, main_grads=True).values())
    assert not layers.fusions(TE, main_grads=False)["gradient_accumulation_fusion"]
    assert not layers.fusions(LOCAL, main_grads=True)["gradient_accumulation_fusion"]
    monkeypatch.setattr(te, "missing", lambda: "not installed")
    assert not layers.fusions(LOCAL, main_grads=True)["apply_rope_fusion"]


def test_the_engine_hands_the_section_on(world):
    made = build_engine(tiny.config(tiny.shape(), DIFFUSION, "bf16", kernels=TE, fp8=DELAYED), world)
    assert made.module.config.fp8 == "hybrid"
    assert len(made.fp8.tensors) == 32
