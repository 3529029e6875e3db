"""Model, head and training step on CUDA: what is left out changes nothing, and bf16 follows fp32."""

from __future__ import annotations

import math

import pytest
import torch

from bd3_megatron import config, parallel
from bd3_megatron.config import DiffusionConfig, KernelConfig, ModelConfig, ParallelConfig
from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.engine.megatron import MegatronEngine
from bd3_megatron.layers import head
from bd3_megatron.layers.head import VocabularyShard, linear_cross_entropy
from tests.unit import tiny

LOCAL = {"attention": "chunked", "layers": "local"}
PLAIN = config.PLAIN.model_copy(update={"layers": "local"})


def shape(backbone: str, **changes) -> ModelConfig:
    sizes = {"hidden": 256, "heads": 4, "length": 512, "layers": 2} | changes
    return tiny.shape(backbone, **sizes)


@pytest.fixture
def world(device):
    yield parallel.start(ParallelConfig())
    parallel.stop()


def loss_and_gradients(model, diffusion, kernels: KernelConfig, batch: Batch, bf16: bool = False):
    # Matrices of 0.05, so that activations and logits stay where bf16 resolves them.
    weights = {name: x if x.dim() == 1 else 0.25 * x for name, x in tiny.weights_of(model).items()}
    network = tiny.build(model, diffusion, weights, kernels, bf16=bf16).cuda()
    if bf16:
        network.bfloat16()
    loss = network(batch.to(torch.device("cuda")), total=True) / batch.tokens
    loss.backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in network.named_parameters()}


def close(found, expected, tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for name, gradient in expected[1].items():
        assert apart(found[1][name], gradient) <= tolerance, name


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, relative to the norm of what is expected."""
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_savings_change_neither_loss_nor_gradients(backbone, draws):
    model, diffusion = shape(backbone), DiffusionConfig(block_size=16, draws=draws)
    batch = tiny.batch_of(model, diffusion, 2)
    plain = loss_and_gradients(model, diffusion, PLAIN, batch)
    close(loss_and_gradients(model, diffusion, KernelConfig(**LOCAL), batch), plain, 1e-4)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("attention", ["auto", "flex"])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_bf16_follows_fp32(backbone, attention):
    model, diffusion = shape(backbone), DiffusionConfig(block_size=16)
    batch = tiny.batch_of(model, diffusion, 2)
    expected = loss_and_gradients(model, diffusion, PLAIN, batch)
    kernels = KernelConfig(**LOCAL | {"attention": attention})
    close(loss_and_gradients(model, diffusion, kernels, batch, bf16=True), expected, 5e-2)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_cross_entropy_equals_whole_logits(monkeypatch, dtype):
    rows, weight = (torch.randn(n, 256, device="cuda").mul(0.25).to(dtype).requires_grad_() for n in (1000, 5000))
    labels = torch.randint(0, 4999, (1000,), device="cuda")
    factors = torch.rand(1000, device="cuda")
    logits = torch.nn.functional.linear(rows.float(), weight.float())
    logits[:, 4999] = -torch.inf
    expected = (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * factors).sum()
    wanted = [x.float() for x in torch.autograd.grad(expected, (rows, weight))]
    monkeypatch.setattr(head, "rows_per_chunk", lambda *_: 256)
    found = linear_cross_entropy(rows, weight, None, labels, factors, VocabularyShard(0, 5000, never=(4999,)))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    for one, other in zip(torch.autograd.grad(found, (rows, weight)), wanted):
        assert apart(one, other) <= tolerance


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_training_learns_what_it_is_shown(world, backbone, precision):
    model, diffusion = shape(backbone), DiffusionConfig(block_size=16)
    engine = MegatronEngine(tiny.config(model, diffusion, precision), world)
    batch = tiny.batch_of(model, diffusion, 4)
    losses = [engine.train_step([batch], lr=3e-3).loss for _ in range(100)]
    assert losses[0] == pytest.approx(math.log(model.vocab_size), rel=0.5)
    assert losses[-1] < 0.8 * losses[0]


def test_a_step_makes_no_new_shapes_once_warm(world):
    """Micro-batches mask different numbers of tokens; the head sees few sizes and the allocator serves them."""
    model, diffusion = shape("qwen3"), DiffusionConfig(block_size=16)
    engine = MegatronEngine(tiny.config(model, diffusion, "bf16"), world)
    batches = [tiny.batch_of(model, diffusion, 4, seed) for seed in range(20)]
    assert len({len(batch.predicted) for batch in batches}) < len({int((b.weight != 0).sum()) for b in batches})
    for batch in batches:
        engine.train_step([batch], lr=1e-4)
    before = torch.cuda.memory_reserved()
    for batch in batches:
        engine.train_step([batch], lr=1e-4)
    assert torch.cuda.memory_reserved() == before
