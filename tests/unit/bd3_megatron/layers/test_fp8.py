"""FP8 and Transformer Engine: one line where they are not there."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear

from bd3_common.errors import ConfigError
from bd3_megatron.config import EngineConfig, Fp8Config, KernelConfig
from bd3_megatron.layers import transformer_engine as te
from bd3_megatron.layers.fp8 import check_fp8
from pretrain.checkpoint.loaded_run import LoadedRun
from pretrain.config.resolve import load_run_config, presets
from pretrain.config.schema import RunConfig
from tests.unit import tiny

MODEL = {"layers": 4, "hidden": 256, "heads": 4, "kv_heads": 2, "ffn_hidden": 768, "length": 256}


def check(fp8=None, model=None, layers="auto", parallel=None, stage=0, precision="bf16") -> None:
    check_fp8(
        EngineConfig(
            fp8={"enabled": True, **(fp8 or {})},
            model={**MODEL, **(model or {})},
            kernels={"layers": layers},
            parallel=parallel or {},
            zero={"stage": stage},
            optimization={"precision": precision},
        )
    )


REFUSED = [
    ({"layers": "local"}, "kernels.layers=local has no FP8; use kernels.layers=te or auto"),
    ({"precision": "fp32"}, "fp8.enabled=true: weights of train.precision=fp32; use train.precision=bf16"),
    ({"stage": 3}, "zero.stage=3"),
    ({"fp8": {"recipe": "delayed", "first_last_bf16": 1}}, "fp8.first_last_bf16=1: delayed"),
    ({"fp8": {"first_last_bf16": 2}}, "fp8.first_last_bf16=2: too many for model.layers=4"),
    ({"model": {"hidden": 260, "head_dim": 64}}, "model.hidden=260 makes 260 rows or columns, not a multiple of 16"),
    ({"model": {"heads": 2, "head_dim": 12}}, "model.heads=2 of 12"),
    ({"model": {"heads": 4, "kv_heads": 1, "head_dim": 4}}, "model.kv_heads=1 of 4"),
    ({"model": {"ffn_hidden": 776}}, "model.ffn_hidden=776"),
    (
        {"model": {"ffn_hidden": 784}, "parallel": {"tensor": 2}},
        "makes 392 rows or columns on each of parallel.tensor=2",
    ),
    (
        {"model": {"length": 24}},
        "model.length=24 is not a multiple of 16 (fp8.recipe=current, parallel.context=1); use 16",
    ),
    ({"model": {"length": 80}, "parallel": {"context": 2}}, "model.length=80 is not a multiple of 32"),
    ({"model": {"length": 48}, "parallel": {"tensor": 2, "sequence": True}}, "model.length=48 is not a multiple of 32"),
    ({"fp8": {"recipe": "block"}, "model": {"length": 192}}, "model.length=192 is not a multiple of 128"),
    ({"fp8": {"recipe": "block"}, "model": {"hidden": 192, "head_dim": 64}}, "model.hidden=192"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_fp8_cannot_compute_is_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError) as error:
        check(**changes)
    text = str(error.value)
    assert message in text
    assert "\n" not in text
    assert "use " in text
    assert text.startswith("fp8.")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": "te"},
        {"fp8": {"recipe": "block"}},
        {"fp8": {"recipe": "delayed"}},
        {"fp8": {"first_last_bf16": 1}},
        {"stage": 2},
        {"parallel": {"tensor": 2, "sequence": True, "context": 2}},
    ],
)
def test_what_fits_is_taken(changes):
    check(**changes)


def test_without_fp8_nothing_is_asked():
    check({"enabled": False}, {"length": 24}, layers="local", precision="fp32")


@pytest.mark.parametrize("name", [name for name in presets() if name != "tiny-cpu"])
@pytest.mark.parametrize("recipe", ["current", "delayed", "block"])
def test_the_large_presets_fit(name, recipe):
    config = load_run_config(["--preset", name, "--fp8.enabled", "--fp8.recipe", recipe])
    assert config.fp8 == Fp8Config(enabled=True, recipe=recipe)


def test_a_command_line_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match=r"^fp8.enabled=true: weights of train.precision=fp32"):
        load_run_config(["--preset", "tiny-cpu", "--train.precision", "fp32", "--fp8.enabled"])


# ---- the machine ----


def test_auto_takes_the_local_layers_without_cuda():
    assert te.missing() == "no CUDA device here"
    assert not te.chosen(KernelConfig())
    te.check(KernelConfig(), Fp8Config())
    with pytest.raises(ConfigError) as error:
        te.check(KernelConfig(layers="te"), Fp8Config())
    assert str(error.value) == ("kernels.layers=te: needs Transformer Engine (no CUDA device here); use local or auto")


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of our choice and Transformer Engine."""

    def make(capability=(9, 0), cuda="13.0"):
        monkeypatch.setattr(te, "missing", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return make


def test_a_package_that_is_absent_or_does_not_load_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(te, "find_spec", lambda name: None)
    assert te.missing() == "not installed: pip install 'bd3-megatron[gpu]'"
    with pytest.raises(
        ConfigError, match=r"^fp8.enabled=true: needs Transformer Engine \(not installed: .*\[gpu\]'\); use fp8"
    ):
        te.check(KernelConfig(), Fp8Config(enabled=True))
    monkeypatch.setattr(te, "find_spec", lambda name: object())
    monkeypatch.setitem(__import__("sys").modules, "transformer_engine", None)
    assert te.missing().startswith("does not load: ")


def test_an_old_gpu_or_cuda_is_refused(gpu):
    gpu(capability=(8, 0))
    te.check(KernelConfig(layers="te"), Fp8Config())
    with pytest.raises(ConfigError, match=r"^fp8.enabled=true: a GPU has compute capability 8.0, below 9.0"):
        te.check(KernelConfig(), Fp8Config(enabled=True))
    gpu(cuda="12.8")
    te.check(KernelConfig(), Fp8Config(enabled=True))
    with pytest.raises(ConfigError, match=r"^fp8.recipe=block: needs CUDA 12.9 or later, torch was built for 12.8"):
        te.check(KernelConfig(), Fp8Config(enabled=True, recipe="block"))
    gpu(cuda="12.9")
    te.check(KernelConfig(), Fp8Config(enabled=True, recipe="block"))


def test_a_run_of_fp8_is_read_where_there_is_none():
    model = tiny.shape()
    config = RunConfig(model=model, kernels=KernelConfig(layers="te"), fp8=Fp8Config(enabled=True))
    with LoadedRun(config, None, tiny.weights_of(model)).engine() as made:
        assert any(isinstance(module, ColumnParallelLinear) for module in made.module.decoder.modules())
        assert made.config.fp8 is None
