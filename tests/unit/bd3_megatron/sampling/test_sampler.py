"""The sampler: its forward pass against training's, what each method does, and the plain-torch model's samples."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_megatron.config import DiffusionConfig
from bd3_megatron.model import BlockDiffusionModel
from bd3_megatron.sampling import sampler
from bd3_megatron.sampling.algorithms import DECODING_ALGORITHMS, DecodingAlgorithm
from bd3_megatron.sampling.block import Block, BlockLogits, Sampling, probabilities
from bd3_megatron.sampling.cache import BlockForward
from bd3_megatron.sampling.sampler import log_likelihood, sample
from tests.unit import tiny

CAUSAL = DiffusionConfig(objective="causal", block_size=1)
BLOCKS = {size: DiffusionConfig(block_size=size) for size in (1, 4, 16)}
ALL_OBJECTIVES = [CAUSAL, *BLOCKS.values()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(diffusion: DiffusionConfig, backbone: str = "qwen3", **changes) -> BlockDiffusionModel:
    model = tiny.shape(backbone, **changes)
    return tiny.build(model, diffusion, tiny.weights_of(model))


def prompt(length: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.from_numpy(tiny.rows_of(tiny.shape(), rows, seed))[:, :length]


# ---- the forward pass ----


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_block_by_block_logits_equal_the_two_streams_of_training(backbone, size):
    model, diffusion = tiny.shape(backbone), BLOCKS[size]
    trained = tiny.build(model, diffusion, tiny.weights_of(model))
    batch = tiny.batch_of(model, diffusion, 3)
    noisy, clean = batch.input_ids.chunk(2)
    with torch.no_grad():
        expected = trained.logits(trained.hidden_states(batch.input_ids)[: model.length]).transpose(0, 1)
    forward = BlockForward(trained)
    for start in range(0, model.length, size):
        block = slice(start, start + size)
        found = forward.logits(noisy[:, block])
        assert torch.equal(forward.logits(noisy[:, block]), found)  # looking changes nothing
        torch.testing.assert_close(found, expected[:, block], rtol=1e-5, atol=1e-5)
        forward.append(clean[:, block])
    assert forward.length == model.length


@pytest.mark.usefixtures("world")
def test_the_cached_causal_forward_equals_the_whole_row():
    model = network(CAUSAL)
    rows = prompt(16, 3)
    with torch.no_grad():
        expected = model.logits(model.hidden_states(rows)).transpose(0, 1)
    forward = BlockForward(model)
    for position in range(16):
        token = rows[:, position : position + 1]
        torch.testing.assert_close(forward.logits(token)[:, 0], expected[:, position], rtol=1e-5, atol=1e-5)
        forward.append(token)


@pytest.mark.usefixtures("world")
def test_only_chosen_positions_reach_the_head(monkeypatch):
    model, block = network(BLOCKS[4]), prompt(4, 3)
    chosen = torch.tensor([[False, True, False, True], [False] * 4, [True, False, False, False]])
    forward = BlockForward(model)
    expected = forward.logits(block)[chosen]
    widths, head = [], model.logits
    monkeypatch.setattr(model, "logits", lambda rows: widths.append(rows.shape) or head(rows))
    torch.testing.assert_close(forward.logits(block, chosen), expected)
    sample(model, prompt(1), 15, Sampling(), None, generator())
    assert widths == [(3, 32), *[(2, 32)] * 15]  # of a sample, one position per row and forward pass


@pytest.mark.usefixtures("world")
def test_training_goes_on_as_before_once_a_sample_was_taken():
    model, batch = network(BLOCKS[4]), tiny.batch_of(tiny.shape(), BLOCKS[4], 2)
    with torch.no_grad():
        before = model(batch)
        sample(model, prompt(1), 15, Sampling(), None, generator())
        assert torch.equal(model(batch), before)


@pytest.mark.usefixtures("world")
def test_the_likelihood_needs_blocks_of_one_token():
    with pytest.raises(ValueError, match="blocks of one token"):
        log_likelihood(network(BLOCKS[4]), prompt(16))


# ---- filling one block ----


def recorded(vocabulary: int = 7) -> tuple[list[Tensor], BlockLogits]:
    """A stand-in for the model: random logits (-inf for the mask, the last id), and the blocks it was shown."""
    seen: list[Tensor] = []

    def logits(block: Tensor, chosen: Tensor) -> Tensor:
        assert (block[chosen] == vocabulary - 1).all()  # nothing else is predicted
        seen.append(block.clone())
        values = torch.randn(int(chosen.sum()), vocabulary, generator=generator(len(seen)))
        values[..., -1] = -math.inf
        return values

    return seen, logits


def decode(block: Tensor, logits: BlockLogits, sampling: Sampling, chance: torch.Generator) -> int:
    """Decode ``block`` in place; the number of forward passes."""
    state = Block(block, 6, logits, sampling, chance)
    DECODING_ALGORITHMS.load(sampling.method)(sampling.options).decode(state)
    return state.calls


@st.composite
def partly_masked(draw) -> Tensor:
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    masked = draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows))
    return torch.where(torch.tensor(masked), 6, 2)


@settings(max_examples=60, deadline=None)
@given(block=partly_masked(), seed=st.integers(0, 99))
def test_first_hitting_unmasks_one_position_per_row_and_call(block, seed):
    before, masks = block.clone(), (block == 6).sum(1)
    seen, logits = recorded()
    calls = decode(block, logits, Sampling(), generator(seed))
    assert calls == len(seen) == masks.max()
    for earlier, later in zip(seen, [*seen[1:], block]):
        unmasked = (earlier == 6) & (later != 6)
        assert torch.equal(unmasked.sum(1), (earlier == 6).any(1).long())
        assert torch.equal(earlier[earlier != 6], later[earlier != 6])  # what is known stays
    assert not (block == 6).any()
    assert torch.equal(block[before != 6], before[before != 6])


def test_first_hitting_takes_every_order_equally_often():
    block = torch.full((6000, 3), 6)
    seen, logits = recorded()
    decode(block, logits, Sampling(), generator())
    first = (seen[1] != 6).double().argmax(1)
    second = ((seen[2] != 6) & (seen[1] == 6)).double().argmax(1)
    counts = torch.bincount(first * 3 + second, minlength=9).view(3, 3)
    assert torch.count_nonzero(counts.diagonal()) == 0
    orders = counts[~torch.eye(3, dtype=torch.bool)]
    assert ((orders - 1000).abs() < 5 * math.sqrt(1000 * 5 / 6)).all()  # five standard deviations


@settings(max_examples=40, deadline=None)
@given(block=partly_masked(), steps=st.integers(1, 12), seed=st.integers(0, 99))
def test_ancestral_sampling_calls_only_when_something_is_unmasked(block, steps, seed):
    before = block.clone()
    seen, logits = recorded()
    calls = decode(block, logits, Sampling("steps", steps), generator(seed))
    assert calls == len(seen) <= steps
    for earlier, later in zip(seen, [*seen[1:], block]):
        assert (earlier != later).any()
        assert torch.equal(earlier[earlier != 6], later[earlier != 6])
    assert not (block == 6).any()
    assert torch.equal(block[before != 6], before[before != 6])


class Undecided(DecodingAlgorithm):
    """Reveals all, and at first takes the even positions back."""

    def step(self, block: Block) -> None:
        chosen = block.masked
        block.reveal(chosen, block.draw(block.logits(chosen)))
        if block.steps_taken == 0:
            even = torch.arange(block.ids.shape[1]) % 2 == 0
            block.mask(even.expand_as(chosen))


def test_an_algorithm_may_mask_again():
    ids = torch.full((2, 8), 6)
    seen, logits = recorded()
    block = Block(ids, 6, logits, Sampling(), generator())
    assert block.levels.tolist() == [1.0, 1.0]
    Undecided().decode(block)
    assert (block.calls, block.steps_taken) == (2, 2)
    assert [(state == 6).sum(1).tolist() for state in [*seen, ids]] == [[8, 8], [4, 4], [0, 0]]


def test_one_step_unmasks_all_in_one_call():
    block = torch.full((3, 8), 6)
    seen, logits = recorded()
    assert decode(block, logits, Sampling("steps", 1), generator()) == len(seen) == 1


def test_ancestral_sampling_unmasks_equal_shares():
    """From t to s < t a mask goes with probability (t - s) / t, so each of T steps unmasks 1 / T of the masks."""
    block = torch.full((2000, 4), 6)
    seen, logits = recorded()
    assert decode(block, logits, Sampling("steps", 4), generator()) == 4
    left = [int((state == 6).sum()) for state in [*seen, block]]
    for before, after in itertools.pairwise(left):
        assert abs(before - after - 2000) < 5 * math.sqrt(8000 * 0.25 * 0.75)


# ---- the distribution of one token ----

LOGITS = st.lists(st.floats(-20, 20), min_size=2, max_size=12)


@settings(max_examples=100, deadline=None)
@given(values=LOGITS, top_p=st.floats(0.01, 1), temperature=st.floats(0.05, 5))
def test_the_nucleus_is_the_smallest_head_that_holds_top_p(values, top_p, temperature):
    logits = torch.tensor([*values, -math.inf])
    p = probabilities(logits, Sampling(top_p=top_p, temperature=temperature))
    full = torch.softmax(logits.double() / temperature, -1)
    assert p.dtype == torch.float64
    assert p.sum() == pytest.approx(1)
    assert p[-1] == 0  # the mask
    kept = p > 0
    assert kept[full.argmax()]
    mass = full[kept].sum()
    assert mass >= min(top_p, 1) - 1e-9
    assert mass - full[kept].min() < top_p + 1e-9  # one token fewer would not do
    assert full[kept].min() >= full[:-1][~kept[:-1]].max() if (~kept[:-1]).any() else True
    torch.testing.assert_close(p[kept], full[kept] / mass)


def test_temperature_zero_takes_the_likeliest_token_whatever_the_nucleus():
    logits = torch.randn(5, 4, 9, generator=generator())
    for top_p in (0.1, 1.0):
        p = probabilities(logits, Sampling(top_p=top_p, temperature=0))
        assert torch.equal(p, torch.nn.functional.one_hot(logits.argmax(-1), 9).double())


@pytest.mark.parametrize("temperature", [1e-9, 1e-320])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature):
    logits = 30 * torch.randn(6, 9, generator=generator())
    logits[:, -1] = -math.inf
    p = probabilities(logits, Sampling(temperature=temperature))
    assert torch.equal(p, torch.nn.functional.one_hot(logits.argmax(-1), 9).double())


# ---- whole samples ----

METHODS = [Sampling(), Sampling("steps"), Sampling("steps", 2)]


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("sampling", METHODS, ids=["first_hitting", "steps", "two steps"])
@pytest.mark.parametrize("diffusion", ALL_OBJECTIVES, ids=["causal", "1", "4", "16"])
@pytest.mark.parametrize("given_tokens", [1, 4, 7])
def test_the_prompt_is_kept_and_the_rest_is_new(diffusion, sampling, given_tokens):
    begun = prompt(given_tokens)
    untouched, reported = begun.clone(), []
    done = sample(network(diffusion), begun, 8, sampling, None, generator(), reported.append)
    assert torch.equal(begun, untouched)
    assert done.ids.shape == (2, given_tokens + 8)
    assert torch.equal(done.ids[:, :given_tokens], begun)
    assert not (done.ids == tiny.MASK).any()
    assert done.ends == [given_tokens + 8] * 2
    assert reported[-1] == given_tokens + 8
    assert reported == sorted(reported)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("diffusion", ALL_OBJECTIVES, ids=["causal", "1", "4", "16"])
def test_the_seed_decides_the_sample_and_temperature_zero_the_token(diffusion):
    model = network(diffusion)

    def drawn(seed: int, sampling: Sampling) -> Tensor:
        return sample(model, prompt(1, 8), 15, sampling, None, generator(seed)).ids

    one, same, other = (drawn(seed, Sampling(top_p=1.0)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    greedy = [drawn(seed, Sampling("steps", 1, temperature=0)) for seed in (1, 2)]
    assert torch.equal(*greedy)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(("size", "nfe"), [(1, 15), (4, 15), (16, 15)])
def test_nfe_counts_the_calls_that_change_state(size, nfe):
    assert sample(network(BLOCKS[size]), prompt(1), 15, Sampling(), None, generator()).nfe == nfe
    blocks = 16 // size if size > 1 else 15
    assert sample(network(BLOCKS[size]), prompt(1), 15, Sampling("steps", 1), None, generator()).nfe == blocks


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("diffusion", ALL_OBJECTIVES, ids=["causal", "1", "4", "16"])
def test_a_row_that_would_be_too_long_is_refused(diffusion):
    model = network(diffusion)
    for given_tokens, new in ((1, 16), (16, 1), (7, 10)):
        with pytest.raises(ValueError, match="17 tokens are more than the model's row of 16"):
            sample(model, prompt(given_tokens), new, Sampling(), None, generator())
    assert sample(model, prompt(15), 1, Sampling(), None, generator()).ids.shape == (2, 16)


@pytest.mark.usefixtures("world")
def test_a_prompt_that_holds_the_mask_is_refused():
    """Its masks would be filled like any other, and the prompt not kept."""
    masked = prompt(4)
    masked[1, 2] = tiny.MASK
    for diffusion in ALL_OBJECTIVES:
        with pytest.raises(ValueError, match=f"mask id {tiny.MASK}"):
            sample(network(diffusion), masked, 4, Sampling(), None, generator())


def likely_end(diffusion: DiffusionConfig, chance: float) -> BlockDiffusionModel:
    """A model that draws EOS with about this probability everywhere: its head knows the bias alone."""
    model = tiny.shape("dit")
    weights = tiny.weights_of(model)
    weights["output_layer.weight"] = torch.zeros_like(weights["output_layer.weight"])
    bias = torch.zeros(tiny.VOCABULARY)
    bias[tiny.EOS] = math.log(chance / (1 - chance) * (tiny.VOCABULARY - 2))
    return tiny.build(model, diffusion, weights | {"output_layer.bias": bias})


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("diffusion", ALL_OBJECTIVES, ids=["causal", "1", "4", "16"])
def test_a_row_ends_at_its_first_new_eos(diffusion):
    model = likely_end(diffusion, 0.2)
    begun = prompt(3, 16)
    begun[:, 1] = tiny.EOS  # in a prompt it ends nothing
    free = sample(model, begun, 13, Sampling(top_p=1.0), None, generator())
    ended = sample(model, begun, 13, Sampling(top_p=1.0), tiny.EOS, generator())
    assert free.ends == [16] * 16
    assert len(set(ended.ends)) > 3
    width = ended.ids.shape[1]
    for row, stopped, end in zip(free.ids, ended.ids, ended.ends):
        assert torch.equal(stopped[:end], row[:end])  # the same draws up to there
        assert not (stopped[3:end] == tiny.EOS).any()
        assert bool((stopped[end:] == tiny.EOS).all())
        assert end == width or stopped[end] == tiny.EOS


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(("diffusion", "width"), [(CAUSAL, 2), (BLOCKS[1], 2), (BLOCKS[4], 4), (BLOCKS[16], 16)])
def test_sampling_stops_once_every_row_has_ended(diffusion, width):
    done = sample(likely_end(diffusion, 1 - 1e-9), prompt(1, 3), 15, Sampling(), tiny.EOS, generator())
    assert done.ends == [1, 1, 1]
    assert done.ids.shape == (3, width)


# 41 tokens have at most log 41 = 3.7 nats, so any sample of them falls under the floor of 4 at the first look.


@pytest.mark.usefixtures("world")
def test_a_long_sample_that_repeats_itself_is_stopped_past_256_tokens():
    model = network(DiffusionConfig(block_size=16), length=320, layers=1)

    def width(**options) -> int:
        return sample(model, prompt(1), 319, Sampling("steps", 1, **options), None, generator()).ids.shape[1]

    assert width() == 272
    assert width(stop_on_low_entropy=False) == 320


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("rare", [False, True], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("diffusion", [CAUSAL, BLOCKS[1]], ids=["causal", "1"])
def test_the_entropy_is_that_of_the_last_tokens(diffusion, rare, monkeypatch):
    monkeypatch.setattr(sampler, "_ENTROPY_WINDOW", 8)
    monkeypatch.setattr(sampler, "_ENTROPY_FLOOR", 1.0)
    # With one new token, the last eight are all different, or six of them alike (0.74 nats).
    begun = torch.arange(9)[None] if rare else torch.tensor([[0, 9, 9, 9, 9, 9, 9, 9, 5]])
    assert sample(network(diffusion), begun, 7, Sampling(), None, generator()).ids.shape[1] == (16 if rare else 10)


# ---- against the plain-torch model ----


@pytest.fixture
def leftmost(monkeypatch):
    """Wherever chance would decide, the first of the likeliest is taken: both samplers then do the same."""
    monkeypatch.setattr(torch, "multinomial", lambda p, n, **_: p.argmax(-1, keepdim=True))


@pytest.mark.usefixtures("world", "leftmost")
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling("steps", 1, temperature=0)])
@pytest.mark.parametrize("diffusion", ALL_OBJECTIVES, ids=["causal", "1", "4", "16"])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_greedy_samples_equal_the_plain_models(backbone, diffusion, sampling):
    model = tiny.shape(backbone)
    weights = tiny.weights_of(model)
    plain = tiny.oracle(model, diffusion, weights)
    ours = sample(tiny.build(model, diffusion, weights), prompt(6, 4), 10, sampling, None, generator())
    options = {"sampler": sampling.method, "steps": sampling.steps, "temperature": 0}
    theirs = plain.generate(prompt(6, 4), 10, stop_at_eos=False, **options)
    assert torch.equal(ours.ids, theirs)
    assert len(ours.ids.unique()) > 5
