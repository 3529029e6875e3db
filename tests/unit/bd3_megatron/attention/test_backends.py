"""Which backend a run gets, and the one line for those it cannot have."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bd3_common.errors import ConfigError
from bd3_megatron.attention.backends import ATTENTION_BACKENDS, Demand, check_backend, choose, flash, portable
from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.core import TwoStreamAttention
from bd3_megatron.attention.mask import Streams
from bd3_megatron.config import DiffusionConfig, EngineConfig, ModelConfig, OptimizationConfig, ParallelConfig
from tests.unit import tiny
from tests.unit.bd3_megatron.attention.dense import ON_CPU

STREAMS = Streams(1024, 4, 1, 1024)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER = (9, 0)


@pytest.fixture
def card(monkeypatch):
    """Pretend that the CUDA device has a compute capability, and that the packages are there or are not."""

    def pretend(capability, package=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setitem(sys.modules, "flash_attn.cute", types.ModuleType("cute") if package else None)
        flash.package_reason.cache_clear()

    yield pretend
    flash.package_reason.cache_clear()


def chosen(name: str, device=CUDA, dtype=torch.bfloat16, head_dim=128, streams=STREAMS, context=None) -> str:
    return choose(name, streams, context, head_dim=head_dim, dtype=dtype, device=device).name


def test_auto_takes_the_fastest_that_can_do_it(card):
    assert chosen("auto", CPU) == "chunked"
    card(HOPPER)
    assert chosen("auto") == "flash"
    assert chosen("auto", dtype=torch.float32) == "flex"
    assert chosen("auto", head_dim=80) == "flex"
    assert chosen("auto", streams=Streams(1000, 4, 1, 1000)) == "flex"
    assert chosen("auto", streams=Streams(1024, 4, 1, 1020)) == "flex"
    assert chosen("auto", head_dim=8) == "chunked"
    assert chosen("auto", context=ContextShard(1024, 2, 1)) == "flash"
    assert chosen("auto", context=ContextShard(1024, 8, 1)) == "flex"
    card((8, 0))
    assert chosen("auto") == "flex"
    card(HOPPER, package=False)
    assert chosen("auto") == "flex"


@pytest.mark.parametrize("name", ON_CPU)
def test_a_name_that_can_do_it_is_taken(name):
    found = choose(name, STREAMS, None, head_dim=64, dtype=torch.float32, device=CPU)
    assert type(found) is ATTENTION_BACKENDS.load(name)
    assert found.name == name
    assert found.streams is STREAMS
    assert found.context == ContextShard(1024)


REFUSED = [
    ({"device": CPU}, "needs a CUDA device of compute capability 9.0 or newer, found none; use auto, flex or chunked"),
    ({"head_dim": 80}, "takes heads of 64 or 128, not 80; use auto, flex or chunked"),
    ({"dtype": torch.float32}, "takes bf16 and fp16, not fp32; use auto, flex or chunked"),
    (
        {"context": ContextShard(1024, 8, 1)},
        "takes chunks of a row in multiples of 128 positions, not 64; use auto, flex or chunked",
    ),
]


@pytest.mark.parametrize(("wrong", "line"), REFUSED)
def test_flash_says_why_not(card, wrong, line):
    card(HOPPER)
    with pytest.raises(ConfigError) as caught:
        chosen("flash", **wrong)
    assert str(caught.value) == f"kernels.attention=flash: {line}"


@pytest.mark.parametrize(
    ("capability", "package", "reason"),
    [
        ((8, 9), True, "needs a CUDA device of compute capability 9.0 or newer, found 8.9"),
        ((12, 0), True, "compute capability 12.0 has no block-sparse backward pass"),
        (HOPPER, False, r"needs the package flash-attn-4, which cannot be imported \(.*\)"),
    ],
)
def test_flash_names_the_card_or_the_package(card, capability, package, reason):
    card(capability, package)
    with pytest.raises(ConfigError, match=f"flash: {reason}; use auto, flex or chunked"):
        chosen("flash")


def test_flex_names_heads_that_its_kernel_does_not_take(card):
    card(HOPPER, package=False)
    with pytest.raises(ConfigError, match="flex: takes heads of 16 or more on CUDA, not 8; use auto or chunked"):
        chosen("flex", head_dim=8)
    assert chosen("flex", CPU, head_dim=8) == "flex"


def test_what_the_configuration_rules_out_is_refused_without_a_device():
    model, diffusion = ModelConfig(heads=12, hidden=768, length=1024), DiffusionConfig(block_size=4)

    def check(precision="bf16", context=1, **other):
        layout, optimization = ParallelConfig(context=context), OptimizationConfig(precision=precision)
        shape = model.model_copy(update=other)
        config = EngineConfig(model=shape, diffusion=diffusion, parallel=layout, optimization=optimization)
        check_backend("flash", Demand.of(config))

    check()
    with pytest.raises(ConfigError, match=r"^kernels.attention=flash: takes bf16 and fp16, not fp32; use auto, flex"):
        check("fp32")
    with pytest.raises(ConfigError, match="takes heads of 64 or 128, not 32"):
        check(head_dim=32)
    with pytest.raises(ConfigError, match="in multiples of 128 positions, not 64"):
        check(context=8)
    check_backend("auto", Demand("fp32", 80, 100, 100))


def test_traits_and_counts_are_read_without_torch():
    code = (
        "import sys; from bd3_megatron.attention import lengths; "
        "from bd3_megatron.attention.backends import ATTENTION_BACKENDS as known; "
        "[known.load(name) for name in known.names()]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_backend_of_gpus_is_not_asked_for_where_a_run_is_used():
    assert [portable(name) for name in ("flash", "flex", "chunked", "reference", "auto")] == [
        "auto",
        "auto",
        "chunked",
        "reference",
        "auto",
    ]


def test_every_backend_is_named_as_its_file_and_described():
    for entry in ATTENTION_BACKENDS.entries():
        assert ATTENTION_BACKENDS.load(entry.name).name == entry.name
        assert entry.summary
    text = (Path(__file__).parents[4] / "docs" / "kernels.md").read_text()
    table = text.partition("| backend |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == sorted(ATTENTION_BACKENDS.names())


@pytest.mark.usefixtures("world")
def test_one_backend_serves_all_layers_of_a_model():
    model = tiny.shape(layers=3)
    network = tiny.build(model, DiffusionConfig(block_size=4), tiny.weights_of(model))
    backends = [m.backend for m in network.modules() if isinstance(m, TwoStreamAttention)]
    assert len(backends) == 3
    assert all(backend is backends[0] for backend in backends)
    assert backends[0].streams is network.streams


def test_backends_are_importable_without_the_gpu_packages():
    missing = "import sys; sys.modules.update(dict.fromkeys(['flash_attn', 'cutlass', 'quack']))"
    code = f"{missing}; import bd3_megatron.attention.flash_attention"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
