"""SDAR folders: what engines load is the model that was trained, and no engine writes its mask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bd3_common.errors import ConfigError
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.hf.convert import export, read_checkpoint
from bd3_megatron.hf.formats import TokenIds
from bd3_megatron.hf.formats.sdar import MASK_ID, SIDECAR
from tests.unit import tiny
from tests.unit.bd3_megatron.hf.test_causal_formats import folder as stock_folder
from tests.unit.bd3_megatron.hf.test_causal_formats import stock

DIFFUSION = DiffusionConfig(block_size=4, beta=0.3, omega=0.8)
FOUR = os.environ.get("BD3_TRANSFORMERS_4", str(Path(sys.prefix) / "transformers-4"))


def trained(mask: int = tiny.MASK, tied: bool = False, favoured: bool = False) -> tuple[ModelConfig, dict]:
    """A model, and weights; ``favoured``: its head likes the mask best, which nothing has trained away."""
    model = tiny.shape("qwen3", length=16, tie_embeddings=tied, mask_id=mask, rope_theta=500.0)
    weights = tiny.weights_of(model)
    if favoured:
        head = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
        weights[head][mask] = 5 * weights[head].abs().max(0).values
    return model, weights


def write(
    path: Path, model: ModelConfig, weights: dict, diffusion: DiffusionConfig = DIFFUSION, **options
) -> list[str]:
    tokens = TokenIds(model.bos_id, model.eos_id, model.mask_id)
    return export(weights, model, diffusion, tokens, None, path, "sdar", **options)


def moved(ids: torch.Tensor, mask: int) -> torch.Tensor:
    """The same tokens as an engine knows them."""
    return torch.where(ids == mask, MASK_ID, ids)


def load(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("mask", [tiny.MASK, 7], ids=["last", "inside"])
def test_there_and_back_is_bitwise(mask, tied, tmp_path):
    model, weights = trained(mask, tied)
    write(tmp_path / "out", model, weights, shard_bytes=10_000_000)
    again, diffusion, back = read_checkpoint(tmp_path / "out")
    assert (again, diffusion) == (model, DIFFUSION)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert (tmp_path / "out/model.safetensors.index.json").is_file()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_its_own_code_gives_our_logits(tied, tmp_path):
    model, weights = trained(tied=tied)
    write(tmp_path / "out", model, weights)
    ids = torch.from_numpy(tiny.rows_of(model, 3))
    ids[:, [2, 5, 6, 13]] = tiny.MASK
    with torch.no_grad():
        expected = tiny.oracle(model, DIFFUSION, weights)(ids).logits[..., : tiny.MASK]
        found = load(tmp_path / "out")(moved(ids, tiny.MASK)).logits[..., : tiny.MASK]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_stock_qwen3_classes_load_it_and_agree_where_blocks_have_one_token(tmp_path):
    model, weights = trained()
    single = DiffusionConfig(block_size=1)
    write(tmp_path / "out", model, weights, single)
    config = transformers.Qwen3Config(
        **json.loads((tmp_path / "out/config.json").read_text()) | {"model_type": "qwen3"}
    )
    theirs = transformers.Qwen3ForCausalLM(config)
    state = load_file(tmp_path / "out/model.safetensors")
    assert state.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(state)
    ids = torch.from_numpy(tiny.rows_of(model, 2))
    with torch.no_grad():
        expected = theirs.eval()(ids).logits[..., : tiny.MASK]
        ours = tiny.oracle(model, single, weights)(ids).logits[..., : tiny.MASK]
        served = load(tmp_path / "out")(ids).logits[..., : tiny.MASK]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(served, expected, rtol=0, atol=1e-5)


def decoded(logits, prompt: torch.Tensor, length: int, size: int, mask: int, threshold: float | None) -> torch.Tensor:
    """Greedy decoding as engines do it, nothing forbidden: the surest position, or all above a threshold."""
    ids = torch.cat([prompt, torch.full((len(prompt), length - prompt.shape[1]), mask)], 1)
    for first in range(0, length, size):
        block = slice(first, first + size)
        for _ in range(size):
            masked = ids[:, block] == mask
            if not masked.any():
                break
            confidence, tokens = torch.softmax(logits(ids[:, : first + size])[:, block].double(), -1).max(-1)
            confidence = confidence.masked_fill(~masked, -1)
            chosen = torch.zeros_like(masked).scatter(1, confidence.argmax(1, keepdim=True), True) & masked
            if threshold is not None:
                chosen |= masked & (confidence > threshold)
            ids[:, block] = torch.where(chosen, tokens, ids[:, block])
    return ids


@pytest.mark.parametrize("threshold", [None, 0.3], ids=["static", "dynamic"])
def test_greedy_decoding_gives_our_tokens(threshold, tmp_path):
    model, weights = trained()
    write(tmp_path / "out", model, weights)
    served, oracle = load(tmp_path / "out"), tiny.oracle(model, DIFFUSION, weights)
    prompt = torch.from_numpy(tiny.rows_of(model, 4))[:, :3]
    with torch.no_grad():
        ours = decoded(lambda x: oracle(x).logits, prompt, 16, 4, tiny.MASK, threshold)
        # Of the ids that tokens have: the others' shares would change the order of the surest.
        theirs = decoded(lambda x: served(x).logits[..., : tiny.MASK], prompt, 16, 4, MASK_ID, threshold)
        strategy = {} if threshold is None else {"strategy": "low_confidence_dynamic", "threshold": threshold}
        generated = served.generate(prompt, 13, stop_at_eos=False, **strategy)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, generated)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.long)], ids=["untied", "tied"])
def test_no_engine_writes_the_mask(tied, tmp_path, capsys):
    """10,000 positions by the surest token, and by chance, the mask not forbidden, of a head that favours it."""
    model, weights = trained(tied=tied, favoured=True)
    # A Qwen3 vocabulary has the mask where engines expect it: no unused ids beside it.
    write(tmp_path / "out", model, weights)
    head = load_file(tmp_path / "out/model.safetensors")["lm_head.weight"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, tiny.MASK, (625, 16), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.5] = tiny.MASK
    with torch.no_grad():
        favoured = tiny.oracle(model, DIFFUSION, weights)
        hidden = favoured.model(ids)[0].flatten(0, 1)
    known = torch.cat([head[: tiny.MASK], head[MASK_ID:][:1]])  # the tokens and the mask
    logits = hidden @ known.T
    assert (
        (hidden @ weights["output_layer.weight" if not tied else "embedding.word_embeddings.weight"].T)
        .argmax(-1)
        .eq(tiny.MASK)
        .any()
    )  # as trained, the mask would win somewhere
    assert len(logits) == 10_000
    assert not (logits.argmax(-1) == tiny.MASK).any()
    assert not ((hidden @ head.T).argmax(-1) >= tiny.MASK).any()
    for temperature in (0.5, 1.0, 2.0):
        probabilities = torch.softmax(logits.double() / temperature, -1)
        assert float(probabilities[:, tiny.MASK].max()) <= 1 / (tiny.MASK + 1) + 1e-9
        drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        count, bound = int((drawn == tiny.MASK).sum()), 10_000 / (tiny.MASK + 1)
        print(f"temperature {temperature}: {count} masks in 10,000 draws, bound {bound:.0f}")
        assert count <= bound + 5 * bound**0.5


def test_a_mask_at_the_engines_place_needs_no_unused_ids(tmp_path):
    model = tiny.shape("qwen3", layers=1, hidden=8, heads=2, vocab_size=MASK_ID + 1, mask_id=MASK_ID)
    weights = tiny.weights_of(model)
    notes = write(tmp_path / "out", model, weights)
    assert len(notes) == 1
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == MASK_ID + 1
    back = read_checkpoint(tmp_path / "out")[2]
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_another_tokenizer_gains_the_mask_at_the_engines_id(tmp_path):
    path = stock_folder(tmp_path / "hf", stock("qwen3"), tokens=40)
    model, weights = trained()
    tokens = TokenIds(1, 2, tiny.MASK)
    model = model.model_copy(update={"bos_id": 1, "eos_id": 2})
    notes = export(weights, model, DIFFUSION, tokens, path / "tokenizer.json", tmp_path / "out", "sdar")
    assert "JetEngine and Diffulex take the mask as an argument" in notes[1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|MASK|>", MASK_ID)
    assert tokenizer("w0 <|MASK|>").input_ids == [1, 3, MASK_ID]


def test_a_foreign_folder_is_read(tmp_path):
    model, weights = trained()
    write(tmp_path / "out", model, weights)
    (tmp_path / "out" / SIDECAR).unlink()
    foreign, diffusion, back = read_checkpoint(tmp_path / "out")
    assert (foreign.mask_id, foreign.vocab_size, diffusion.block_size) == (MASK_ID, MASK_ID + 1, 4)
    ids = torch.from_numpy(tiny.rows_of(model, 2))
    ids[:, [2, 5]] = MASK_ID
    with torch.no_grad():
        expected = load(tmp_path / "out")(ids).logits[..., : tiny.MASK]
        found = tiny.oracle(foreign.model_copy(update={"bos_id": 0, "eos_id": 1}), diffusion, dict(back))(ids)
    torch.testing.assert_close(found.logits[..., : tiny.MASK], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "diffusion", "message"),
    [
        ({}, {"objective": "causal", "block_size": 1}, r"its tokens see their whole block.*use qwen3"),
        ({"backbone": "llama"}, {}, r"its layers normalize queries and keys.*llama does not"),
        (
            {"vocab_size": MASK_ID + 2, "hidden": 8, "layers": 1},
            {},
            r"engines have 151669 for the mask, which is another",
        ),
    ],
    ids=["causal", "llama", "large"],
)
def test_what_the_format_cannot_say_is_refused_with_the_reason(model, diffusion, message, tmp_path):
    shape = tiny.shape(**{"backbone": "qwen3"} | model)
    with pytest.raises(ConfigError, match=message):
        write(tmp_path / "out", shape, tiny.weights_of(shape), DiffusionConfig(**{"block_size": 4} | diffusion))
    assert not list(tmp_path.iterdir())


def test_a_damaged_sidecar_is_one_line(tmp_path):
    model, weights = trained()
    write(tmp_path / "out", model, weights)
    sidecar = tmp_path / "out" / SIDECAR
    for metadata, message in (({}, "no JSON"), ({"sections": "{}"}, "mask_id"), ({"sections": "[]"}, "object")):
        save_file({"lm_head.weight": torch.zeros(1, 32)}, sidecar, metadata)
        with pytest.raises(ConfigError, match=message):
            read_checkpoint(tmp_path / "out")
    sidecar.write_bytes(b"cut")
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        read_checkpoint(tmp_path / "out")


SCRIPT = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM
assert transformers.__version__.startswith("4.51"), transformers.__version__
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save((model(ids).logits, model.generate(ids[:, :2], 14, stop_at_eos=False)), sys.argv[3])
"""


@pytest.mark.skipif(not Path(FOUR, "transformers").is_dir(), reason=f"no transformers 4.51 in {FOUR}")
def test_transformers_4_gives_the_same(tmp_path):
    model, weights = trained()
    write(tmp_path / "out", model, weights)
    ids = moved(torch.from_numpy(tiny.rows_of(model, 2)), tiny.MASK)
    ids[:, [2, 5, 6, 13]] = MASK_ID
    torch.save(ids, tmp_path / "ids.pt")
    environ = {**os.environ, "PYTHONPATH": FOUR, "HF_HOME": str(tmp_path / "home")}
    script = [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in ("out", "ids.pt", "found.pt"))]
    subprocess.run(script, check=True, env=environ)
    logits, generated = torch.load(tmp_path / "found.pt")
    served = load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(logits, served(ids).logits, rtol=0, atol=1e-5)
        assert torch.equal(generated, served.generate(ids[:, :2], 14, stop_at_eos=False))
