"""The single-device model: masks, objective, cache, samplers, and agreement with transformers' own Qwen3."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from bd3_megatron.hf.modeling_bd3 import (
    TRAITS,
    BD3Config,
    BD3ForMaskedLM,
    CleanBlocks,
    Sampler,
    block_causal_mask,
    two_stream_mask,
)

VOCAB, MASK, EOS, LENGTH = 23, 22, 21, 12


def build(seed: int = 0, **changes) -> BD3ForMaskedLM:
    """A small random model, every parameter random so that no term can hide."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if changes.get("backbone") == "dit" else 2,
        "head_dim": 6,
        "intermediate_size": 20,
        "max_position_embeddings": LENGTH,
        "block_size": 4,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": 0,
    }
    model = BD3ForMaskedLM(BD3Config(**values | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(seed: int = 0, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy and a clean batch ``[rows, LENGTH]``."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(1, EOS, (rows, LENGTH), generator=generator)
    masked = torch.rand(clean.shape, generator=generator) < 0.5
    masked[:, 0] = False
    return clean.masked_fill(masked, MASK), clean


def test_the_masks_are_those_of_the_paper():
    noisy_to_noisy = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    noisy_to_clean = [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    clean_to_clean = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    mask = two_stream_mask(4, 2).int()
    assert mask[:4, :4].tolist() == noisy_to_noisy
    assert mask[:4, 4:].tolist() == noisy_to_clean
    assert mask[4:, :4].sum() == 0
    assert mask[4:, 4:].tolist() == clean_to_clean
    assert block_causal_mask(4, 2).int().tolist() == clean_to_clean
    assert block_causal_mask(4, 2, first=3).int().tolist() == clean_to_clean[3:]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, LENGTH - 1), st.sampled_from(["qwen3", "dit"]))
def test_a_token_reaches_exactly_the_blocks_that_may_see_it(size, position, backbone):
    model = build(block_size=size, backbone=backbone).double()
    noisy, clean = batch()
    blocks = torch.arange(LENGTH) // size
    with torch.no_grad():
        before = model(noisy, clean).logits
        other = clean.clone()
        other[:, position] = clean[:, position] % (EOS - 1) + 1
        moved = ((model(noisy, other).logits - before).abs().amax((0, 2)) > 1e-12).tolist()
        assert moved == (blocks > blocks[position]).tolist()
        other = noisy.clone()
        other[:, position] = noisy[:, position] % (EOS - 1) + 1
        moved = ((model(other, clean).logits - before).abs().amax((0, 2)) > 1e-12).tolist()
        assert moved == (blocks == blocks[position]).tolist()


@pytest.mark.parametrize("backbone", ["qwen3", "dit"])
def test_one_stream_is_a_special_case_of_two(backbone):
    model = build(backbone=backbone)
    noisy, clean = batch()
    with torch.no_grad():
        # The last block after its clean predecessors sees in one stream what it sees in two.
        mixed = torch.cat([clean[:, :8], noisy[:, 8:]], dim=1)
        torch.testing.assert_close(model(mixed).logits[:, 8:], model(noisy, clean).logits[:, 8:])
        # A row of one block never looks at the clean stream.
        model.config.block_size = LENGTH
        torch.testing.assert_close(model(noisy).logits, model(noisy, clean).logits)


def test_causal_objective_is_transformers_qwen3():
    model = build(objective="causal", block_size=1, rope_theta=500.0)
    qwen = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            intermediate_size=20,
            rope_theta=500.0,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
        )
    ).eval()
    qwen.load_state_dict(model.state_dict())
    _, clean = batch()
    with torch.no_grad():
        ours, theirs = model(clean).logits, qwen(clean).logits
    torch.testing.assert_close(ours[..., :MASK], theirs[..., :MASK])


def test_loss_is_the_weighted_nll_of_masked_positions_over_all_positions():
    model = build()
    noisy, clean = batch()
    weights = torch.rand(2, 1) + 1
    out = model(noisy, clean, labels=clean, loss_weights=weights)
    total = 0.0
    for row, position in (noisy == MASK).nonzero().tolist():
        log_p = out.logits[row, position].log_softmax(-1)
        total -= weights[row, 0] * log_p[clean[row, position]]
    torch.testing.assert_close(out.loss, total / clean.numel())
    as_tuple = model(noisy, clean, labels=clean, loss_weights=weights, return_dict=False)
    assert torch.equal(as_tuple[0], out.loss)
    assert model(noisy, return_dict=False)[0].shape == (2, LENGTH, VOCAB)


def test_a_label_of_minus_100_leaves_a_position_out():
    model = build()
    noisy, clean = batch()
    visible = torch.where(noisy == MASK, clean, -100)
    whole = model(noisy, clean, labels=clean).loss
    torch.testing.assert_close(model(noisy, clean, labels=visible).loss, whole)
    assert model(noisy, clean, labels=torch.full_like(clean, -100)).loss == 0


