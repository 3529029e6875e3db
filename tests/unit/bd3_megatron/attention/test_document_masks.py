"""Attention that keeps to the documents of a row: every backend, the whole model, and what must not leak."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_megatron.attention import chunked_attention
from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.mask import Streams, dense_mask
from bd3_megatron.config import DiffusionConfig, KernelConfig
from bd3_megatron.diffusion.batches import Batch, causal_batch
from bd3_megatron.hf.modeling_bd3 import BD3ForMaskedLM
from tests.unit import tiny
from tests.unit.bd3_megatron.attention.dense import ON_CPU, OTHERS, attend, reference
from tests.unit.bd3_megatron.attention.test_mask import OneOfMany, inputs, streams_of
from tests.unit.bd3_megatron.layers.test_head import loss_and_gradients

OBJECTIVES = {
    "blocks": DiffusionConfig(block_size=4),
    "two draws": DiffusionConfig(block_size=4, draws=2),
    "one block": DiffusionConfig(block_size=16),
    "single tokens": DiffusionConfig(block_size=1, beta=1.0),
    "causal": DiffusionConfig(objective="causal", block_size=1),
}


@st.composite
def packed(draw, longest: int = 12, most: int = 320):
    """Streams as the objectives have them, heads, and documents that begin anywhere, blocks' insides included."""
    size = draw(st.sampled_from([1, 3, 4, 16, 70, 150]))
    blocks = draw(st.integers(1, min(longest, most // size)))
    length = size * blocks
    streams = streams_of(draw, blocks, size, noisy=draw(st.integers(0, 2)))
    groups, repeats, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    starts = draw(st.lists(st.tuples(st.integers(0, batch - 1), st.integers(0, length - 1)), max_size=3 * batch))
    marks = torch.zeros(batch, length, dtype=torch.int32)
    for row, position in starts:
        marks[row, position] = 1
    return streams, batch, groups, groups * repeats, marks.cumsum(1, dtype=torch.int32)


def assert_same(found: Tensor, expected: Tensor, qkv: list[Tensor]) -> None:
    """Equal values and equal gradients by queries, keys and values."""
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(out, qkv, upstream, retain_graph=True) for out in (found, expected)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


# ---- attention ----


@settings(max_examples=30, deadline=None)
@given(case=packed(longest=4))
def test_a_query_sees_what_the_mask_admits_of_its_own_document(case):
    streams, batch, *_, documents = case
    mask = dense_mask(streams, documents=documents)
    admitted = dense_mask(streams)
    position = torch.arange(streams.tokens) % streams.length
    for row in range(batch):
        for query in range(0, len(admitted), 1 + len(admitted) // 60):
            own = documents[row, position] == documents[row, query % streams.length]
            assert torch.equal(mask[row, query], admitted[query] & own)


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=60, deadline=None)
@given(case=packed())
def test_backend_equals_the_dense_reference(name, case):
    streams, batch, groups, heads, documents = case
    qkv = inputs(streams, batch, groups, heads)
    expected = reference(*qkv, streams, documents=documents)
    assert_same(attend(name, qkv, streams, documents=documents), expected, qkv)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_row_of_one_document_is_a_row_without_documents(name):
    streams = Streams(256, 4, 2, 252)
    qkv = inputs(streams, 2, 2, 4)
    one = torch.full((2, 256), 7, dtype=torch.int32)
    assert_same(attend(name, qkv, streams, documents=one), attend(name, qkv, streams), qkv)


@pytest.mark.parametrize("name", ON_CPU)
@settings(max_examples=25, deadline=None)
@given(case=packed(), size=st.sampled_from([2, 3]), parts=st.integers(1, 2), seed=st.integers(0, 99), one=st.booleans())
def test_ranks_that_share_a_row_attend_as_one(name, case, size, parts, seed, one):
    """Chunks of whole blocks, and parts of the ``one`` block of a row."""
    streams, batch, groups, heads, _ = case
    length = 2 * size * parts * (70 if one else min(streams.block_size, 70))
    block, noisy = (length, max(1, streams.noisy)) if one else (min(streams.block_size, 70), streams.noisy)
    streams = Streams(length, block, noisy, clean=0 if one else length)
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.rand(batch, length, generator=generator) < 4 / length).cumsum(1)
    query, key, value = inputs(streams, batch, groups, heads)
    expected = reference(query, key, value, streams, documents=documents)
    upstream = torch.randn(expected.shape, generator=generator)
    wanted = torch.autograd.grad(expected, (query, key, value), upstream)
    sums = [torch.zeros_like(x) for x in (query, key, value)]
    for rank in range(size):
        shard = OneOfMany(length, size, rank).holding(key, value, streams)
        mine = map(shard.mine, (query, key, value))
        found = attend(name, list(mine), streams, None, shard, documents)
        torch.testing.assert_close(found, shard.mine(expected), rtol=1e-5, atol=1e-5)
        for total, part in zip(sums, torch.autograd.grad(found, (query, key, value), shard.mine(upstream))):
            total += part
    for found, one in zip(sums, wanted):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=2e-5)


LONG = [Streams(1024, 4, 1, 1024), Streams(1024, 4, 2, 1020), Streams(1024, 256, 1, 768), Streams(1024, 1024, 1)]


def pairs_and_result(monkeypatch, qkv: list[Tensor], streams: Streams, documents: Tensor) -> tuple[list[int], Tensor]:
    """Elements of the mask of every call to torch, and the result."""
    sizes, attention = [], F.scaled_dot_product_attention

    def counting(*args, attn_mask: Tensor, **options) -> Tensor:
        sizes.append(attn_mask.numel())
        return attention(*args, attn_mask=attn_mask, **options)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", counting)
        return sizes, chunked_attention.attend(*qkv, streams, ContextShard(streams.length), documents=documents)


@pytest.mark.parametrize("streams", LONG, ids=str)
def test_keys_of_no_document_in_a_tile_are_skipped_and_change_nothing(monkeypatch, streams):
    """At many tiles, whose masks stay far below L x L."""
    length, batch = 1024, 2
    documents = torch.arange(length).div(150, rounding_mode="floor").expand(batch, -1).contiguous()
    documents[1] = (torch.arange(length) + 70) // 150
    qkv = inputs(streams, batch, 1, 2)
    sizes, found = pairs_and_result(monkeypatch, qkv, streams, documents)

    class Unskipped(chunked_attention.Documents):
        def __init__(self, numbers: Tensor):
            super().__init__(numbers)
            self.first, self.last = [0] * length, [length] * length

    monkeypatch.setattr(chunked_attention, "Documents", Unskipped)
    every, expected = pairs_and_result(monkeypatch, qkv, streams, documents)
    assert_same(found, expected, qkv)
    assert_same(found, reference(*qkv, streams, documents=documents), qkv)
    assert sum(sizes) < 0.7 * sum(every)
    # Queries of one tile, per stream and head of a group, by the keys of its documents in every stream.
    assert max(sizes) <= batch * (128 * 2 * streams.count) * (128 * streams.count + 2 * 150 + 256)


# ---- the model ----


@pytest.fixture
def oracle_inputs():
    """Keyword arguments of the plain-torch model for every draw of a batch."""

    def make(batch: Batch, diffusion: DiffusionConfig, documents: np.ndarray) -> list[dict[str, Tensor | None]]:
        numbers = torch.from_numpy(documents)
        if diffusion.objective == "causal":
            return [{"input_ids": batch.input_ids, "labels": batch.input_ids, "documents": numbers}]
        rows = len(documents)
        clean = batch.labels[:rows] if diffusion.block_size < batch.labels.shape[1] else None
        parts = zip(batch.input_ids.split(rows), batch.labels.split(rows), batch.weight.split(rows))
        return [
            {"input_ids": noisy, "clean_ids": clean, "labels": labels, "loss_weights": weight, "documents": numbers}
            for noisy, labels, weight in parts
        ]

    return make


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_loss_and_every_gradient_equal_the_plain_model(oracle_inputs, backbone, backend, objective):
    model, diffusion = tiny.shape(backbone), OBJECTIVES[objective]
    weights, documents = tiny.weights_of(model), tiny.documents_of(model, 3)
    batch = tiny.batch_of(model, diffusion, 3, documents=documents)
    network = tiny.build(model, diffusion, weights, KernelConfig(attention=backend))
    loss, gradients = loss_and_gradients(network, batch)

    plain: BD3ForMaskedLM = tiny.oracle(model, diffusion, weights)
    calls = oracle_inputs(batch, diffusion, documents)
    # The plain model divides by L per row also where L - 1 tokens are predicted.
    expected = sum(plain(**call).loss * call["labels"].numel() for call in calls) / batch.tokens
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    ours = tiny.to_hf(gradients, model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)
    unmasked, _ = loss_and_gradients(network, Batch(batch.input_ids, batch.labels, batch.weight, batch.tokens))
    assert abs(unmasked - loss) > 1e-3 * loss


def test_the_plain_model_refuses_documents_of_another_shape():
    model = tiny.shape()
    plain = tiny.oracle(model, OBJECTIVES["blocks"], tiny.weights_of(model))
    ids = torch.from_numpy(tiny.rows_of(model, 2))
    with pytest.raises(ValueError, match=r"documents: shape \[1, 16\] differs from input_ids \[2, 16\]"):
        plain(ids, documents=torch.zeros(1, 16, dtype=torch.long))


# ---- leaks ----


def gradients_of_each_document(backbone: str, backend: str, diffusion: DiffusionConfig, passed: bool):
    """For every document of two rows: the gradient of its loss by the embeddings ``[S, b, L, h]``, and where it is."""
    model = tiny.shape(backbone)
    documents = tiny.documents_of(model, 2)
    batch = tiny.batch_of(model, diffusion, 2, documents=documents if passed else None)
    causal = diffusion.objective == "causal"
    if not causal:
        weight = torch.ones_like(batch.weight)
        batch = Batch(batch.input_ids, batch.labels, weight, batch.tokens, batch.documents)
    whole = KernelConfig(attention=backend, skip_last_clean_block=False)
    network = tiny.build(model, diffusion, tiny.weights_of(model), whole)
    embedded: list[Tensor] = []  # [S L, b, h]
    network.embedding.register_forward_hook(lambda *args: embedded.append(args[-1]))
    numbers = torch.from_numpy(documents)
    predicted = numbers.roll(-1, 1) if causal else numbers
    for number in numbers.unique():
        embedded.clear()
        nll = network(batch).unflatten(0, (-1, 2))  # [K, b, L]
        (gradient,) = torch.autograd.grad(nll[:, predicted == number].sum(), embedded)
        yield gradient.unflatten(0, (-1, model.length)).transpose(1, 2), numbers == number


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_no_document_reaches_the_loss_of_another(backbone, backend, objective):
    seen = 0
    for gradient, own in gradients_of_each_document(backbone, backend, OBJECTIVES[objective], passed=True):
        other = gradient[:, ~own]
        assert torch.equal(other, torch.zeros_like(other))
        # A causal document of one token predicts nothing.
        seen += bool(gradient[:, own].any())
        assert bool(gradient[:, own].any()) or (objective == "causal" and own.sum() == 1)
    assert seen >= 4


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_without_their_numbers_documents_do_reach_each_other(backend, objective):
    found = gradients_of_each_document("qwen3", backend, OBJECTIVES[objective], passed=False)
    assert any(bool(gradient[:, ~own].any()) for gradient, own in found)


# ---- batches ----


def test_the_last_position_of_a_document_predicts_nothing():
    rows, documents = tiny.rows_of(tiny.shape(), 2), np.repeat([[5, 6], [6, 7]], 8, axis=1)
    documents[1, 8:11] = 6
    batch = causal_batch(rows, documents)
    nothing = [[7, 15], [10, 15]]
    for row, positions in enumerate(nothing):
        assert torch.where(batch.weight[row] == 0)[0].tolist() == positions
    assert batch.tokens == 2 * 15  # whatever is predicted
    assert torch.equal(batch.documents, torch.from_numpy(documents - documents[:, :1]).int())


def test_micro_batches_accumulate_to_the_loss_of_the_whole_batch(world):
    """Though rows have unequally many predictions."""
    model, diffusion = tiny.shape(), OBJECTIVES["causal"]
    rows, documents = tiny.rows_of(model, 6), tiny.documents_of(model, 6)
    parts = [causal_batch(rows[i : i + 2], documents[i : i + 2]) for i in (0, 2, 4)]
    assert len({(part.weight != 0).sum().item() for part in parts}) > 1
    split, whole = (tiny.engine(world, model, diffusion) for _ in range(2))
    result, expected = split.train_step(parts, 1e-3), whole.train_step([causal_batch(rows, documents)], 1e-3)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


def test_documents_stay_whole_where_positions_are_shared_out():
    model, diffusion = tiny.shape(), OBJECTIVES["blocks"]
    documents = tiny.documents_of(model, 2)
    batch = tiny.batch_of(model, diffusion, 2, documents=documents)
    part = batch.take(ContextShard(16, size=2, rank=1))
    assert part.labels.shape == (2, 8)
    assert torch.equal(part.documents, batch.documents)
    assert part.to(torch.device("meta")).documents.device.type == "meta"
    assert tiny.batch_of(model, diffusion, 2).to(torch.device("cpu")).documents is None
