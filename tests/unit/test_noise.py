"""Noise: keyed by the sample, stratified over the global batch, clipped, and the schedules' weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_megatron.config import ConfigError, DiffusionConfig
from bd3_megatron.diffusion.noise import Purpose, SampleKeys, draw_noise
from bd3_megatron.diffusion.schedule import SCHEDULES, mask_probability_and_weight


def keys(slots, batch=0, batch_rows=None, epoch=0):
    slots = np.asarray(slots)
    return SampleKeys(np.full(len(slots), epoch), 100 + slots, slots, batch, batch_rows or len(slots))


@settings(max_examples=25, deadline=None)
@given(
    size=st.sampled_from([1, 2, 4, 16]),
    rows=st.integers(1, 8),
    draws=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_noise_of_a_sample_does_not_depend_on_its_company(size, rows, draws, seed):
    diffusion = DiffusionConfig(block_size=size, draws=draws)
    together = draw_noise(diffusion, 16, seed, keys(range(rows)))
    for slot in range(rows):
        alone = draw_noise(diffusion, 16, seed, keys([slot], batch_rows=rows))
        assert np.array_equal(alone.t[:, 0], together.t[:, slot])
        assert np.array_equal(alone.masked[:, 0], together.masked[:, slot])
        assert np.array_equal(alone.weight[:, 0], together.weight[:, slot])


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 8), draws=st.integers(1, 3), batch=st.integers(0, 50), seed=st.integers(0, 99))
def test_a_global_batch_fills_every_stratum_once(rows, draws, batch, seed):
    diffusion = DiffusionConfig(block_size=4, draws=draws, beta=1e-3)
    noise = draw_noise(diffusion, 32, seed, keys(range(rows), batch))
    n = rows * draws * 8
    u = (noise.t - 1e-3) / (1 - 1e-3)
    assert sorted(np.floor(u * n + 1e-9).astype(int).ravel()) == list(range(n))


def test_every_key_changes_the_noise():
    diffusion = DiffusionConfig(block_size=4, stratify=False, draws=2)
    base = draw_noise(diffusion, 64, 0, keys([0]))
    others = [
        draw_noise(diffusion, 64, 1, keys([0])),
        draw_noise(diffusion, 64, 0, keys([1])),
        draw_noise(diffusion, 64, 0, keys([0], epoch=1)),
        draw_noise(diffusion, 64, 0, keys([0]), Purpose.EVALUATE),
    ]
    assert all(not np.array_equal(base.t, other.t) for other in others)
    assert not np.array_equal(base.t[0], base.t[1])


def test_levels_are_uniform_at_every_block_of_a_batch_of_one_row():
    diffusion = DiffusionConfig(block_size=4)
    levels = np.stack([draw_noise(diffusion, 16, 0, keys([0], batch, epoch=batch)).t[0, 0] for batch in range(4000)])
    # Standard error of a uniform's mean over 4000 draws is 0.0046.
    assert np.abs(levels.mean(0) - 0.5).max() < 0.02


GOLDEN_LEVELS = [0.25169036133648803, 0.2910899679939005, 0.326719091312344, 0.35919400025953535]
GOLDEN_MASK = [2, 3, 13]


def test_golden_noise_never_moves():
    noise = draw_noise(DiffusionConfig(block_size=4), 16, 7, keys([3], batch=2, batch_rows=8, epoch=1))
    assert noise.t[0, 0].tolist() == GOLDEN_LEVELS
    assert np.flatnonzero(noise.masked[0, 0]).tolist() == GOLDEN_MASK


def test_position_zero_is_never_masked_and_weight_is_where_the_mask_is():
    noise = draw_noise(DiffusionConfig(block_size=1, beta=1.0, omega=1.0), 32, 0, keys(range(4)))
    assert not noise.masked[..., 0].any()
    assert noise.masked[..., 1:].all()
    assert np.array_equal(noise.weight != 0, noise.masked)


@pytest.mark.parametrize(("beta", "omega", "size"), [(0.3, 0.8, 4), (0.5, 1.0, 16), (0.1, 0.2, 16)])
def test_resampled_blocks_stay_inside_the_interval(beta, omega, size):
    diffusion = DiffusionConfig(block_size=size, beta=beta, omega=omega, resample=True)
    noise = draw_noise(diffusion, 64, 0, keys(range(32)))
    fraction = noise.masked.reshape(-1, 64 // size, size)[:, 1:].mean(-1)  # block 0 holds the unmasked BOS
    assert beta <= fraction.min()
    assert fraction.max() <= omega
    assert beta <= noise.t.min()
    assert noise.t.max() <= omega


def test_an_interval_that_no_block_meets_is_refused():
    with pytest.raises(ValueError, match=r"no k/4 lies in \[0.3, 0.4\]"):
        DiffusionConfig(block_size=4, beta=0.3, omega=0.4, resample=True)
    never = DiffusionConfig(block_size=128, schedule="square_root", beta=0.01, omega=0.02, resample=True)
    with pytest.raises(ConfigError, match="widen the interval"):
        draw_noise(never, 128, 0, keys([0]))


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_weight_is_the_logarithmic_derivative_of_the_mask_probability(schedule):
    t = np.linspace(0.2, 0.99, 50)
    step = 1e-6
    p, w = mask_probability_and_weight(schedule, t)
    above, below = (mask_probability_and_weight(schedule, t + s)[0] for s in (step, -step))
    slope = (above - below) / (2 * step)
    # The cosine's weight divides by p + 1e-3.
    expected = slope / (p + 1e-3) if schedule == "cosine" else slope / p
    np.testing.assert_allclose(w, expected, rtol=1e-6)


def test_log_linear_masks_a_fraction_t_and_weighs_by_its_inverse():
    noise = draw_noise(DiffusionConfig(block_size=16), 4096, 0, keys(range(8)))
    blocks = noise.masked.reshape(-1, 16)[1:]
    assert abs(blocks.mean() - 0.5) < 0.01
    weight = noise.weight[0][noise.masked[0]]
    np.testing.assert_allclose(weight, (1 / np.repeat(noise.t[0], 16, -1))[noise.masked[0]], rtol=1e-6)
