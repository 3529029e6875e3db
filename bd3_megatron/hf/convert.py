"""Checkpoints in and out: the paper's reference format, and folders that ``from_pretrained`` loads."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.hf.files import Loaded, read_config, read_weights, section, write_json
from bd3_megatron.hf.mapping import from_hf, to_hf
from bd3_megatron.hf.reference import fold_reference, load_reference

__all__ = ["TokenIds", "export", "fold_reference", "hf_config", "load_exported", "load_reference"]

MODELING = Path(__file__).with_name("modeling_bd3.py")
MODEL_TYPE = "bd3_megatron"
MASK_TOKEN = "<|mask|>"

# ModelConfig's fields and their names in an export's config.json.
MODEL_FIELDS = {
    "backbone": "backbone",
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_hidden": "intermediate_size",
    "length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "mask_id": "mask_token_id",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
    "rope_theta": "rope_theta",
    "norm_eps": "norm_eps",
    "dropout": "training_dropout",  # the exported model itself has none
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}


@dataclass(frozen=True)
class TokenIds:
    """Ids of the special tokens; None where the vocabulary has no such token."""

    bos: int | None
    eos: int | None
    mask: int


def export(
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    diffusion: DiffusionConfig,
    tokens: TokenIds,
    tokenizer_file: str | Path | None,
    out: str | Path,
) -> None:
    """Write a folder that ``AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=True)`` loads.

    The folder appears whole or not at all: it is written beside ``out`` and renamed.

    Args:
        weights: Megatron names, global, vocabulary unpadded; stored in the type they have.
        tokenizer_file: a ``tokenizer.json``; a mask is added where its vocabulary ends at ``tokens.mask``.
            None exports no tokenizer.
        out: a folder that does not exist or is empty.

    Raises:
        ConfigError: ``out`` holds something or cannot be written, the weights are not of the model's shape,
            or the tokenizer does not know the special tokens.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: exists and is not an empty folder; name another or remove it")
    for name, trained in (("bos", model.bos_id), ("eos", model.eos_id), ("mask", model.mask_id)):
        if trained not in (None, getattr(tokens, name)):
            raise ConfigError(
                f"tokens.{name}={getattr(tokens, name)}: the model was trained with model.{name}_id={trained}"
            )
    state = {name: t.detach().cpu().contiguous() for name, t in to_hf(weights, model).items()}
    if tokens.mask >= model.vocab_size:
        raise ConfigError(f"tokens.mask={tokens.mask}: not below model.vocab_size={model.vocab_size}")
    config = hf_config(model, diffusion, tokens, next(iter(state.values())).dtype)
    tokenizer = None if tokenizer_file is None else _tokenizer(Path(tokenizer_file), tokens, model)
    partial = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        write_json(partial / "config.json", config)
        save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(MODELING, partial / MODELING.name)
        if tokenizer is not None:
            tokenizer.save(str(partial / "tokenizer.json"))
            write_json(partial / "tokenizer_config.json", _tokenizer_config(tokenizer, tokens, model))
        card = _model_card(model, diffusion, has_tokenizer=tokenizer is not None)
        (partial / "README.md").write_text(card, encoding="utf-8")
        # mkdtemp and safetensors leave what only the owner can read.
        for file in partial.iterdir():
            file.chmod(0o644)
        partial.chmod(0o755)
        os.replace(partial, out)
    except (OSError, SafetensorError) as error:
        # An OSError's full text names the temporary folder.
        raise ConfigError(f"out={out}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def load_exported(folder: str | Path) -> Loaded:
    """Read an export back under Megatron names; sizes that were left to their defaults come back as numbers.

    Raises:
        ConfigError: the folder is not an export or its files cannot be read.
    """
    folder = Path(folder)
    config = read_config(folder, MODEL_TYPE)
    source = str(folder / "config.json")
    missing = [name for name in (*MODEL_FIELDS.values(), "objective", "block_size") if name not in config]
    if missing:
        raise ConfigError(f"{source}: no {missing[0]}; export the checkpoint again")
    model = section(ModelConfig, {ours: config[name] for ours, name in MODEL_FIELDS.items()}, source)
    if config.get("traits", asdict(model.traits)) != asdict(model.traits):
        raise ConfigError(
            f"{source}: traits: model.backbone={model.backbone} has others here; load the plugin it was trained with"
        )
    objective = {"objective": config["objective"], "block_size": config["block_size"]}
    diffusion = section(DiffusionConfig, {**(config.get("noise") or {}), **objective}, source)
    return model, diffusion, from_hf(read_weights(folder), model)


def hf_config(model: ModelConfig, diffusion: DiffusionConfig, tokens: TokenIds, dtype: torch.dtype) -> dict[str, Any]:
    """The export's ``config.json``; ``noise`` is what training needs and the exported model does not."""
    resolved = model.model_copy(
        update={
            "kv_heads": model.groups,
            "head_dim": model.width_per_head,
            "ffn_hidden": model.ffn,
            "norm_eps": model.eps,
            "mask_id": tokens.mask,
            "bos_id": tokens.bos,
            "eos_id": tokens.eos,
        }
    )
    module = MODELING.stem
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["BD3ForMaskedLM"],
        "auto_map": {
            "AutoConfig": f"{module}.BD3Config",
            "AutoModelForMaskedLM": f"{module}.BD3ForMaskedLM",
        },
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{name: getattr(resolved, ours) for ours, name in MODEL_FIELDS.items()},
        "traits": asdict(model.traits),
        "objective": diffusion.objective,
        "block_size": diffusion.block_size,
        "noise": diffusion.model_dump(exclude={"objective", "block_size"}),
        "pad_token_id": tokens.eos,
    }