def test_causal_loss_shifts_the_targets():
    model = build(objective="causal", block_size=1)
    _, clean = batch()
    out = model(clean, labels=clean)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), clean[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(out.loss, expected / clean.numel())


def test_the_mask_is_never_predicted():
    model = build()
    probabilities = model(*batch()).logits.softmax(-1)
    assert (probabilities[..., MASK] == 0).all()
    loss = model(*batch(), labels=batch()[1]).loss
    loss.backward()
    assert (model.lm_head.weight.grad[MASK] == 0).all()
    assert torch.isfinite(model.lm_head.weight.grad).all()


def test_misused_streams_are_told():
    noisy, clean = batch()
    with pytest.raises(ValueError, match=r"^clean_ids: shape \[2, 11\] differs from input_ids \[2, 12\]$"):
        build()(noisy, clean[:, 1:])
    with pytest.raises(ValueError, match=r"^clean_ids: the causal objective has one stream"):
        build(objective="causal", block_size=1)(noisy, clean)
    with pytest.raises(ValueError, match=r"^backbone='llama': give its traits, or use 'qwen3' or 'dit'"):
        BD3Config(backbone="llama")
    with pytest.raises(ValueError, match=r"^traits\.norm='none': use 'RMSNorm' or 'LayerNorm'"):
        BD3Config(traits=TRAITS["qwen3"] | {"norm": "none"})
    with pytest.raises(ValueError, match=r"^traits: sinks is missing or unknown; take modeling_bd3.py from the export"):
        BD3Config(traits=TRAITS["qwen3"] | {"sinks": True})
    with pytest.raises(ValueError, match=r"^objective='mlm': use"):
        BD3Config(objective="mlm")


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("backbone", ["qwen3", "dit"])
def test_a_block_after_clean_blocks_has_the_logits_of_the_two_streams(backbone, use_cache):
    model = build(backbone=backbone)
    noisy, clean = batch()
    with torch.no_grad():
        full = model(noisy, clean).logits
        done = CleanBlocks(model.model, rows=2, use_cache=use_cache)
        for first in range(0, LENGTH, 4):
            block = slice(first, first + 4)
            logits = model.logits(done.hidden(noisy[:, block]))
            torch.testing.assert_close(logits, full[:, block], atol=1e-5, rtol=1e-5)
            done.append(clean[:, block])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backbone": "dit"},
        {"block_size": LENGTH},
        {"block_size": 1},
        {"objective": "causal", "block_size": 1},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "block4",
)
@pytest.mark.parametrize("sampler", ["first_hitting", "steps"])
def test_the_cache_changes_no_token(changes, sampler):
    model = build(**changes)
    prompt = batch()[1][:, :6]
    texts = [
        model.generate(
            prompt,
            max_new_tokens=9,
            sampler=sampler,
            temperature=0,
            stop_at_eos=False,
            use_cache=use_cache,
            generator=torch.Generator().manual_seed(7),
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*texts)
    assert texts[0].shape == (2, 15)
    assert torch.equal(texts[0][:, :6], prompt)
    assert not (texts[0] == MASK).any()


def test_greedy_causal_text_is_the_argmax_of_its_own_logits():
    model = build(objective="causal", block_size=1)
    text = model.generate(max_new_tokens=LENGTH - 1, temperature=0, stop_at_eos=False)
    with torch.no_grad():
        logits = model(text).logits
    assert torch.equal(text[:, 1:], logits[:, :-1].argmax(-1))


def test_a_text_without_prompt_begins_with_bos_and_fills_a_row():
    text = build().generate(stop_at_eos=False)
    assert text.shape == (1, LENGTH)
    assert text[0, 0] == 1
    with pytest.raises(ValueError, match="no bos_token_id"):
        build(bos_token_id=None).generate()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["first_hitting", "steps"]),
)
def test_any_prompt_length_stays_in_front_of_the_text(given_tokens, new, size, sampler):
    model = build(block_size=size)
    prompt = torch.randint(1, EOS, (3, given_tokens), generator=torch.Generator().manual_seed(new))
    text = model.generate(prompt, new, sampler, stop_at_eos=False, generator=torch.Generator().manual_seed(0))
    assert text.shape == (3, given_tokens + new)
    assert torch.equal(text[:, :given_tokens], prompt)
    assert not (text == MASK).any()


def test_calls_of_the_samplers():
    model = build()
    calls = []
    model.model.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape[1]))
    prompt = torch.ones(1, 6, dtype=torch.long)
    # The prompt's whole block, two masks of the second block, that block clean, four masks of the third.
    model.generate(prompt, 6, stop_at_eos=False)
    assert calls == [4] * (1 + 2 + 1 + 4)
    calls.clear()
    model.generate(prompt, 6, sampler="steps", steps=1, stop_at_eos=False)
    assert calls == [4] * (1 + 1 + 1 + 1)


