"""Evaluation: exact where it can be, independent of batches and of training's schedule, and its statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.diffusion.estimators import likelihood_objective
from bd3_megatron.diffusion.noise import Purpose, SampleKeys
from bd3_megatron.sampling.sampler import log_likelihood
from data_prep.read.order import RowOrder
from data_prep.read.reader import RowReader
from pretrain.config.data_fit import resolve_model
from pretrain.config.schema import EvalConfig
from pretrain.evaluation.likelihood import Evaluation, Likelihood, evaluate
from pretrain.evaluation.rows import make_batch
from tests.unit import tiny

CAUSAL = DiffusionConfig(objective="causal", block_size=1)
EVERY_TOKEN = DiffusionConfig(block_size=1, beta=1.0, omega=1.0)
# A mean over the draws of a pair that took a sum, or one of the two, would show.
EVERY_PAIR = DiffusionConfig(block_size=1, draws=2, coupling="complementary")


@pytest.fixture(scope="module")
def reader(data_set) -> RowReader:
    return RowReader(data_set, "validation")


def of_data(reader: RowReader, backbone: str = "qwen3") -> ModelConfig:
    """The small model with the data set's length, vocabulary and ids."""
    ids = {"vocab_size": None, "mask_id": None, "bos_id": None, "eos_id": None}
    return resolve_model(tiny.shape(backbone, length=reader.length, **ids), reader.manifest, "data")


def evaluated(world, reader: RowReader, diffusion: DiffusionConfig, micro: int = 8, **options) -> Evaluation:
    model = of_data(reader)
    engine = tiny.engine(world, model, diffusion)
    return evaluate(engine, reader, model, diffusion, EvalConfig(**options), micro).summarize()


# ---- exact likelihood ----


@pytest.mark.parametrize("diffusion", [EVERY_TOKEN, EVERY_PAIR, CAUSAL], ids=["single tokens", "pairs", "causal"])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_the_bound_is_the_likelihood_token_by_token(world, reader, backbone, diffusion):
    model = of_data(reader, backbone)
    engine = tiny.engine(world, model, diffusion)
    results = [evaluate(engine, reader, model, diffusion, EvalConfig(seed=seed), 16).summarize() for seed in range(3)]
    rows = torch.from_numpy(reader.rows(np.arange(len(reader))).astype(np.int64))
    exact = log_likelihood(engine.module, rows)
    assert exact.shape == (len(reader), model.length - 1)
    for result in results:
        assert result.tokens == exact.numel()
        assert result.nelbo * result.tokens == pytest.approx(-exact.sum().item(), rel=1e-5)
        # The seed decides the order of the rows and nothing else.
        assert result.nelbo == pytest.approx(results[0].nelbo, rel=1e-7)
        per_row = -exact.mean(1)
        assert result.nelbo_stderr == pytest.approx((per_row.std() / math.sqrt(len(per_row))).item(), rel=1e-4)


def test_the_linear_schedule_at_single_tokens_has_the_exact_value_for_its_mean(world, reader):
    """Were t drawn for blocks of one token, the mean over draws would approach what evaluation gives at once."""
    model, linear = of_data(reader), DiffusionConfig(block_size=1)
    engine = tiny.engine(world, model, linear)
    exact = evaluate(engine, reader, model, linear, EvalConfig(rows=16), 16).summarize().nelbo
    sums = []
    for draw in range(64):
        slots = np.arange(16)
        _, rows = RowOrder(len(reader), 0).epoch_and_row(slots)
        keys = SampleKeys(np.full(16, draw), rows, slots, batch=draw, batch_rows=16)
        (nll,) = engine.forward([make_batch(reader, model, linear, keys, 0, Purpose.EVALUATE)])
        sums.append(nll.double().sum().item() / (16 * 31))
    error = np.std(sums, ddof=1) / math.sqrt(len(sums))
    assert error < 0.03 * exact
    assert abs(np.mean(sums) - exact) < 4 * error


# ---- what the result does not depend on ----


PAIRS = DiffusionConfig(block_size=4, draws=2, coupling="complementary")


@pytest.mark.parametrize(
    "diffusion", [DiffusionConfig(block_size=4, draws=2), PAIRS, CAUSAL], ids=["blocks", "pairs", "causal"]
)
def test_the_size_of_micro_batches_does_not_matter(world, reader, diffusion):
    """Up to rounding in fp32: a product of another size may add in another order."""
    whole = evaluated(world, reader, diffusion, micro=50, rows=50, draws=2)
    for micro in (1, 7, 16, 64):
        split = evaluated(world, reader, diffusion, micro=micro, rows=50, draws=2)
        assert split.nelbo == pytest.approx(whole.nelbo, rel=1e-6)
        assert split.nelbo_stderr == pytest.approx(whole.nelbo_stderr, rel=1e-6)
        assert (split.rows, split.tokens) == (50, 50 * 31)