def _tokenizer(path: Path, tokens: TokenIds, model: ModelConfig) -> Tokenizer:
    """The tokenizer with the mask in its vocabulary, checked against the special tokens."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"tokenizer={path}: not a readable tokenizer.json: {error}") from None
    # Stored in the file, they would cut or fill prompts without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = tokenizer.get_vocab_size()
    if tokenizer.id_to_token(tokens.mask) is None:
        tokenizer.add_special_tokens([AddedToken(MASK_TOKEN, special=True, normalized=False)])
        if tokenizer.token_to_id(MASK_TOKEN) != tokens.mask:
            raise ConfigError(
                f"tokens.mask={tokens.mask}: tokenizer {path} has {size} entries, so an added mask would not "
                f"get that id; give the tokenizer that the data was prepared with"
            )
    for name, value in (("bos", tokens.bos), ("eos", tokens.eos)):
        if value is not None and tokenizer.id_to_token(value) is None:
            raise ConfigError(f"tokens.{name}={value}: tokenizer {path} has no such id; its entries are {size}")
    if tokenizer.get_vocab_size() > model.vocab_size:
        raise ConfigError(
            f"tokenizer={path}: its {tokenizer.get_vocab_size()} entries exceed model.vocab_size="
            f"{model.vocab_size}; give the tokenizer that the data was prepared with"
        )
    return tokenizer


def _tokenizer_config(tokenizer: Tokenizer, tokens: TokenIds, model: ModelConfig) -> dict[str, Any]:
    special = {"bos": tokens.bos, "eos": tokens.eos, "pad": tokens.eos, "mask": tokens.mask}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.length,
        "model_input_names": ["input_ids"],  # the model takes no attention_mask: prompts have one length
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokenizer.id_to_token(id) for name, id in special.items() if id is not None},
    }


def _model_card(model: ModelConfig, diffusion: DiffusionConfig, has_tokenizer: bool) -> str:
    causal = diffusion.objective == "causal"
    kind = "Causal language model" if causal else "Block diffusion language model"
    arguments = '("path/of/this/folder", trust_remote_code=True)'
    imports, use = "AutoModelForMaskedLM", "ids"
    code = [f"model = AutoModelForMaskedLM.from_pretrained{arguments}"]
    if has_tokenizer:
        imports, use = f"{imports}, AutoTokenizer", "tokenizer.decode(ids[0])"
        code.append(f"tokenizer = AutoTokenizer.from_pretrained{arguments}")
    code += [
        "ids = model.generate(max_new_tokens=64)  # from the BOS; prompts begin with it too",
        f"print({use})",
    ]
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [{'text-generation' if causal else 'block-diffusion'}]",
        "---",
        "",
        f"# {kind}",
        "",
        "Trained with bd3-megatron (block diffusion: arXiv 2503.09573).",
        "",
        "| backbone | layers | width | row length | block size | vocabulary |",
        "|---|---|---|---|---|---|",
        f"| {model.backbone} | {model.layers} | {model.hidden} | {model.length} | {diffusion.block_size} "
        f"| {model.vocab_size} |",
        "",
        "```python",
        f"from transformers import {imports}",
        "",
        *code,
        "```",
    ]
    return "\n".join(lines) + "\n"
