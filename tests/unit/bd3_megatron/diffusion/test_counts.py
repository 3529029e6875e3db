"""Masking by counts: exact bound, pairs, given laws, and strata that spread over rows and ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pydantic import ValidationError

from bd3_megatron.config import DiffusionConfig
from bd3_megatron.diffusion.counts import CountLaw, given_law
from bd3_megatron.diffusion.noise import Purpose, SampleKeys, draw_noise
from bd3_megatron.diffusion.strata import Strata, mirrored_pairs

COUPLINGS = ("independent", "antithetic", "complementary")


def keys(slots, batch: int = 0, batch_rows: int | None = None) -> SampleKeys:
    numbers = np.asarray(list(slots), np.int64)
    return SampleKeys(numbers * 0 + batch, numbers, numbers, batch=batch, batch_rows=batch_rows or len(numbers))


def counted(size: int, **options) -> DiffusionConfig:
    return DiffusionConfig(block_size=size, masking="counts", **options)


@pytest.mark.parametrize("size", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_block_has_the_drawn_count_and_its_weight(size, coupling):
    draws = 1 if coupling == "independent" else 2
    noise = draw_noise(counted(size, coupling=coupling, draws=draws), 64, 3, keys(range(8)))
    count = noise.masked.reshape(draws, 8, -1, size).sum(-1)  # [K, n, L / B']
    n = np.full(64 // size, size)
    n[0] -= 1
    assert not noise.masked[..., 0].any()
    np.testing.assert_allclose(noise.t, count / np.maximum(n, 1))
    total = n + 1 if coupling == "complementary" else n
    expected = np.where(count > 0, total / np.maximum(count, 1), 0)
    weight = noise.weight.reshape(draws, 8, -1, size)
    np.testing.assert_allclose(weight.max(-1), expected, rtol=1e-6)
    assert ((weight > 0) == noise.masked.reshape(weight.shape)).all()
    if coupling == "complementary":
        assert (noise.masked.sum(0)[:, 1:] == 1).all()
    else:
        assert (count[0] >= (n > 0)).all()
    if coupling == "antithetic":
        assert (count[0] + count[1] == np.where(n > 0, n + 1, 0)).all()


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_expected_weight_of_every_subset_is_that_of_the_bound(size, coupling):
    """Sum over counts of probability times weight over subsets of that size: the integral of the levels' law."""
    law = CountLaw(counted(size, coupling=coupling, draws=1 if coupling == "independent" else 2), 8 // size)
    for n in {size - 1, size} - {0}:
        block = int(np.flatnonzero(law.maskable == n)[0]) if (law.maskable == n).any() else None
        if block is None:
            continue
        cells = n + 1 if coupling == "complementary" else n
        for member in range(1 if coupling == "independent" else 2):
            found = np.zeros(n + 1)
            for cell in range(cells):  # u in the middle of each cell of equal probability
                u = np.full((1, 8 // size), (cell + 0.5) / cells)
                k = law.counts(np.concatenate([u, 1 - u][: 1 if coupling == "independent" else 2]))
                found[k[member, block]] += law.loss_weights(k)[member, block] / cells
            # In the bound the masks of k of n tokens have the weight int t^k (1-t)^(n-k) / t dt C(n, k) = 1 / k.
            np.testing.assert_allclose(found[1:], 1 / np.arange(1, n + 1), rtol=1e-12)


def test_subsets_are_uniform():
    noise = draw_noise(counted(4), 64, 0, keys(range(2000)))
    blocks = noise.masked.reshape(2000, 16, 4)[:, 1:].reshape(-1, 4)
    for k in (1, 2, 3):
        these = blocks[blocks.sum(1) == k]
        subsets = list(itertools.combinations(range(4), k))
        found = np.array([(these[:, list(s)].all(1)).sum() for s in subsets])
        assert found.sum() == len(these)
        chi = ((found - len(these) / len(subsets)) ** 2 / (len(these) / len(subsets))).sum()
        assert chi < 25  # at most 5 degrees of freedom


def test_one_token_per_block_masks_everything_with_weight_one():
    noise = draw_noise(counted(1), 32, 0, keys(range(4)))
    assert noise.masked[..., 1:].all()
    assert (noise.weight[..., 1:] == 1).all()


def test_a_given_law_is_drawn_and_weighted():
    q, weights = (0.1, 0.2, 0.3, 0.15, 0.25), (9.0, 1.0, 2.0, 3.0, 4.0)
    config = counted(4, count_probabilities=q, count_weights=weights)
    noise = draw_noise(config, 64, 1, keys(range(500)))
    k = noise.masked.reshape(500, 16, 4)[:, 1:].sum(-1)
    np.testing.assert_allclose(np.bincount(k.ravel(), minlength=5) / k.size, q, atol=0.002)
    weight = noise.weight.reshape(500, 16, 4)[:, 1:].max(-1)
    np.testing.assert_array_equal(weight, np.where(k > 0, np.array(weights)[k], 0).astype(np.float32))
    bos = noise.masked.reshape(500, 16, 4)[:, 0].sum(-1)  # of 4 drawn positions one is BOS, which is unmasked
    assert bos.mean() == pytest.approx(np.dot(q, np.arange(5)) * 3 / 4, abs=0.1)


def test_given_probabilities_alone_keep_the_bound():
    q, weights = given_law(4, (0.0, 0.1, 0.2, 0.3, 0.4), None)
    np.testing.assert_allclose(q[1:] * weights[1:], 1 / (4 * np.arange(1, 5)) * 4)


@pytest.mark.parametrize("batch", range(3))
@pytest.mark.parametrize(("rows", "groups"), [(8, 1), (7, 1), (4, 3), (16, 2)])
def test_every_stratum_is_filled_once(rows, groups, batch):
    config = DiffusionConfig(block_size=4, draws=groups, beta=1e-3)
    noise = draw_noise(config, 32, 5, keys(range(rows), batch))
    u = (noise.t - 1e-3) / (1 - 1e-3)
    cells = np.floor(u * u.size).astype(int).ravel()
    assert sorted(cells) == list(range(u.size))


def test_every_uniform_is_uniform_over_batches():
    levels = np.stack([draw_noise(DiffusionConfig(block_size=4), 16, 0, keys([2], b, 6)).t[0, 0] for b in range(3000)])
    for block in levels.T:
        histogram = np.histogram(block, 10, (0, 1))[0]
        assert ((histogram - 300) ** 2 / 300).sum() < 30  # 9 degrees of freedom


@pytest.mark.parametrize("count", [1, 2, 3, 8, 63, 512])
def test_places_are_a_permutation_in_mirrored_pairs(count):
    places = mirrored_pairs(count)
    assert sorted(places) == list(range(count))
    even = count // 2 * 2
    assert (places[0:even:2] + places[1:even:2] == count - 1).all()


@pytest.mark.parametrize(("size", "within"), [(1, 0.05), (4, 0.05), (16, 0.05), (128, 0.07), (1024, 0.07)])
@pytest.mark.parametrize("masking", ["levels", "counts"])
def test_every_rank_masks_about_the_same(size, within, masking):
    options = {} if masking == "counts" else {"beta": 0.3, "omega": 0.8}
    config = DiffusionConfig(block_size=size, masking=masking, **options)
    for batch in range(3):
        noise = draw_noise(config, 1024, 0, keys(range(512), batch))
        masked = noise.masked[0].reshape(64, -1, 1024 // size, size)
        fractions = masked.mean(axis=(1, 2, 3))
        assert abs(fractions - config.mean_masked_fraction).max() < within
        if masking == "counts" and size < 1024:
            # The same up to the first block of each of its 8 rows, which has one maskable token less.
            counts = masked.sum(axis=(1, 2, 3))
            assert counts.max() - counts.min() <= 8


def test_the_old_version_draws_as_before():
    old = Strata(1, 4, 1, 8, 1, 0.37)
    u = old.uniforms(2, 0, lambda n: np.full(n, 0.5))
    np.testing.assert_array_equal(u, ((int(0.37 * 32) + 16 + np.arange(8)) % 32 + 0.5) / 32)


@pytest.mark.parametrize("version", [1, 2])
def test_resampling_at_an_end_of_the_interval(version):
    config = DiffusionConfig(block_size=4, beta=1e-3, omega=0.5, resample=True, noise_version=version)
    noise = draw_noise(config, 64, 0, keys(range(200)), Purpose.TRAIN)
    k = noise.masked.reshape(200, 16, 4)[:, 1:].sum(-1)
    assert k.max() == 2
    assert (k.min() == 0) == (version == 2)
    config = DiffusionConfig(block_size=4, beta=0.5, omega=1.0, resample=True, noise_version=version)
    k = draw_noise(config, 64, 0, keys(range(200))).masked.reshape(200, 16, 4)[:, 1:].sum(-1)
    assert (k.min(), k.max()) == (2, 4)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"beta": 0.3}, "diffusion.beta=0.3: diffusion.masking=counts draws no noise levels; use diffusion.beta=0.001"),
        ({"schedule": "cosine"}, "diffusion.schedule=cosine: diffusion.masking=counts draws no noise levels"),
        ({"count_weights": (1.0, 2.0)}, "diffusion.count_weights: 2 numbers for the counts 0 to 4; give 5"),
        ({"count_probabilities": (0, 0.5, 0.5, 0.5, 0)}, "diffusion.count_probabilities: the sum is 1.5; it must be 1"),
        (
            {"count_probabilities": (0, 0.5, 0.5, 0, 0)},
            "diffusion.count_probabilities: 0 for 3 masked tokens, so rare",
        ),
        ({"objective": "causal", "block_size": 1}, "diffusion.masking=counts: diffusion.objective=causal masks"),
        ({"masking": "levels", "count_weights": (1.0,) * 5}, "diffusion.count_weights: only with"),
    ],
)
def test_what_does_not_fit_is_named(options, line):
    with pytest.raises(ValidationError) as error:
        DiffusionConfig(**{"block_size": 4, "masking": "counts"} | options)
    assert line in str(error.value)
