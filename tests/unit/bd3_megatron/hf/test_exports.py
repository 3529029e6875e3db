"""Exports in the hands of transformers: the arguments that its users pass, its classes, its pipelines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

from bd3_megatron.hf.convert import export
from bd3_megatron.hf.formats import TokenIds
from tests.unit import tiny
from tests.unit.bd3_megatron.hf.test_causal_formats import folder, stock
from tests.unit.bd3_megatron.hf.test_sdar import DIFFUSION, FOUR

MASK = 40


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """An export with a tokenizer of 40 tokens, which gains the mask."""
    root = tmp_path_factory.mktemp("exports")
    tokenizer = folder(root / "hf", stock("qwen3"), tokens=MASK) / "tokenizer.json"
    model = tiny.shape("qwen3", bos_id=1, eos_id=2)
    export(tiny.weights_of(model), model, DIFFUSION, TokenIds(1, 2, MASK), tokenizer, root / "out")
    return root / "out"


@pytest.fixture
def model(exported):
    return AutoModelForMaskedLM.from_pretrained(exported, trust_remote_code=True).eval()


def rows(count: int = 2, length: int = 16) -> torch.Tensor:
    ids = torch.randint(3, MASK, (count, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    ids[:, [at for at in (2, 5, 6) if at < length]] = MASK
    return ids


@torch.no_grad()
def test_padding_at_the_end_changes_nothing_before_it(model):
    ids = rows()
    padded = torch.cat([ids, torch.full((2, 4), 2)], 1)
    seen = (torch.arange(20) < 16).long().expand(2, -1)
    torch.testing.assert_close(model(padded, attention_mask=seen).logits[:, :16], model(ids).logits)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)
    # Also inside a block, which sees itself whole, and beside a clean stream.
    inside = (torch.arange(16) < 14).long().expand(2, -1)
    other = ids.clone()
    other[:, 14:] = 5
    for clean in (None, ids):
        found = [model(x, clean if clean is None else x, attention_mask=inside).logits[:, :14] for x in (ids, other)]
        torch.testing.assert_close(*found)
    with pytest.raises(ValueError, match="attention_mask: padding before a token"):
        model(ids, attention_mask=inside.flip(1))
    with pytest.raises(ValueError, match=r"attention_mask: shape \[2, 3\] differs from input_ids \[2, 16\]"):
        model(ids, attention_mask=torch.ones(2, 3))


@torch.no_grad()
def test_the_model_without_its_head(model, exported):
    ids = rows()
    loaded, report = AutoModel.from_pretrained(exported, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"]
    hidden = loaded.eval()(ids).last_hidden_state
    assert hidden.shape == (2, 16, 32)
    torch.testing.assert_close(model.logits(hidden), model(ids).logits)
    assert torch.equal(loaded(ids, return_dict=False)[0], hidden)


def test_gradients_are_the_same_when_activations_are_computed_again(model):
    ids, clean = rows(), rows().clamp_max(MASK - 1)
    found = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(ids, clean, labels=clean).loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_the_arguments_of_generate(model):
    prompt = rows(2, 2)
    likeliest = model.generate(prompt, max_new_tokens=6, temperature=0, stop_at_eos=False, generator=seeded())
    same = {
        "max_length": {"max_length": 8, "do_sample": False},
        "mask": {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 2)},
        "config": {"generation_config": GenerationConfig(max_new_tokens=6, do_sample=False)},
    }
    for name, arguments in same.items():
        found = model.generate(prompt, stop_at_eos=False, generator=seeded(), **arguments)
        assert torch.equal(found, likeliest), name
    several = model.generate(prompt, max_new_tokens=6, num_return_sequences=3, stop_at_eos=False)
    assert several.shape == (6, 8)
    assert torch.equal(several[:, :2], prompt.repeat_interleave(3, 0))
    for arguments, message in (
        ({"num_beams": 2}, "num_beams: not an argument of this model's generate"),
        ({"attention_mask": torch.tensor([[0, 1], [1, 1]])}, "attention_mask: prompts are of one length"),
        ({"max_length": 8, "max_new_tokens": 4}, "max_length=8: max_new_tokens=4 is given, too"),
        ({"max_length": 2}, "max_new_tokens=0: use 1 or more"),
        ({"num_return_sequences": 0}, "num_return_sequences=0: use 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(prompt, **arguments)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_tokenizer_begins_texts_with_bos_and_loads_without_the_folders_code(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer("w0 w1").input_ids == [1, 3, 4]
    assert tokenizer.mask_token_id == MASK


FILL = """
import sys
from transformers import pipeline
found = pipeline("fill-mask", model=sys.argv[1], trust_remote_code=True)("w0 <|mask|> w1")
print(*(one["token"] for one in found))
"""


def test_fill_mask(exported, tmp_path):
    found = pipeline("fill-mask", model=str(exported), trust_remote_code=True)("w0 <|mask|> w1")
    tokens = [one["token"] for one in found]
    assert len(tokens) == 5
    assert MASK not in tokens
    if not Path(FOUR, "transformers").is_dir():
        pytest.skip(f"transformers 5 alone was tried: no transformers 4.51 in {FOUR}")
    environ = {**os.environ, "PYTHONPATH": FOUR, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", FILL, str(exported)]
    done = subprocess.run(command, check=True, env=environ, capture_output=True, text=True)
    assert list(map(int, done.stdout.splitlines()[-1].split())) == tokens
