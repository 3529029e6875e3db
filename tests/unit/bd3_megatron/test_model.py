"""The trained model against the plain-torch one, and what must not leak through it."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_megatron.config import DiffusionConfig, KernelConfig, ModelConfig
from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.hf.modeling_bd3 import BD3ForMaskedLM, token_nll
from bd3_megatron.model import BlockDiffusionModel, initialize
from tests.unit import tiny

pytestmark = pytest.mark.usefixtures("world")


@st.composite
def setups(draw) -> tuple[ModelConfig, DiffusionConfig, KernelConfig, int]:
    """Shapes of both backbones, every objective, every kernel; and the number of rows."""
    backbone = draw(st.sampled_from(tiny.BACKBONES))
    heads = draw(st.sampled_from([1, 2, 4]))
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if heads % g == 0])) if backbone == "qwen3" else None
    model = tiny.shape(
        backbone,
        layers=draw(st.integers(1, 3)),
        hidden=4 * draw(st.integers(2, 8)) * heads,
        heads=heads,
        kv_heads=groups,
        head_dim=draw(st.sampled_from([None, 6])),
        ffn_hidden=draw(st.sampled_from([None, 20])),
        length=draw(st.sampled_from([8, 16, 64])),
        rope_theta=draw(st.sampled_from([100.0, 10_000.0])),
        tie_embeddings=backbone == "qwen3" and draw(st.booleans()),
    )
    size = draw(st.sampled_from([1, 4, model.length]))
    if draw(st.integers(0, 4)) == 0:
        diffusion = DiffusionConfig(objective="causal", block_size=1)
    else:
        schedule = draw(st.sampled_from(["loglinear", "cosine"]))
        diffusion = DiffusionConfig(block_size=size, draws=draw(st.integers(1, 2)), schedule=schedule)
    backend = draw(st.sampled_from(["chunked", "reference"]))
    switches = {name: draw(st.booleans()) for name, field in KernelConfig.model_fields.items() if field.default is True}
    kernels = KernelConfig(attention=backend, **switches)
    return model, diffusion, kernels, draw(st.integers(1, 3))


def expected_nll(network: BD3ForMaskedLM, batch: Batch, diffusion: DiffusionConfig, rows: int) -> Tensor:
    """Weighted nll ``[R, L]`` of the plain-torch model, every draw by itself."""
    if diffusion.objective == "causal":
        return batch.weight * token_nll(network(batch.input_ids).logits, batch.labels)
    streams = batch.input_ids.split(rows)
    clean = streams[-1] if diffusion.block_size < batch.labels.shape[1] else None
    out = []
    for noisy, labels, weight in zip(streams, batch.labels.split(rows), batch.weight.split(rows)):
        nll = token_nll(network(noisy, clean).logits, labels)
        out.append(torch.where(noisy == tiny.MASK, weight * nll, 0.0))
    return torch.cat(out)


@settings(max_examples=60, deadline=None)
@given(setup=setups(), seed=st.integers(0, 1000))
def test_nll_of_every_token_equals_the_plain_model(setup, seed):
    model, diffusion, kernels, rows = setup
    weights = tiny.weights_of(model, seed)
    batch = tiny.batch_of(model, diffusion, rows, seed)
    with torch.no_grad():
        found = tiny.build(model, diffusion, weights, kernels)(batch)
        expected = expected_nll(tiny.oracle(model, diffusion, weights), batch, diffusion, rows)
    assert found.shape == batch.labels.shape
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_two_draws_in_one_pass_equal_two_passes_in_loss_and_gradients(backbone):
    model, diffusion = tiny.shape(backbone), DiffusionConfig(block_size=4, draws=2)
    weights = tiny.weights_of(model)
    both = tiny.batch_of(model, diffusion, 3)
    first, second, clean = both.input_ids.split(3)
    network = tiny.build(model, diffusion, weights)
    (network(both).sum() / both.tokens).backward()

    single = tiny.build(model, diffusion.model_copy(update={"draws": 1}), weights)
    for noisy, labels, weight in zip((first, second), both.labels.split(3), both.weight.split(3)):
        batch = Batch(torch.cat([noisy, clean]), labels, weight, tokens=labels.numel())
        (single(batch).sum() / batch.tokens / 2).backward()
    for (name, one), other in zip(network.named_parameters(), single.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


# ---- leaks ----

SIZE, DRAWS = 4, 2
LEAK_SETUPS = [(backbone, backend) for backbone in tiny.BACKBONES for backend in ("chunked", "reference")]


def hidden_blocks(backbone: str, backend: str, ids: Tensor) -> Tensor:
    """Hidden states of ids ``[S, L]`` by stream and block, ``[S, blocks, B' h]``."""
    model, diffusion = tiny.shape(backbone), DiffusionConfig(block_size=SIZE, draws=DRAWS)
    whole = KernelConfig(attention=backend, skip_last_clean_queries=False, skip_last_clean_block=False)
    network = tiny.build(model, diffusion, tiny.weights_of(model), whole)
    with torch.no_grad():
        hidden = network.hidden_states(ids)  # [S L, 1, h]
    return hidden.view(len(ids), model.length // SIZE, -1)


def changed_blocks(backbone: str, backend: str, stream: int, position: int) -> Tensor:
    """Which blocks ``[S, blocks]`` of hidden states differ in any bit once one token is another."""
    model = tiny.shape(backbone)
    ids = tiny.batch_of(model, DiffusionConfig(block_size=SIZE, draws=DRAWS), 1).input_ids
    other = ids.clone()
    other[stream, position] = 2 + (ids[stream, position] - 1) % 30  # another token that is not special
    assert other[stream, position] != ids[stream, position]
    return (hidden_blocks(backbone, backend, ids) != hidden_blocks(backbone, backend, other)).any(-1)


@pytest.mark.parametrize(("backbone", "backend"), LEAK_SETUPS)
@pytest.mark.parametrize("position", range(0, 16, 3))
def test_a_clean_token_reaches_later_noisy_blocks_and_its_own_clean_block_on(backbone, backend, position):
    block, number = position // SIZE, torch.arange(4)
    changed = changed_blocks(backbone, backend, DRAWS, position)
    for draw in range(DRAWS):
        assert torch.equal(changed[draw], number > block)
    assert torch.equal(changed[DRAWS], number >= block)


@pytest.mark.parametrize(("backbone", "backend"), LEAK_SETUPS)
@pytest.mark.parametrize(("draw", "position"), [(0, 1), (1, 6), (0, 15)])
def test_a_noisy_token_reaches_its_own_block_only(backbone, backend, draw, position):
    changed = changed_blocks(backbone, backend, draw, position)
    expected = torch.zeros_like(changed)
    expected[draw, position // SIZE] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(("backbone", "backend"), LEAK_SETUPS)
@pytest.mark.parametrize("block", range(4))
def test_the_loss_of_a_block_has_no_gradient_by_the_clean_tokens_it_predicts(backbone, backend, block):
    model, diffusion = tiny.shape(backbone), DiffusionConfig(block_size=SIZE, draws=DRAWS)
    whole = KernelConfig(attention=backend, skip_last_clean_block=False)
    network = tiny.build(model, diffusion, tiny.weights_of(model), whole)
    drawn = tiny.batch_of(model, diffusion, 1)
    batch = Batch(drawn.input_ids, drawn.labels, torch.ones_like(drawn.weight), drawn.tokens)
    embedded: list[Tensor] = []  # [S L, 1, h]
    network.embedding.register_forward_hook(lambda *args: embedded.append(args[-1]))
    nll = network(batch)[:, : (block + 1) * SIZE].sum()
    (gradient,) = torch.autograd.grad(nll, embedded)
    reached = gradient.view(DRAWS + 1, 4, -1)[DRAWS].any(1)  # clean stream, by block
    assert torch.equal(reached, torch.arange(4) < block)


# ---- head and weights ----


@pytest.mark.parametrize("name", ["qwen3", "tied", "dit"])
def test_the_mask_is_never_predicted_and_its_head_row_never_trained(name):
    model = tiny.shape("qwen3", tie_embeddings=True) if name == "tied" else tiny.shape(name)
    network = tiny.build(model, DiffusionConfig(block_size=4), tiny.weights_of(model))
    logits = network.logits(torch.randn(5, 3, model.hidden, generator=torch.Generator().manual_seed(0)))
    assert bool((logits[..., tiny.MASK] == -torch.inf).all())
    assert bool(logits[..., : tiny.MASK].isfinite().all())
    torch.logsumexp(logits, -1).sum().backward()
    gradient = network.shared_embedding_or_output_weight() if name == "tied" else network.output_layer.weight
    assert torch.count_nonzero(gradient.grad[tiny.MASK]) == 0
    assert bool(gradient.grad[: tiny.MASK].any(1).all())


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_initial_weights_are_a_function_of_the_seed_and_the_name(backbone):
    def drawn(seed: int, layers: int = 2) -> dict[str, Tensor]:
        model = tiny.shape(backbone, hidden=64, layers=layers)
        network = tiny.build(model, DiffusionConfig(block_size=4), tiny.weights_of(model))
        initialize(network, seed)
        return {name: parameter.detach() for name, parameter in network.named_parameters()}

    one, same, other, deeper = drawn(3), drawn(3), drawn(4), drawn(3, layers=3)
    scaled = ("linear_proj.weight", "linear_fc2.weight")
    for name, weight in one.items():
        assert torch.equal(weight, same[name])
        constant = {"norm.weight": 1.0, "bias": 0.0}
        constant |= {"output_layer.weight": 0.0} if backbone == "dit" else {}
        value = next((v for end, v in constant.items() if name.endswith(end)), None)
        if value is not None:
            assert bool((weight == value).all()), name
            continue
        assert not torch.equal(weight, other[name]), name
        std = 0.02 / (2 if name.endswith(scaled) else 1)  # 1 / sqrt(2 layers)
        assert weight.std().item() == pytest.approx(std, rel=0.1), name
        factor = (2 / 3) ** 0.5 if name.endswith(scaled) else 1
        torch.testing.assert_close(deeper[name], weight * factor)
    digests = {hashlib.sha256(w.numpy().tobytes()).digest() for w in one.values() if w.unique().numel() > 1}
    assert len(digests) == sum(w.unique().numel() > 1 for w in one.values())  # no two matrices are alike


def test_a_backend_that_cannot_run_here_is_refused_in_one_line():
    """Not in Megatron's words, which add the modules that it was building."""
    model, kernels = tiny.shape(head_dim=64, length=256), KernelConfig(attention="flash")
    with pytest.raises(ConfigError, match=r"^kernels.attention=flash: needs .*; use auto, flex or chunked$"):
        BlockDiffusionModel(tiny.config(model, DiffusionConfig(block_size=4), "bf16", kernels=kernels))
