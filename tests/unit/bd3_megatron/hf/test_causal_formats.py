"""Qwen3, Qwen2 and Llama checkpoints that transformers wrote: in with the same logits, out with the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from bd3_common.errors import ConfigError
from bd3_megatron.hf.convert import read_checkpoint
from bd3_megatron.hf.files import open_source
from bd3_megatron.hf.formats import TokenIds
from pretrain.config.source_tokens import ImportChoices
from pretrain.conversion.convert import import_run, open_import, open_run, roundtrip
from tests.unit import tiny

KINDS = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
}
WORDS, ROWS = 45, 48  # tokens of the tokenizer; rows of the embedding, padding included
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}


def stock(kind: str, tied: bool = False, seed: int = 0, **changes):
    """A small model of transformers, every norm and bias random."""
    config_class, model_class = (getattr(transformers, name) for name in KINDS[kind])
    sizes = {
        "vocab_size": ROWS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 24,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": tied,
    }
    head_dim = {"head_dim": 12} if kind == "qwen3" else {}
    torch.manual_seed(seed)
    model = model_class(config_class(**sizes | head_dim | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape) + name.endswith("norm.weight"))
    return model.eval()


def folder(path: Path, model, dtype: torch.dtype = torch.float32, shard: str = "5GB", tokens: int = WORDS) -> Path:
    """What ``save_pretrained`` writes, and a tokenizer with fewer tokens than the embedding has rows."""
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(tokens - 3))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def our_logits(model, diffusion, weights, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[b, L, V]`` of the model that is trained."""
    network = tiny.build(model.model_copy(update={"length": ids.shape[1]}), diffusion, weights)
    with torch.no_grad():
        return network.logits(network.hidden_states(ids)).transpose(0, 1)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_import_has_the_logits_of_transformers(kind, tied, world, tmp_path):
    theirs = stock(kind, tied)
    found = open_import(folder(tmp_path / "hf", theirs, shard="20KB"), ImportChoices())
    assert (tmp_path / "hf/model.safetensors.index.json").is_file()
    assert (found.format, found.model.backbone, found.diffusion.objective) == (kind, kind, "causal")
    assert (found.model.mask_id, found.model.vocab_size, found.model.bos_id) == (WORDS, WORDS + 1, 1)
    ids = torch.randint(3, WORDS, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
    found_logits = our_logits(found.model, found.diffusion, found.weights, ids)
    torch.testing.assert_close(found_logits[..., :WORDS], expected[..., :WORDS], rtol=0, atol=1e-5)
    assert bool((found_logits[..., WORDS] == -torch.inf).all())


@pytest.mark.parametrize("scaling", [LLAMA3, {"rope_type": "linear", "factor": 4.0}], ids=lambda x: x["rope_type"])
def test_scaled_rotary_frequencies_are_those_of_transformers(scaling, world, tmp_path):
    theirs = stock("llama", rope_scaling=dict(scaling), rope_theta=500.0)
    found = open_import(folder(tmp_path / "hf", theirs), ImportChoices())
    assert (found.model.rope_scaling.kind, found.model.rope_theta) == (scaling["rope_type"], 500.0)
    ids = torch.randint(3, WORDS, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits[..., :WORDS]
        oracle = tiny.oracle(found.model, found.diffusion, dict(found.weights))(ids).logits[..., :WORDS]
    torch.testing.assert_close(
        our_logits(found.model, found.diffusion, found.weights, ids)[..., :WORDS], expected, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(oracle, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)], ids=["fp32", "tied-bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_out_again_every_tensor_has_its_bits(kind, tied, dtype, tmp_path):
    path = folder(tmp_path / "hf", stock(kind, tied), dtype, "20KB")
    ((name, found),) = roundtrip(path, ImportChoices())
    assert (name, found.largest) == (f"{kind} -> run -> {kind}", 0)
    assert found.tensors == sum(len(load_file(file)) for file in path.glob("*.safetensors"))


def test_without_a_tokenizer_the_mask_is_a_new_row(tmp_path):
    path = folder(tmp_path / "hf", stock("qwen3"))
    (path / "tokenizer.json").unlink()
    found = open_import(path, ImportChoices())
    assert (found.model.mask_id, found.model.vocab_size) == (ROWS, ROWS + 1)
    assert roundtrip(path, ImportChoices())[0][1].largest == 0


def test_the_row_of_a_new_mask(tmp_path):
    path = folder(tmp_path / "hf", stock("qwen2"))
    table = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    rows = {}
    for init in ("mean", "noise", "eos"):
        found = open_import(path, ImportChoices(mask_init=init))
        rows[init] = found.weights["embedding.word_embeddings.weight"][WORDS]
        assert torch.equal(found.weights["embedding.word_embeddings.weight"][:WORDS], table[:WORDS])
    torch.testing.assert_close(rows["mean"], table[:WORDS].mean(0))
    assert torch.equal(rows["eos"], table[2])
    assert 0.1 < (rows["noise"] - rows["mean"]).std() < 0.3  # the rows' own deviation is .2
    own = open_import(path, ImportChoices(mask_id=7))
    assert (own.model.mask_id, own.model.vocab_size) == (7, WORDS)
    assert torch.equal(own.weights["embedding.word_embeddings.weight"], table[:WORDS])


def test_a_run_keeps_what_its_tokens_do_not_need(tmp_path):
    path = folder(tmp_path / "hf", stock("qwen3"))
    (path / "generation_config.json").write_text('{"temperature": 0.6}')
    import_run(open_import(path, ImportChoices()), tmp_path / "run")
    assert open_run(tmp_path / "run").weights.shapes["embedding.word_embeddings.weight"] == (WORDS + 1, 32)
    shutil.rmtree(path)
    from pretrain.conversion.convert import export_run

    export_run(open_run(tmp_path / "run"), tmp_path / "out", "qwen3", "bf16", 20_000)
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"temperature": 0.6}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["architectures"]) == (ROWS, ["Qwen3ForCausalLM"])
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype is torch.bfloat16


def broken(path: Path, **changes: object) -> Path:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "sliding-window attention: not computed here"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding-window attention"),
        ({"attention_bias": True}, "attention_bias=True: not computed here; only False is"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: not computed here"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling=yarn: not computed here; known are",
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_scaling=llama3: has no factor"),
        ({"rope_parameters": [1]}, "rope_parameters: value a list of 1: input should be an object"),
        ({"num_hidden_layers": 3}, "weights: model.layers.2.input_layernorm.weight and 10 more missing"),
        ({"num_hidden_layers": 1}, "weights: model.layers.1.input_layernorm.weight and 10 more unknown"),
        ({"intermediate_size": 40}, "has shape [48, 32], the model needs [40, 32]"),
        ({"vocab_size": 40}, "vocab_size=40: the tokenizer has 45 tokens"),
        ({"hidden_size": "wide"}, "hidden"),
        (
            {"model_type": "gpt2"},
            "model_type='gpt2': no format has it; known are bd3, bd3lm, llama, qwen2, qwen3, sdar",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_computed_is_refused_in_one_line(changes, message, tmp_path):
    path = broken(folder(tmp_path / "hf", stock("qwen3")), **changes)
    with pytest.raises(ConfigError) as caught:
        dict(open_import(path, ImportChoices()).weights)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_files_are_told_in_one_line(tmp_path):
    path = folder(tmp_path / "hf", stock("llama"))
    weights = load_file(path / "model.safetensors")
    save_file(weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"weights: model\.layers\.0\.self_attn\.q_norm\.weight unknown"):
        read_checkpoint(path)
    for name in ("pytorch_model.bin", "model.gguf"):
        (path / "model.safetensors").unlink(missing_ok=True)
        (path / name).write_bytes(b"GGUF")
        with pytest.raises(ConfigError, match=rf"{name}: not a safetensors file"):
            read_checkpoint(path)
        (path / name).unlink()
    save_file({"model.embed_tokens.weight": weights["model.embed_tokens.weight"]}, path / "a.safetensors")
    shutil.copyfile(path / "a.safetensors", path / "b.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "a.safetensors", "x": "b.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"b\.safetensors: model\.embed_tokens\.weight is in another shard, too"):
        read_checkpoint(path)


def test_a_tied_model_may_repeat_its_head(tmp_path):
    path = folder(tmp_path / "hf", stock("llama", tied=True))
    weights = load_file(path / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": table.clone()}, path / "model.safetensors")
    assert "output_layer.weight" not in read_checkpoint(path, tokens=TokenIds())[2]
    save_file(weights | {"lm_head.weight": table + 1}, path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"tie_word_embeddings=true: lm_head\.weight is not model\.embed_tokens"):
        read_checkpoint(path)
    assert open_source(path).tensors().shapes["lm_head.weight"] == (ROWS, 32)