@pytest.mark.parametrize("size", [1, 4, 32])
def test_the_schedule_of_training_does_not_matter(world, reader, size):
    plain = evaluated(world, reader, DiffusionConfig(block_size=size), rows=8)
    for trained in (
        {"beta": 0.3, "omega": 0.8},
        {"schedule": "cosine"},
        {"beta": 0.5, "omega": 1.0, "resample": True, "stratify": False},
    ):
        assert evaluated(world, reader, DiffusionConfig(block_size=size, **trained), rows=8) == plain


def test_the_seed_and_further_draws_change_the_estimate(world, reader):
    diffusion = DiffusionConfig(block_size=4)
    one, same, other, two = (
        evaluated(world, reader, diffusion, rows=8, **options) for options in ({}, {}, {"seed": 1}, {"draws": 2})
    )
    assert one == same
    assert len({one.nelbo, other.nelbo, two.nelbo}) == 3


@pytest.mark.parametrize("rows", [2, 5, 33])
def test_a_subset_is_the_first_rows_of_one_order_whatever_the_seed(world, reader, rows):
    result = evaluated(world, reader, CAUSAL, rows=rows, seed=3)
    _, chosen = RowOrder(len(reader), 0).epoch_and_row(np.arange(rows))
    engine = tiny.engine(world, of_data(reader), CAUSAL)
    exact = log_likelihood(engine.module, torch.from_numpy(reader.rows(chosen).astype(np.int64)))
    assert (result.rows, result.tokens) == (rows, rows * 31)
    assert result.nelbo == pytest.approx(-exact.mean().item(), rel=1e-5)


def test_more_rows_than_there_are_means_all(world, reader):
    result = evaluated(world, reader, CAUSAL, rows=10**6)
    assert result.rows == len(reader)


def test_evaluation_leaves_the_engine_as_it_was(world, reader):
    model, diffusion = of_data(reader), DiffusionConfig(block_size=4)
    engine = tiny.engine(world, model, diffusion)
    before = {name: x.clone() for name, x in tiny.state(engine).items()}
    evaluate(engine, reader, model, diffusion, EvalConfig(rows=4), 2)
    assert all(torch.equal(x, before[name]) for name, x in tiny.state(engine).items())


# ---- statistics ----


def test_the_bound_is_taken_on_the_full_interval_and_exact_for_single_tokens():
    trained = DiffusionConfig(block_size=4, schedule="log", beta=0.3, omega=0.8, resample=True, draws=3)
    assert likelihood_objective(trained, "levels") == DiffusionConfig(block_size=4, draws=3)
    assert likelihood_objective(trained) == DiffusionConfig(block_size=4, draws=3, masking="counts")
    single = likelihood_objective(trained.model_copy(update={"block_size": 1}), "levels")
    assert (single.beta, single.omega) == (1.0, 1.0)


def summary(sums, tokens: int) -> Evaluation:
    return Likelihood(np.array(sums), np.full(len(sums), tokens), None, None).summarize()


SUMS = st.lists(st.floats(0, 1e4), min_size=2, max_size=30)


@settings(max_examples=100, deadline=None)
@given(sums=SUMS, tokens=st.integers(1, 4096))
def test_mean_and_standard_error_over_rows(sums, tokens):
    result = summary(sums, tokens)
    per_token = [value / tokens for value in sums]
    mean = math.fsum(per_token) / len(sums)
    variance = math.fsum((value - mean) ** 2 for value in per_token) / (len(sums) - 1)
    assert result.nelbo == pytest.approx(mean, rel=1e-12)
    assert result.nelbo_stderr == pytest.approx(math.sqrt(variance / len(sums)), rel=1e-9, abs=1e-12 * mean)
    assert result.perplexity == math.exp(min(result.nelbo, 700))
    assert result.perplexity_stderr == result.perplexity * result.nelbo_stderr
    assert (result.rows, result.tokens) == (len(sums), len(sums) * tokens)


def test_one_row_has_no_standard_error():
    result = summary([31.0], 31)
    assert (result.nelbo, result.perplexity) == (1.0, math.e)
    assert math.isnan(result.nelbo_stderr)