def test_first_hitting_fills_positions_in_every_order():
    model = build(block_size=4, max_position_embeddings=4)
    orders = []

    def record(module, inputs, output):
        orders[-1].append(tuple((inputs[0][0] == MASK).tolist()))

    model.model.register_forward_hook(record)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        orders.append([])
        model.generate(max_new_tokens=3, stop_at_eos=False, generator=generator)
    assert len({tuple(order) for order in orders}) == math.factorial(3)


def force(model: BD3ForMaskedLM, token: int) -> BD3ForMaskedLM:
    """Make ``token`` the likeliest by far, whatever the input."""
    with torch.no_grad():
        model.lm_head.bias[token] = 1e4
    return model


@pytest.mark.parametrize("changes", [{}, {"objective": "causal", "block_size": 1}], ids=["blocks", "causal"])
def test_a_text_ends_at_its_first_generated_eos(changes):
    model = force(build(backbone="dit", **changes), EOS)
    prompt = torch.tensor([[1, EOS, 2], [1, 2, 3]])
    text = model.generate(prompt, 9)
    assert text.tolist() == [[1, EOS, 2, EOS], [1, 2, 3, EOS]]
    assert model.generate(prompt, 9, stop_at_eos=False).tolist() == [[*row, *[EOS] * 9] for row in prompt.tolist()]


def test_a_row_that_ended_is_padded_while_others_go_on():
    model = build()
    ids = torch.tensor([[1, 5, EOS, 7, EOS, 9], [1, 5, 6, 7, EOS, 9]])
    assert model._end_at_eos(ids, 1, EOS).tolist() == [[1, 5, EOS, 0, 0], [1, 5, 6, 7, EOS]]
    model.config.pad_token_id = None
    ids = torch.tensor([[EOS, 5, EOS, 7], [EOS, 5, 6, 7]])
    assert model._end_at_eos(ids, 1, EOS).tolist() == [[EOS, 5, EOS, EOS], [EOS, 5, 6, 7]]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(0.05, 1.0), st.floats(0.2, 2.0))
@settings(max_examples=60, deadline=None)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(values, top_p, temperature):
    logits = torch.tensor(values)
    how = Sampler("steps", 1, top_p, temperature, torch.Generator().manual_seed(0))
    drawn = set(how.draw(logits.expand(200, -1)).tolist())
    probabilities = torch.softmax(logits.double() / temperature, -1).tolist()
    for token in drawn:
        likelier = sum(p for p in probabilities if p > probabilities[token])
        assert likelier < top_p + 1e-9


@pytest.mark.parametrize("temperature", [1e-9, 1e-320])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature):
    logits = 30 * torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    how = Sampler("steps", 1, 0.9, temperature, torch.Generator().manual_seed(0))
    assert torch.equal(how.draw(logits), logits.argmax(-1))


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    how = Sampler("steps", 1, 0.8, 1.0, torch.Generator().manual_seed(0))
    counts = how.draw(probabilities.log().expand(20_000, -1)).bincount(minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "ddpm"}, "sampler='ddpm': use"),
        ({"steps": 0}, "steps=0: use 1 or more"),
        ({"top_p": 0}, "top_p=0: use"),
        ({"temperature": -1}, "temperature=-1: use"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: use"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids: shape \[2\]"),
        ({"input_ids": torch.tensor([[1, MASK]])}, "input_ids: holds the mask id 22"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_misused_arguments_of_generate_are_told(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build().generate(**arguments)


@pytest.mark.parametrize("changes", [{"backbone": "dit"}, {"tie_word_embeddings": True}], ids=["dit", "tied"])
def test_saving_and_loading_keep_the_model(changes, tmp_path):
    model = build(rope_theta=777.0, **changes)
    model.save_pretrained(tmp_path)
    loaded, report = BD3ForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name in (
        "rope_theta",
        "block_size",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
    ):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert tied == model.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(loaded(*batch()).logits, model(*batch()).logits)


def test_a_fresh_model_is_initialized():
    model = BD3ForMaskedLM(BD3Config(backbone="dit", hidden_size=64, num_attention_heads=4, intermediate_size=64))
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.model.norm.weight == 1).all()
    assert (model.lm_head.bias == 0).all()


def test_bf16_stays_close_to_fp32():
    model = build()
    noisy, clean = batch()
    with torch.no_grad():
        exact = model(noisy, clean, labels=clean).loss
        rounded = model.to(torch.bfloat16)(noisy, clean, labels=clean).loss
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0)
