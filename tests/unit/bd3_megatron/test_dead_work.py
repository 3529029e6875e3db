"""Savings of a step: loss and gradients do not change, and the work is left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_megatron.attention.mask import Streams
from bd3_megatron.config import PLAIN, DiffusionConfig, KernelConfig, ModelConfig
from bd3_megatron.diffusion.batches import Batch, predicted_positions
from bd3_megatron.layers import head
from bd3_megatron.layers.head import VocabularyShard, cross_entropy, linear_cross_entropy
from tests.unit import tiny

pytestmark = pytest.mark.usefixtures("world")

SWITCHES = [name for name, field in KernelConfig.model_fields.items() if field.default is True and name != "fusions"]


def loss_and_gradients(
    model: ModelConfig, diffusion: DiffusionConfig, kernels: KernelConfig, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """As training computes them."""
    network = tiny.build(model, diffusion, tiny.weights_of(model), kernels)
    loss = network(batch, total=True) / batch.tokens
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in network.named_parameters()}


def assert_equal(found: tuple[Tensor, dict[str, Tensor]], plain: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], plain[0], rtol=1e-5, atol=0)
    for name, gradient in plain[1].items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5 * largest, msg=name)


def test_there_is_a_switch_for_every_saving():
    assert SWITCHES == [
        "masked_rows_only",
        "chunked_cross_entropy",
        "skip_last_clean_queries",
        "skip_last_clean_block",
    ]


@pytest.mark.parametrize("switch", [*SWITCHES, "all"])
@pytest.mark.parametrize("draws", [1, 2, 4])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
@pytest.mark.parametrize("block_size", [4, 8])
def test_a_saving_changes_neither_loss_nor_gradients(backbone, draws, block_size, switch):
    model, diffusion = tiny.shape(backbone), DiffusionConfig(block_size=block_size, draws=draws)
    batch = tiny.batch_of(model, diffusion, 3)
    if switch == "all":
        kernels = KernelConfig()
    elif switch == "chunked_cross_entropy":
        kernels = PLAIN.model_copy(update={switch: True, "masked_rows_only": True})
    else:
        kernels = PLAIN.model_copy(update={switch: True})
    plain = loss_and_gradients(model, diffusion, PLAIN, batch)
    assert_equal(loss_and_gradients(model, diffusion, kernels, batch), plain)


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_savings_keep_to_documents(backbone):
    model, diffusion = tiny.shape(backbone), DiffusionConfig(block_size=4, draws=2)
    batch = tiny.batch_of(model, diffusion, 3, documents=tiny.documents_of(model, 3))
    plain = loss_and_gradients(model, diffusion, PLAIN, batch)
    assert_equal(loss_and_gradients(model, diffusion, KernelConfig(), batch), plain)


@pytest.mark.parametrize("objective", ["one block", "causal", "two halves"])
def test_objectives_with_little_to_leave_out(objective):
    diffusion = {
        "one block": DiffusionConfig(block_size=16, draws=2),
        "causal": DiffusionConfig(objective="causal", block_size=1),
        "two halves": DiffusionConfig(block_size=8),
    }[objective]
    model = tiny.shape()
    batch = tiny.batch_of(model, diffusion, 3)
    plain = loss_and_gradients(model, diffusion, PLAIN, batch)
    assert_equal(loss_and_gradients(model, diffusion, KernelConfig(), batch), plain)


# ---- it is left out ----


def tokens_through(
    model: ModelConfig, diffusion: DiffusionConfig, kernels: KernelConfig, part: Callable
) -> list[list[int]]:
    """Tokens of a row that pass each layer's ``part`` in a training step."""
    network = tiny.build(model, diffusion, tiny.weights_of(model), kernels)
    passed: list[list[int]] = [[] for _ in network.decoder.layers]
    for layer, seen in zip(network.decoder.layers, passed):
        part(layer).register_forward_hook(lambda module, args, out, seen=seen: seen.append(len(args[0])))
    network(tiny.batch_of(model, diffusion, 2), total=True).backward()
    return passed


@pytest.mark.parametrize("draws", [1, 2])
def test_the_clean_stream_ends_early_in_depth_and_in_length(draws):
    model, diffusion = tiny.shape(layers=3), DiffusionConfig(block_size=4, draws=draws)
    noisy, clean = draws * model.length, model.length - 4
    for part in (lambda x: x.mlp, lambda x: x.self_attention.linear_proj):
        assert tokens_through(model, diffusion, KernelConfig(), part) == [[noisy + clean]] * 2 + [[noisy]]
        assert tokens_through(model, diffusion, PLAIN, part) == [[noisy + model.length]] * 3


