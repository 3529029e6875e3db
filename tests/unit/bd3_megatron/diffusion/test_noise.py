"""Noise: keyed by the sample, stratified over the global batch, coupled, clipped, and the schedules' weights."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_common.errors import ConfigError
from bd3_megatron.config import DiffusionConfig
from bd3_megatron.diffusion.noise import Noise, Purpose, SampleKeys, draw_noise
from bd3_megatron.diffusion.schedules import SCHEDULES
from pretrain.config.values import validate


def keys(slots, batch=0, batch_rows=None, epoch=0):
    slots = np.asarray(slots)
    return SampleKeys(np.full(len(slots), epoch), 100 + slots, slots, batch, batch_rows or len(slots))


@settings(max_examples=25, deadline=None)
@given(
    size=st.sampled_from([1, 2, 4, 16]),
    rows=st.integers(1, 8),
    draws=st.sampled_from([(1, "independent"), (2, "independent"), (2, "antithetic"), (4, "complementary")]),
    seed=st.integers(0, 99),
)
def test_noise_of_a_sample_does_not_depend_on_its_company(size, rows, draws, seed):
    diffusion = DiffusionConfig(block_size=size, draws=draws[0], coupling=draws[1])
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
GOLDEN_TWO_LEVELS = [
    [0.3830478256597818, 0.39290758708556073, 0.4018237841121982, 0.4099506382030869],
    [0.41441392572338664, 0.4280509117913208, 0.4348155355191243, 0.43937001792927843],
]
GOLDEN_TWO_MASKS = [[2, 3, 5, 8, 13], [1, 4, 5, 6, 8, 13, 15]]


def test_golden_noise_never_moves():
    first = DiffusionConfig(block_size=4, noise_version=1)
    noise = draw_noise(first, 16, 7, keys([3], batch=2, batch_rows=8, epoch=1))
    assert noise.t[0, 0].tolist() == GOLDEN_LEVELS
    assert np.flatnonzero(noise.masked[0, 0]).tolist() == GOLDEN_MASK
    clipped = DiffusionConfig(block_size=4, draws=2, beta=0.25, omega=0.75, resample=True, noise_version=1)
    noise = draw_noise(clipped, 16, 7, keys([3], batch=2, batch_rows=8, epoch=1))
    assert noise.t[:, 0].tolist() == GOLDEN_TWO_LEVELS
    assert [np.flatnonzero(row).tolist() for row in noise.masked[:, 0]] == GOLDEN_TWO_MASKS


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
    never = DiffusionConfig(block_size=1024, schedule="square_root", beta=0.01, omega=0.02, resample=True)
    with pytest.raises(ConfigError, match="widen the interval"):
        draw_noise(never, 1024, 0, keys([0]))


@pytest.mark.parametrize("schedule", SCHEDULES.names())
def test_weight_is_the_logarithmic_derivative_of_the_mask_probability(schedule):
    t = np.linspace(0.2, 0.99, 50)
    step = 1e-6
    made = SCHEDULES.instance(schedule)
    p, w = made.mask_probability(t), made.loss_weight(t)
    above, below = (made.mask_probability(t + s) for s in (step, -step))
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


# ---- pairs of draws ----

PAIRS = ("antithetic", "complementary")
COUPLINGS = ("independent", *PAIRS)


def sampled(diffusion: DiffusionConfig, count: int, length: int):
    """Noise of ``count`` samples, each its own global batch where levels are stratified."""
    if not diffusion.stratify:
        return draw_noise(diffusion, length, 0, keys(range(count)))
    parts = [draw_noise(diffusion, length, 0, keys([0], batch, epoch=batch)) for batch in range(count)]
    return Noise(
        *(np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("t", "masked", "weight"))
    )


@settings(max_examples=50, deadline=None)
@given(
    coupling=st.sampled_from(PAIRS),
    draws=st.sampled_from([2, 4]),
    ends=st.sampled_from([(1e-3, 1.0), (0.3, 0.7), (0.3, 0.8), (0.1, 0.5)]),
    size=st.sampled_from([1, 4, 16]),
    stratify=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_pair_mirrors_its_levels_and_complements_its_masks(coupling, draws, ends, size, stratify, seed):
    beta, omega = ends
    config = {"block_size": size, "draws": draws, "beta": beta, "omega": omega, "stratify": stratify}
    noise = draw_noise(DiffusionConfig(**config, coupling=coupling), 32, seed, keys(range(3)))
    first, second = noise.t[0::2], noise.t[1::2]
    np.testing.assert_allclose(first + second, beta + omega, rtol=1e-12)
    assert min(first.min(), second.min()) >= beta
    if coupling == "complementary":
        one, other = noise.masked[0::2, :, 1:], noise.masked[1::2, :, 1:]
        assert beta + omega < 1 or (one | other).all()
        assert beta + omega > 1 or not (one & other).any()
    if draws == 4:
        assert not np.isin(noise.t[0], noise.t[2:]).any()


@settings(max_examples=25, deadline=None)
@given(
    coupling=st.sampled_from(PAIRS),
    rows=st.integers(1, 8),
    pairs=st.integers(1, 3),
    batch=st.integers(0, 50),
    seed=st.integers(0, 99),
)
def test_first_and_second_draws_of_pairs_each_fill_every_stratum_once(coupling, rows, pairs, batch, seed):
    diffusion = DiffusionConfig(block_size=4, draws=2 * pairs, coupling=coupling)
    noise = draw_noise(diffusion, 32, seed, keys(range(rows), batch))
    n = rows * pairs * 8
    for half in (0, 1):
        u = (noise.t[half::2] - 1e-3) / (1 - 1e-3)
        assert sorted(np.floor(u * n + 1e-9 * (1 - 2 * half)).astype(int).ravel()) == list(range(n))


@pytest.mark.parametrize("stratify", [True, False])
@pytest.mark.parametrize(("draws", "coupling"), [(2, "independent"), (2, "antithetic"), (4, "complementary")])
def test_each_draw_by_itself_has_the_law_of_a_single_draw(draws, coupling, stratify):
    count = 3000
    diffusion = DiffusionConfig(block_size=2, draws=draws, coupling=coupling, stratify=stratify)
    noise = sampled(diffusion, count, 8)
    # Of t uniform on [0, 1]: deciles of t, and of a block's two bits the chance of one and of both.
    error = 4.5 / np.sqrt(count)
    for draw, block in itertools.product(range(draws), (1, 2, 3)):
        t, bits = noise.t[draw, :, block], noise.masked[draw, :, 2 * block : 2 * block + 2]
        deciles = np.histogram(t, np.linspace(0, 1, 11))[0] / count
        assert np.abs(deciles - 0.1).max() < error * np.sqrt(0.1 * 0.9)
        assert np.abs(bits.mean(0) - 0.5).max() < error * 0.5
        assert abs(bits.all(1).mean() - 1 / 3) < error * np.sqrt(2 / 9)
        # Given the level, bits are Bernoulli(t): their mean's distance to t is zero in every part of the interval.
        for low in (t < 0.3, t > 0.7):
            assert abs((bits[low].mean(1) - t[low]).mean()) < error * 0.5


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_resampled_draws_keep_the_law_of_a_single_draw(coupling):
    """The masked counts of a block of 4 in [.25, .75]: binomial at t, given 1 to 3, averaged over t."""
    diffusion = DiffusionConfig(
        block_size=4, draws=2, beta=0.25, omega=0.75, resample=True, coupling=coupling, stratify=False
    )
    noise = draw_noise(diffusion, 64, 0, keys(range(400)))
    masked = noise.masked.reshape(2, 400, 16, 4)[:, :, 1:]
    counts = masked.sum(-1)
    assert (counts.min(), counts.max()) == (1, 3)
    t = np.linspace(0.25, 0.75, 2001)
    chances = np.stack([4 * t * (1 - t) ** 3, 6 * t**2 * (1 - t) ** 2, 4 * t**3 * (1 - t)])
    expected = (chances / chances.sum(0)).mean(1)
    for draw in (0, 1):
        found = [(counts[draw] == k).mean() for k in (1, 2, 3)]
        assert np.abs(found - expected).max() < 4.5 * 0.5 / np.sqrt(counts[draw].size)
    if coupling == "complementary":
        assert (masked[0] ^ masked[1]).all()


def test_the_bits_of_an_antithetic_pair_are_independent_given_the_levels():
    noise = draw_noise(DiffusionConfig(block_size=4, draws=2, coupling="antithetic"), 512, 0, keys(range(40)))
    p = np.repeat(noise.t, 4, axis=-1)[:, :, 1:]
    (one, other), (p_one, p_other) = noise.masked[:, :, 1:], p
    assert abs((one & other).mean() - (p_one * p_other).mean()) < 4.5 * 0.4 / np.sqrt(one.size)
    covariance = ((one - p_one) * (other - p_other)).mean()
    assert abs(covariance) < 4.5 * 0.25 / np.sqrt(one.size)


def nll_of_a_block(masked: np.ndarray) -> np.ndarray:
    """Of a model of two tokens: each is easier when the other is seen. ``[..., 2] -> [..., 2]``."""
    return np.where(masked, np.where(masked.all(-1, keepdims=True), [3.0, 2.0], [1.0, 0.5]), 0)


@pytest.mark.parametrize("stratify", [True, False])
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(("beta", "omega"), [(0.05, 1.0), (0.3, 0.8)])
def test_the_mean_of_the_loss_is_the_closed_form_under_every_coupling(beta, omega, coupling, stratify):
    """One token alone is masked with probability 2 t (1 - t), both with t^2, and the weight is 1 / t."""
    diffusion = DiffusionConfig(block_size=2, draws=2, beta=beta, omega=omega, coupling=coupling, stratify=stratify)
    count = 3000
    noise = sampled(diffusion, count, 4)
    losses = (noise.weight * nll_of_a_block(noise.masked.reshape(2, count, 2, 2)).reshape(2, count, 4))[:, :, 2:]
    estimate = losses.sum(-1).mean(0)  # the second block of each sample, mean over the pair
    mean_t = (beta + omega) / 2
    expected = (1 - mean_t) * 1.5 + mean_t * 5
    error = estimate.std(ddof=1) / np.sqrt(count)
    assert error < 0.03 * expected
    assert abs(estimate.mean() - expected) < 4 * error


def test_complements_vary_less_than_mirrored_levels_and_those_less_than_independent_draws():
    variances = []
    for coupling in COUPLINGS:
        diffusion = DiffusionConfig(block_size=2, draws=2, beta=0.2, coupling=coupling, stratify=False)
        noise = draw_noise(diffusion, 512, 0, keys(range(40)))
        blocks = noise.masked.reshape(2, 40, 256, 2)
        losses = noise.weight * nll_of_a_block(blocks).reshape(noise.weight.shape)
        variances.append(losses.reshape(2, 40, 256, 2)[:, :, 1:].sum(-1).mean(0).var())
    independent, antithetic, complementary = variances
    assert complementary < 0.8 * antithetic
    assert antithetic < 0.95 * independent


def test_all_tokens_masked_leaves_nothing_to_couple():
    everything = DiffusionConfig(block_size=1, beta=1.0, omega=1.0, draws=2, coupling="complementary")
    assert draw_noise(everything, 32, 0, keys(range(4))).masked[..., 1:].all()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"draws": 3, "coupling": "antithetic"},
            "diffusion.draws=3: diffusion.coupling=antithetic takes draws in pairs; use an even number, or "
            "diffusion.coupling=independent",
        ),
        ({"draws": 1, "coupling": "complementary"}, "diffusion.draws=1: diffusion.coupling=complementary takes"),
        (
            {"draws": 1, "coupling": "antithetic", "objective": "causal", "block_size": 1},
            "diffusion.coupling=antithetic: diffusion.objective=causal draws no noise; use independent",
        ),
        (
            {"draws": 2, "coupling": "complementary", "beta": 0.3, "omega": 0.8, "resample": True},
            "diffusion.resample=true: with diffusion.coupling=complementary it needs the loglinear schedule and "
            "beta + omega = 1, not loglinear and 1.1; use diffusion.coupling=antithetic or diffusion.resample=false",
        ),
        (
            {"draws": 2, "coupling": "complementary", "beta": 0.3, "omega": 0.7, "resample": True, "schedule": "log"},
            "diffusion.resample=true: with diffusion.coupling=complementary it needs the loglinear schedule",
        ),
    ],
)
def test_pairs_that_cannot_be_are_refused_in_one_line(options, line):
    with pytest.raises(ConfigError) as caught:
        validate(DiffusionConfig, options)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
