"""Import of the reference format, export to a folder that transformers loads, and the way back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForMaskedLM, AutoTokenizer

from bd3_common.errors import ConfigError
from bd3_common.registry import Entry
from bd3_megatron.config import DiffusionConfig, ModelConfig, RopeScaling
from bd3_megatron.hf.convert import export, find_format, read_checkpoint
from bd3_megatron.hf.files import open_source, read_safetensors
from bd3_megatron.hf.formats import FORMATS, CheckpointFormat, TokenIds
from bd3_megatron.hf.formats.bd3 import hf_config
from bd3_megatron.hf.formats.bd3lm import fold_reference
from bd3_megatron.hf.mapping import entries, to_hf
from bd3_megatron.hf.modeling_bd3 import BD3Config, BD3ForMaskedLM

GOLDEN = Path(__file__).parents[3] / "data" / "bd3lm_block8.safetensors"
WORDS = ["<s>", "</s>", "the", "quick", "brown", "fox"]
TOKENS = TokenIds(bos=0, eos=1, mask=6)
DIFFUSION = DiffusionConfig(block_size=4, beta=0.3, omega=0.8, resample=True, schedule="cosine")
MODELS = {
    "qwen3": ModelConfig(layers=2, hidden=16, heads=4, kv_heads=2, length=8, vocab_size=7, rope_theta=500.0),
    "tied": ModelConfig(layers=1, hidden=16, heads=2, length=8, vocab_size=7, tie_embeddings=True, dropout=0.1),
    "dit": ModelConfig(backbone="dit", layers=2, hidden=16, heads=4, length=8, vocab_size=7, mask_id=6),
}


def random_weights(model: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {entry.name: torch.randn(entry.shape).to(dtype) for entry in entries(model)}


@pytest.fixture
def tokenizer_file(tmp_path) -> Path:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:2]])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


# ---- the reference format ----


def reference_folder(folder: Path, config: dict | None = None, shards: int = 1) -> Path:
    """The golden file's weights as the reference's Hugging Face folder."""
    tensors, metadata = read_safetensors(GOLDEN)
    state = {name.removeprefix("weights."): x for name, x in tensors.items() if name.startswith("weights.")}
    sizes = {name: int(metadata[name]) for name in metadata if name not in ("loss", "algo", "mask_index")}
    full = {"model_type": "bd3lm", "time_conditioning": False, "cross_attn": True, **sizes, **(config or {})}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(full))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    names = sorted(state)
    parts = {f"model-{i}.safetensors": names[i::shards] for i in range(shards)}
    for file, chosen in parts.items():
        save_file({name: state[name] for name in chosen}, folder / file)
    weight_map = {name: file for file, chosen in parts.items() for name in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_a_reference_folder_reads_as_the_golden_file(shards, tmp_path):
    model, diffusion, weights = read_checkpoint(GOLDEN, "bd3lm")
    assert (model.backbone, model.layers, model.hidden, model.heads, model.ffn) == ("dit", 2, 64, 4, 256)
    assert (model.length, model.vocab_size, model.mask_id) == (64, 257, 256)
    assert diffusion == DiffusionConfig(block_size=8)
    again = read_checkpoint(reference_folder(tmp_path, shards=shards), "bd3lm")
    assert again[:2] == (model, diffusion)
    assert again[2].keys() == weights.keys()
    for name, weight in weights.items():  # the fold multiplies, and a product's last bit depends on alignment
        torch.testing.assert_close(again[2][name], weight, rtol=1e-6, atol=1e-7, msg=name)


def test_the_interval_the_mask_and_the_streams_come_from_the_configuration(tmp_path):
    clipped = {"sampling_eps_min": 0.45, "sampling_eps_max": 0.95}
    model, diffusion, _ = read_checkpoint(reference_folder(tmp_path, clipped), "bd3lm", TokenIds(mask=103))
    assert (diffusion.beta, diffusion.omega, model.mask_id) == (0.45, 0.95, 103)
    assert read_checkpoint(reference_folder(tmp_path, {"cross_attn": False}), "bd3lm")[1].block_size == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "sedd"}, "model_type='sedd', not 'bd3lm'"),
        ({"time_conditioning": True}, "time_conditioning=true"),
        ({"n_heads": 8}, "inv_freq is not that of head width 8"),
        ({"n_heads": 5}, "model.heads=5: model.hidden=64 is not divisible by 5"),
        ({"n_blocks": 3}, "blocks.2.norm1.weight and 9 more missing"),
        ({"n_blocks": 1}, "blocks.1.adaLN_modulation.bias and 9 more unknown"),
        ({"vocab_size": 258}, "vocab_embed.embedding has shape [257, 64], the model needs [258, 64]"),
        ({"block_size": None}, "holds no number"),
        ({"sampling_eps_min": 0.0}, "beta: value 0.0: input should be greater than 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_format_is_told_in_one_line(config, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        read_checkpoint(reference_folder(tmp_path, config), "bd3lm")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files_are_told_in_one_line(tmp_path):
    folder = reference_folder(tmp_path / "a", shards=2)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-1\.safetensors: no such file$"):
        read_checkpoint(folder, "bd3lm")
    (folder / "model-1.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match=r"model-1\.safetensors: not a readable safetensors file"):
        read_checkpoint(folder, "bd3lm")
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: is no JSON"):
        read_checkpoint(folder, "bd3lm")
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json: value \[\]: input should be an object$"):
        read_checkpoint(folder, "bd3lm")
    with pytest.raises(ConfigError, match=r"none: no such file$"):
        read_checkpoint(tmp_path / "none", "bd3lm")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"no tensors named weights"):
        read_checkpoint(tmp_path / "x.safetensors", "bd3lm")


def test_the_fold_scales_and_shifts_by_the_constant_condition():
    """With W2 = 0 the condition is silu(b2), so every adaLN output can be written down."""
    tensors, _ = read_safetensors(GOLDEN)
    state = {name.removeprefix("weights."): x for name, x in tensors.items() if name.startswith("weights.")}
    state["backbone.sigma_map.mlp.2.weight"] = torch.zeros(32, 32)
    model = read_checkpoint(GOLDEN, "bd3lm")[0]
    condition = torch.nn.functional.silu(state["backbone.sigma_map.mlp.2.bias"])
    block = "backbone.blocks.1"
    modulation = state[f"{block}.adaLN_modulation.weight"] @ condition + state[f"{block}.adaLN_modulation.bias"]
    shift, scale, gate, _, _, mlp_gate = modulation.view(6, 64)
    folded = fold_reference(state, model)
    layer = "decoder.layers.1"
    torch.testing.assert_close(folded[f"{layer}.input_layernorm.bias"], shift)
    torch.testing.assert_close(folded[f"{layer}.input_layernorm.weight"], state[f"{block}.norm1.weight"] * (1 + scale))
    torch.testing.assert_close(
        folded[f"{layer}.self_attention.linear_proj.weight"],
        torch.diag(gate) @ state[f"{block}.attn_out.weight"],
    )
    torch.testing.assert_close(folded[f"{layer}.mlp.linear_fc2.bias"], mlp_gate * state[f"{block}.mlp.2.bias"])


# ---- our own export ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_an_export_reads_back_bitwise(name, dtype, tmp_path):
    model, weights = MODELS[name], random_weights(MODELS[name], dtype)
    export(weights, model, DIFFUSION, TOKENS, None, tmp_path / "a")
    again, diffusion, back = read_checkpoint(tmp_path / "a", "bd3")
    assert diffusion == DIFFUSION
    assert TokenIds(again.bos_id, again.eos_id, again.mask_id) == TOKENS
    assert (again.groups, again.width_per_head, again.ffn, again.eps) == (
        model.groups,
        model.width_per_head,
        model.ffn,
        model.eps,
    )
    assert back.keys() == weights.keys()
    assert all(back[key].dtype == dtype and torch.equal(back[key], weights[key]) for key in weights)
    export(back, again, diffusion, TOKENS, None, tmp_path / "b")
    for file in ("config.json", "model.safetensors", "README.md", "modeling_bd3.py"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert read_checkpoint(tmp_path / "b", "bd3")[0] == again


def test_every_field_of_the_model_survives_the_export(tmp_path):
    model = ModelConfig(
        layers=1, hidden=16, heads=4, kv_heads=2, head_dim=6, ffn_hidden=20, length=8, vocab_size=9,
        mask_id=6, bos_id=0, eos_id=1, pad_id=2, rope_theta=7e5, norm_eps=3e-5, dropout=0.1, tie_embeddings=True,
        init_std=0.03, rope_scaling=RopeScaling(kind="llama3", factor=8.0, low=1.5, high=3.5, original_length=4),
    )  # fmt: skip
    defaults = ModelConfig()
    assert all(
        getattr(model, field) != getattr(defaults, field) for field in set(ModelConfig.model_fields) - {"backbone"}
    )
    export(random_weights(model), model, DIFFUSION, TokenIds(0, 1, 6, pad=2), None, tmp_path / "out")
    assert read_checkpoint(tmp_path / "out", "bd3")[0] == model


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_export(name, tmp_path, tokenizer_file):
    model, weights = MODELS[name], random_weights(MODELS[name])
    export(weights, model, DIFFUSION, TOKENS, tokenizer_file, tmp_path / "out")
    loaded, report = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = BD3ForMaskedLM(BD3Config(**hf_config(model, DIFFUSION, TOKENS, torch.float32)))
    ours.load_state_dict(to_hf(weights, model), strict=not model.tie_embeddings)
    ours.tie_weights()
    ids, clean = torch.tensor([[0, 6, 3, 6, 6, 2, 6, 6]]), torch.tensor([[0, 2, 3, 4, 5, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids, clean).logits, ours(ids, clean).logits)
    assert loaded.generate(max_new_tokens=5, stop_at_eos=False).shape == (1, 6)
    # An export that a user loads and saves again is still an export.
    loaded.save_pretrained(tmp_path / "again")
    again = read_checkpoint(tmp_path / "again", "bd3")
    assert again[:2] == read_checkpoint(tmp_path / "out", "bd3")[:2]
    assert all(torch.equal(again[2][key], weights[key]) for key in weights)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_the_model_cards_code_runs(with_tokenizer, tmp_path, tokenizer_file, capsys):
    model = MODELS["qwen3"]
    out = tmp_path / "out"
    export(random_weights(model), model, DIFFUSION, TOKENS, tokenizer_file if with_tokenizer else None, out)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("path/of/this/folder", str(out)).replace("max_new_tokens=64", "max_new_tokens=4"), {})
    assert ("<s>" if with_tokenizer else "tensor([[0, ") in capsys.readouterr().out


def test_others_may_read_an_export(tmp_path):
    model = MODELS["qwen3"]
    export(random_weights(model), model, DIFFUSION, TOKENS, None, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}


def test_the_tokenizer_gains_the_mask_it_lacks(tmp_path, tokenizer_file):
    model = MODELS["qwen3"]
    export(random_weights(model), model, DIFFUSION, TOKENS, tokenizer_file, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1, 6)
    assert tokenizer.pad_token_id == 1
    assert len(tokenizer) == 7
    assert dict(tokenizer("quick brown fox")) == {"input_ids": [0, 3, 4, 5]}  # from BOS on, as rows and prompts
    assert tokenizer.decode([2, 6, 1], skip_special_tokens=True).strip() == "the"


def test_a_tokenizer_with_holes_is_exported(tmp_path, tokenizer_file):
    content = json.loads(tokenizer_file.read_text())
    content["model"]["vocab"]["fox"] = 9
    content["post_processor"] = {"type": "ByteLevel", **dict.fromkeys(("add_prefix_space", "trim_offsets"), False)}
    tokenizer_file.write_text(json.dumps(content))
    model = ModelConfig(layers=1, hidden=16, heads=2, length=8, vocab_size=11)
    tokens = TokenIds(0, 1, 10, pad=2)
    export(random_weights(model), model, DIFFUSION, tokens, tokenizer_file, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (tokenizer.mask_token, tokenizer.mask_token_id, tokenizer.pad_token_id) == ("<|mask|>", 10, 2)
    assert dict(tokenizer("quick fox")) == {"input_ids": [0, 3, 9]}
    assert tokenizer.decode([3, 7, 9]).split() == ["quick", "fox"]  # 7 is a hole
    imported, *_ = read_checkpoint(tmp_path / "out")
    assert (imported.mask_id, imported.pad_id, imported.eos_id) == (10, 2, 1)
    again = tmp_path / "out" / "tokenizer.json"
    export(random_weights(model), model, DIFFUSION, tokens, again, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == again.read_bytes()


def test_an_exported_tokenizer_neither_cuts_nor_pads(tmp_path, tokenizer_file):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tokenizer_file))
    model = MODELS["qwen3"]
    export(random_weights(model), model, DIFFUSION, TOKENS, tokenizer_file, tmp_path / "out")
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert (written.truncation, written.padding) == (None, None)


def test_a_mask_of_the_tokenizers_own_is_kept(tmp_path, tokenizer_file):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_special_tokens(["[MASK]"])
    tokenizer.save(str(tokenizer_file))
    model = MODELS["qwen3"]
    export(random_weights(model), model, DIFFUSION, TOKENS, tokenizer_file, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (loaded.mask_token, loaded.mask_token_id, len(loaded)) == ("[MASK]", 6, 7)


def entries_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_occupied_folder_is_left_alone(tmp_path):
    model, out = MODELS["qwen3"], tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"^out=.*out: exists and is not an empty folder; "):
        export(random_weights(model), model, DIFFUSION, TOKENS, None, out)
    with pytest.raises(ConfigError, match=r"notes\.txt: exists and is not an empty folder; "):
        export(random_weights(model), model, DIFFUSION, TOKENS, None, out / "notes.txt")
    assert entries_of(tmp_path) == ["out"]
    assert entries_of(out) == ["notes.txt"]
    (out / "notes.txt").unlink()
    export(random_weights(model), model, DIFFUSION, TOKENS, None, out)
    assert entries_of(out) == ["README.md", "config.json", "model.safetensors", "modeling_bd3.py"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_nothing_is_left_of_an_export_that_fails(error, tmp_path, monkeypatch):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(os, "rename", fail)
    model = MODELS["qwen3"]
    expected = ConfigError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        export(random_weights(model), model, DIFFUSION, TOKENS, None, tmp_path / "out")
    if expected is ConfigError:
        assert str(caught.value) == f"out={tmp_path / 'out'}: cannot be written: No space left on device"
    assert entries_of(tmp_path) == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TokenIds(0, 1, 5), "tokens.mask=5: the model was trained with model.mask_id=6"),
        (TokenIds(0, 9, 6), "tokens.eos=9: "),
    ],
    ids=["mask", "eos"],
)
def test_tokens_that_do_not_fit_are_told(tokens, message, tmp_path, tokenizer_file):
    model = MODELS["dit"]
    with pytest.raises(ConfigError) as error:
        export(random_weights(model), model, DIFFUSION, tokens, tokenizer_file, tmp_path / "out")
    assert message in str(error.value)
    assert entries_of(tmp_path) == ["tokenizer.json"]


def test_a_tokenizer_of_another_size_is_told(tmp_path, tokenizer_file):
    model = ModelConfig(layers=1, hidden=16, heads=2, length=8, vocab_size=20)
    with pytest.raises(ConfigError, match=r"^tokens\.mask=19: tokenizer .* has 6 entries, so an added mask"):
        export(random_weights(model), model, DIFFUSION, TokenIds(0, 1, 19), tokenizer_file, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"^tokens\.mask=20: not below model\.vocab_size=20$"):
        export(random_weights(model), model, DIFFUSION, TokenIds(0, 1, 20), tokenizer_file, tmp_path / "out")
    small = ModelConfig(layers=1, hidden=16, heads=2, length=8, vocab_size=4)
    with pytest.raises(ConfigError, match=r"its 6 entries exceed model\.vocab_size=4"):
        export(random_weights(small), small, DIFFUSION, TokenIds(0, 1, 3), tokenizer_file, tmp_path / "out")
    tokenizer_file.write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer \("):
        export(random_weights(model), model, DIFFUSION, TokenIds(0, 1, 6), tokenizer_file, tmp_path / "out")


def test_a_folder_that_is_no_export_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file$"):
        read_checkpoint(tmp_path, "bd3")
    (tmp_path / "config.json").write_text('{"model_type": "bd3_megatron"}')
    with pytest.raises(ConfigError, match=r"config\.json: no backbone; export the checkpoint again$"):
        read_checkpoint(tmp_path, "bd3")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"model_type='llama', not 'bd3_megatron'$"):
        read_checkpoint(tmp_path, "bd3")


# ---- formats ----


def test_the_configuration_tells_the_format(tmp_path):
    model = MODELS["qwen3"]
    export(random_weights(model), model, DIFFUSION, TOKENS, None, tmp_path / "ours")
    assert find_format(open_source(tmp_path / "ours")) == "bd3"
    assert find_format(open_source(reference_folder(tmp_path / "theirs"))) == "bd3lm"
    assert find_format(open_source(GOLDEN)) == "bd3lm"
    (tmp_path / "config.json").write_text('{"model_type": "sedd"}')
    with pytest.raises(
        ConfigError, match=r"config\.json: model_type='sedd': no format has it; known are bd3, bd3lm, llama, "
    ):
        read_checkpoint(tmp_path)


class OnlyRead(CheckpointFormat):
    """A format without a writer."""

    model_type = "only_read"

    def read(self, source, tokens):
        raise NotImplementedError


def test_a_format_that_is_only_read_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS._added, "only_read", (Entry("only_read", "x:y"), OnlyRead))
    model = MODELS["dit"]
    with pytest.raises(ConfigError, match=r"^format=only_read: can be read, not written; use bd3, bd3lm, "):
        export(random_weights(model), model, DIFFUSION, TOKENS, None, tmp_path / "out", "only_read")
    assert entries_of(tmp_path) == []