def test_only_masked_rows_reach_the_head(monkeypatch):
    model, diffusion = tiny.shape(), DiffusionConfig(block_size=4)
    batch = tiny.batch_of(model, diffusion, 16)
    rows = []
    multiply = head.F.linear
    network = tiny.build(model, diffusion, tiny.weights_of(model))
    monkeypatch.setattr(head.F, "linear", lambda x, *rest: rows.append(len(x)) or multiply(x, *rest))
    network(batch, total=True)
    masked = int((batch.weight != 0).sum())
    assert rows[-1] == len(batch.predicted) == -(-masked // 16) * 16 < batch.weight.numel()


# ---- which rows ----


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), length=st.integers(1, 400), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_padded_positions_come_in_few_sizes_and_count_for_nothing(rows, length, share, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(rows, length, generator=generator) * (torch.rand(rows, length, generator=generator) < share)
    positions = predicted_positions(weight)
    found = weight.flatten()[positions]
    masked = int((weight != 0).sum())
    assert torch.equal(positions[:masked], weight.flatten().nonzero().flatten())
    assert not found[masked:].any()
    unit = max(16, -(-weight.numel() // 64))
    assert masked <= len(positions) < max(masked, 1) + unit + 16
    assert len(positions) % 16 == 0 or len(positions) == weight.numel()


def test_sizes_are_bounded():
    sizes = set()
    for masked in range(4097):
        weight = torch.zeros(4, 1024)
        weight.view(-1)[:masked] = 1
        sizes.add(len(predicted_positions(weight)))
    assert len(sizes) <= 64
    assert max(sizes) == 4096


@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
@pytest.mark.parametrize("block_size", [2, 4, 16])
def test_the_clean_stream_stays_a_multiple(multiple, block_size):
    streams = Streams.of(DiffusionConfig(block_size=block_size), 32, skip_last_clean_block=True, multiple=multiple)
    assert streams.clean % multiple == 0
    assert 32 - block_size <= streams.clean < 32 - block_size + max(multiple, 1)


# ---- the head by itself ----


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 40),
    columns=st.integers(2, 30),
    chunk=st.integers(1, 50),
    with_bias=st.booleans(),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunks_of_rows_equal_the_cross_entropy_of_all(count, columns, chunk, with_bias, double, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, weight = (torch.randn(n, 6, generator=generator).requires_grad_() for n in (count, columns))
    bias = torch.randn(columns, generator=generator).requires_grad_() if with_bias else None
    labels = torch.randint(0, columns - 1, (count,), generator=generator)
    factors = torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) < 0.7)
    shard = VocabularyShard(0, columns, never=(columns - 1, columns + 5))
    leaves = [x for x in (rows, weight, bias) if x is not None]

    logits = torch.nn.functional.linear(rows, weight, bias)
    logits = logits.masked_fill(torch.arange(columns) == columns - 1, -torch.inf)
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    upstream = 0.25 if double else 1.0
    expected = (nll * factors).sum()
    gradients = torch.autograd.grad(expected * upstream, leaves)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(head, "rows_per_chunk", lambda *_: chunk)
        found = linear_cross_entropy(rows, weight, bias, labels, factors, shard)
        torch.testing.assert_close(cross_entropy(rows, weight, bias, labels, shard), nll.detach(), rtol=1e-5, atol=1e-6)
        for one, other in zip(torch.autograd.grad(found * upstream, leaves), gradients):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_factor_of_the_loss_is_not_rounded_to_the_precision_of_the_rows():
    """In bf16 all gradients behind the head would be off by one factor, and the weight's would not."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 64, generator=generator).bfloat16().requires_grad_() for n in (200, 50))
    labels, factors = torch.randint(0, 49, (200,), generator=generator), torch.ones(200)
    upstream = 1 + 43.5 / 128  # half-way between two numbers of bf16
    found = linear_cross_entropy(rows, weight, None, labels, factors, VocabularyShard(0, 50, never=()))
    one, other = (
        torch.autograd.grad(found * by, rows, retain_graph=True)[0].double().flatten() for by in (1.0, upstream)
    )
    assert (other @ one / (one @ one)).item() == pytest.approx(upstream, rel=5e-4)


def test_a_label_that_is_never_predicted_counts_for_nothing_without_a_factor():
    rows, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    shard = VocabularyShard(0, 5, never=(4,))
    labels, factors = torch.tensor([0, 4, 1]), torch.tensor([1.0, 0.0, 2.0])
    found = linear_cross_entropy(rows, weight, None, labels, factors, shard)
    assert found.isfinite()
    by_rows, by_weight = torch.autograd.grad(found, (rows, weight))
    assert not by_rows[1].any()
    assert by_rows.isfinite().all()
    assert not by_weight[4].any()


def test_chunks_are_as_large_as_their_logits_may_be():
    assert head.rows_per_chunk(4096, torch.device("cpu")) == 1024
    assert head.rows_per_chunk(200_000, torch.device("cpu")) == 128
    assert head.rows_per_chunk(50304, torch.device("cuda")) == 2048
