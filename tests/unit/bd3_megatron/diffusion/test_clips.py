"""Clip search: laws of counts against draws, variances of a planted model in closed form, and the choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bd3_megatron.config import DiffusionConfig
from bd3_megatron.diffusion.clips import (
    CountMoments,
    accepted,
    choose,
    count_law,
    default_grid,
    jackknife_groups,
    search_objective,
)
from bd3_megatron.diffusion.noise import Purpose, SampleKeys, draw_noise, strata_of
from bd3_megatron.diffusion.schedules import SCHEDULES


def keys(count: int, batch: int = 0) -> SampleKeys:
    numbers = np.arange(count)
    return SampleKeys(numbers * 0 + batch, numbers, numbers, batch=batch, batch_rows=count)


def test_the_grid_is_that_of_the_paper():
    grid = default_grid(4)
    assert len(grid) == len(set(grid)) == 36
    assert all(0 < low < high <= 1 for low, high in grid)
    assert {round(high - (low if low > 1e-3 else 0), 2) for low, high in grid} == {0.5, 0.6, 0.7, 0.8, 0.9, 1.0}
    assert default_grid(1) == ((1e-3, 1.0), (1.0, 1.0))


@pytest.mark.parametrize("size", [1, 2, 4, 16, 128])
def test_the_whole_interval_weighs_counts_as_the_bound_does(size):
    law = count_law(DiffusionConfig(block_size=size))
    assert law.probability.sum() == pytest.approx(1)
    # Levels below 1e-3 are missing: of their masks nearly all have one token.
    np.testing.assert_allclose(law.first[1:], 1 / np.arange(1, size + 1), rtol=2e-3 * size + 1e-3)
    np.testing.assert_allclose(law.first[2:], 1 / np.arange(2, size + 1), rtol=1e-2)


@pytest.mark.parametrize("schedule", SCHEDULES.names())
@pytest.mark.parametrize(
    ("beta", "omega", "resample"), [(0.3, 0.8, False), (0.5, 1.0, True), (1e-3, 0.5, True), (0.45, 0.95, True)]
)
def test_the_law_is_that_of_the_drawn_masks(schedule, beta, omega, resample):
    config = DiffusionConfig(block_size=4, schedule=schedule, beta=beta, omega=omega, resample=resample)
    law = count_law(config)
    noise = draw_noise(config, 64, 0, keys(3000))
    counts = noise.masked.reshape(3000, 16, 4)[:, 1:].sum(-1)
    weights = SCHEDULES.instance(schedule).loss_weight(noise.t[0][:, 1:])
    found = np.bincount(counts.ravel(), minlength=5) / counts.size
    np.testing.assert_allclose(law.probability, found, atol=0.006)
    for expected, power in ((law.first, 1), (law.second, 2)):
        if power == 2 and beta < 0.1:
            continue  # its heavy tail is what draws cannot show
        drawn = np.array([(weights**power)[counts == k].sum() for k in range(5)]) / counts.size
        np.testing.assert_allclose(drawn, expected, rtol=0.05, atol=0.03)


@pytest.mark.parametrize(
    ("beta", "omega", "kept"),
    [(1e-3, 0.5, "11100"), (0.5, 1.0, "00111"), (0.3, 0.8, "00110"), (0.2, 0.7, "01100"), (1e-3, 1.0, "11111")],
)
def test_an_end_of_the_whole_interval_rejects_nothing(beta, omega, kept):
    assert "".join(str(int(x)) for x in accepted(4, beta, omega)) == kept


def planted(counts: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """Block sums S with mean 2 k and variance k^2 / 4: moments known by count."""
    return counts * (2 + 0.5 * chance.standard_normal(counts.shape))


def variance_of(law, size: int) -> float:
    k = np.arange(size + 1)
    m1, m2 = 2 * k / size, (4 + 0.25) * k**2 / size**2
    return law.second @ m2 - (law.first @ m1) ** 2


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("resample", [False, True])
def test_planted_variances_are_found_from_256_rows(size, resample):
    config = DiffusionConfig(block_size=size, resample=resample)
    length, rows = 128, 256
    noise = draw_noise(search_objective(config), length, 0, keys(rows))
    counts = np.rint(noise.t[0] * size).astype(int)
    moments, chance = CountMoments(size), np.random.default_rng(0)
    moments.add(np.arange(rows) % 8, counts, planted(counts, chance))
    grid = default_grid(size)
    laws = [count_law(config.model_copy(update={"beta": b, "omega": o})) for b, o in grid]
    exact = np.array([variance_of(law, size) for law in laws])
    _, found, _ = moments.variances(laws)
    np.testing.assert_allclose(found, exact, rtol=0.05)
    chosen = choose(moments, config, grid)
    assert grid[chosen.best] == grid[int(np.argmin(exact))]
    assert chosen.interval == grid[chosen.best]
    again = choose(moments, config.model_copy(update=dict(zip(("beta", "omega"), chosen.interval))), grid)
    assert again.interval == chosen.interval
    assert again.differences[again.best] == 0


def test_rows_in_any_order_and_in_parts_give_the_same_moments():
    size, counts = 4, np.array(list(itertools.islice(itertools.cycle([1, 2, 3, 4]), 64 * 8))).reshape(64, 8)
    nll = planted(counts, np.random.default_rng(1))
    whole, parts = CountMoments(size), [CountMoments(size) for _ in range(2)]
    whole.add(np.arange(64) % 8, counts, nll)
    for part, some in zip(parts, (slice(0, 40), slice(40, 64))):
        part.add(np.arange(64)[some] % 8, counts[some], nll[some])
    np.testing.assert_allclose(parts[0].sums + parts[1].sums, whole.sums, rtol=1e-12)


def test_a_row_length_of_one_block_needs_no_moment_for_every_count():
    size, rows = 128, 512
    config = DiffusionConfig(block_size=size)
    noise = draw_noise(search_objective(config), size, 0, keys(rows))
    counts = np.rint(noise.t[0] * size).astype(int)
    moments = CountMoments(size)
    moments.add(np.arange(rows) % 8, counts, planted(counts, np.random.default_rng(0)))
    laws = [count_law(config.model_copy(update={"beta": b, "omega": o})) for b, o in default_grid(size)]
    exact = np.array([variance_of(law, size) for law in laws])
    _, found, _ = moments.variances(laws)
    np.testing.assert_allclose(found[1:], exact[1:], rtol=0.15)


def test_an_interval_moves_only_where_that_is_significant():
    chance = np.random.default_rng(0)
    counts = chance.integers(1, 5, (64, 8))
    moments = CountMoments(4)
    moments.add(np.arange(64) % 8, counts, planted(counts, chance))
    config = DiffusionConfig(block_size=4, beta=0.3, omega=0.8)
    grid = ((0.3, 0.8), (0.5, 1.0))
    found = choose(moments, config, grid)
    assert found.errors[0] == found.differences[0] == 0
    assert (found.best, found.interval) == (1, (0.5, 1.0))
    deviations = -found.differences[1] / found.errors[1]
    assert choose(moments, config, grid, deviations * 1.01).interval == (0.3, 0.8)
    assert choose(moments, config, grid, deviations * 0.99).interval == (0.5, 1.0)


def test_the_error_of_a_difference_is_what_repeated_draws_show():
    config, chance = DiffusionConfig(block_size=4, beta=0.3, omega=0.8), np.random.default_rng(0)
    found = []
    for _ in range(200):
        counts = chance.integers(1, 5, (64, 8))
        moments = CountMoments(4)
        moments.add(np.arange(64) % 8, counts, planted(counts, chance))
        one = choose(moments, config, ((0.3, 0.8), (0.5, 1.0)))
        found.append((one.differences[1], one.errors[1]))
    differences, errors = np.array(found).T
    assert np.sqrt((errors**2).mean()) == pytest.approx(differences.std(), rel=0.2)


@pytest.mark.parametrize(("size", "length"), [(4, 128), (16, 128), (64, 128), (128, 128), (128, 1024)])
def test_the_error_is_about_that_of_repeated_searches_with_blocks_of_any_size(size, length):
    """Groups of rows whose counts are spread as those of all rows: else the error is that between low and high."""
    config = DiffusionConfig(block_size=size, beta=0.3, omega=0.8)
    drawing, rows, found = search_objective(config), 256, []
    for number in range(24):
        of_rows = keys(rows, number)
        noise = draw_noise(drawing, length, 0, of_rows, Purpose.SEARCH)
        counts = np.rint(noise.t[0] * size).astype(int)
        moments = CountMoments(size)
        groups = jackknife_groups(strata_of(drawing, length, 0, of_rows, Purpose.SEARCH), of_rows.slots)
        assert (np.bincount(groups) == rows / 8).all()
        chance = np.random.default_rng(number)
        moments.add(groups, counts, counts * (2 + 0.5 * chance.standard_normal(counts.shape) / np.sqrt(counts)))
        one = choose(moments, config, ((0.3, 0.8), (0.5, 1.0)))
        found.append((one.differences[1], one.errors[1], one.interval))
        assert one.interval == (0.5, 1.0)
    differences, errors = np.array([f[:2] for f in found]).T
    assert 0.6 < np.sqrt((errors**2).mean()) / differences.std() < 3


def test_a_variance_that_is_not_finite_moves_nothing():
    moments = CountMoments(4)
    counts = np.tile([1, 2, 3, 4], (64, 2))
    moments.add(np.arange(64) % 8, counts, counts * np.nan)
    config = DiffusionConfig(block_size=4, beta=0.3, omega=0.8)
    assert choose(moments, config, ((0.5, 1.0), (0.3, 0.8))).interval == (0.3, 0.8)
