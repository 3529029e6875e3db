"""The objective by counts against the enumerated bound of a small model in fp64: every count, every subset."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bd3_megatron.config import DiffusionConfig
from bd3_megatron.diffusion.clips import count_law
from bd3_megatron.diffusion.counts import CountLaw
from bd3_megatron.diffusion.estimators import LikelihoodEstimator
from bd3_megatron.diffusion.noise import SampleKeys
from tests.unit import tiny

LENGTH, VOCABULARY, MASK = 8, 5, 4


@pytest.fixture(scope="module", params=["one document", "documents"])
def table(request):
    """By block size: nll ``[2^B', L]`` of each position, under each pattern of masks that all blocks have."""
    model = tiny.shape(length=LENGTH, vocab_size=VOCABULARY, mask_id=MASK, bos_id=0, eos_id=1)
    row = torch.tensor([[0, 2, 3, 1, 2, 2, 3, 1]])
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2]]) if request.param == "documents" else None
    found = {}
    for size in (1, 2, 4, 8):
        network = tiny.oracle(model, DiffusionConfig(block_size=size), tiny.weights_of(model)).double()
        nll = np.zeros((2**size, LENGTH))
        for pattern in range(1, 2**size):
            masked = torch.from_numpy(np.tile((pattern >> np.arange(size)) & 1 == 1, LENGTH // size))[None]
            masked[0, 0] = False
            noisy = torch.where(masked, MASK, row)
            clean = row if size < LENGTH else None
            with torch.no_grad():
                logits = network(noisy, clean, documents=documents).logits
            nats = -torch.log_softmax(logits, -1).gather(-1, row[..., None])[..., 0]
            nll[pattern] = torch.where(masked, nats, 0.0)[0].numpy()
        found[size] = nll
    return found


def subsets(size: int, block: int) -> list[int]:
    """Patterns of a block's maskable tokens, the empty one included: the first token of the row is never masked."""
    return [pattern for pattern in range(2**size) if block or not pattern & 1]


def sums_by_count(nll: np.ndarray, size: int, block: int) -> tuple[int, np.ndarray]:
    """Number n of maskable tokens, and the mean over subsets of k of them of the summed nll, ``[n + 1]``."""
    n = size - (block == 0)
    totals, numbers = np.zeros(n + 1), np.zeros(n + 1)
    for pattern in subsets(size, block):
        k = pattern.bit_count()
        totals[k] += nll[pattern, block * size : (block + 1) * size].sum()
        numbers[k] += 1
    return n, totals / numbers


def bound(nll: np.ndarray, size: int) -> float:
    """Nats of the row: the integral over all levels of 1 / t times the expected nll, exact for polynomials."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    t = (nodes + 1) / 2
    total = 0.0
    for block in range(LENGTH // size):
        n = size - (block == 0)
        for pattern in subsets(size, block)[1:] if n else []:
            k = pattern.bit_count()
            share = (weights / 2 * t ** (k - 1) * (1 - t) ** (n - k)).sum()
            total += share * nll[pattern, block * size : (block + 1) * size].sum()
    return total


@pytest.mark.parametrize("coupling", ["independent", "antithetic", "complementary"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_expected_loss_of_every_draw_is_the_bound(table, size, coupling):
    nll, draws = table[size], 1 if coupling == "independent" else 2
    law = CountLaw(DiffusionConfig(block_size=size, masking="counts", coupling=coupling, draws=draws), LENGTH // size)
    expected = np.zeros(draws)
    for block in range(LENGTH // size):
        n, sums = sums_by_count(nll, size, block)
        cells = n + 1 if coupling == "complementary" else max(n, 1)
        for cell in range(cells):
            u = np.full(LENGTH // size, (cell + 0.5) / cells)
            counts = law.counts(np.stack([u, 1 - u][:draws]))
            expected += (law.loss_weights(counts) / cells)[:, block] * sums[counts[:, block]]
    np.testing.assert_allclose(expected, bound(nll, size), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_passes_of_the_exact_estimator_add_up_to_the_bound(table, size):
    estimator = LikelihoodEstimator(DiffusionConfig(block_size=size), "exact")
    keys = SampleKeys(*(np.zeros(1, np.int64),) * 3, batch=0, batch_rows=1)
    assert estimator.passes == 2**size - 1
    total = 0.0
    for number in range(estimator.passes):
        noise = estimator.noise(LENGTH, 0, keys, number)
        total += (noise.weight[0, 0].astype(np.float64) * table[size][number + 1]).sum()
        expected = table[size][number + 1] > 0
        expected[:size] &= not (number + 1) & 1  # with the first token the pattern is no subset of the first block
        assert (noise.masked[0, 0] == expected).all()
    assert total == pytest.approx(bound(table[size], size), rel=1e-6)


@pytest.mark.parametrize(("beta", "omega", "resample"), [(0.3, 0.8, False), (0.45, 0.95, True), (1e-3, 1.0, False)])
def test_a_clip_is_a_law_of_counts(table, beta, omega, resample):
    """The expected loss under levels of an interval is that of counts with its probabilities and weights."""
    size = 4
    levels = DiffusionConfig(block_size=size, beta=beta, omega=omega, resample=resample)
    law = count_law(levels)
    given = {"count_probabilities": tuple(law.probability), "count_weights": tuple(law.weights)}
    counts = CountLaw(DiffusionConfig(block_size=size, masking="counts", **given), LENGTH // size)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    t = beta + (omega - beta) * (nodes + 1) / 2
    accepted = [k for k in range(size + 1) if not resample or beta - 1e-9 <= k / size <= omega + 1e-9]
    by_counts = by_levels = 0.0
    for block in range(LENGTH // size):
        for pattern in range(2**size):  # the first token is drawn as any other, and unmasked after
            k = pattern.bit_count()
            s = table[size][pattern & ~1 if block == 0 else pattern, block * size : (block + 1) * size].sum()
            by_counts += counts.cumulative[k] * s * counts.weights[k] / math.comb(size, k) - (
                counts.cumulative[k - 1] * s * counts.weights[k] / math.comb(size, k) if k else 0
            )
            if k in accepted:
                kept = sum(math.comb(size, j) * t**j * (1 - t) ** (size - j) for j in accepted)
                by_levels += (weights / 2 / t * t**k * (1 - t) ** (size - k) / kept).sum() * s
    assert by_counts == pytest.approx(by_levels, rel=2e-4)
