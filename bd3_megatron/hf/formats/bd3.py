"""This project's export: a folder that transformers loads with trust_remote_code.

``AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)`` runs the ``modeling_bd3.py`` in the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch

from bd3_common import schema
from bd3_common.errors import ConfigError
from bd3_megatron.backbones import Traits
from bd3_megatron.config import DiffusionConfig, ModelConfig, before_new_keys
from bd3_megatron.hf.files import Loaded, Source, section, write_json, write_weights
from bd3_megatron.hf.formats import CheckpointFormat, Contents, TokenIds, check_keys
from bd3_megatron.hf.mapping import lazy_from_hf, lazy_to_hf
from bd3_megatron.hf.tokenizer import tokenizer_with_mask, write_tokenizer

MODELING = Path(__file__).parents[1] / "modeling_bd3.py"
MODEL_TYPE = "bd3_megatron"
RUN = "run_id"
"""key of the run's id in ``config.json``"""

FIELDS = {
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


class BD3(CheckpointFormat):
    """The export: ``config.json``, ``model.safetensors``, ``modeling_bd3.py``, a model card, a tokenizer if any."""

    model_type: ClassVar[str] = MODEL_TYPE
    fields: ClassVar[Mapping[str, str]] = FIELDS

    def read(self, source: Source, tokens: TokenIds) -> Loaded:
        """See the base class; sizes that were null when the model was trained come back as numbers."""
        config, where = source.config, source.config_file
        values = self.model_values(source)
        if config.get("pad_token_id") != values["eos_id"]:
            values["pad_id"] = config.get("pad_token_id")
        check_keys(source, ("objective", "block_size"))
        if config.get("position_scaling") is not None:
            values["rope_scaling"] = config["position_scaling"]
        model = section(ModelConfig, values, where)
        traits = schema.check(
            config.get("traits", asdict(model.traits)), dict[str, Any], f"{where}: traits", error=ConfigError
        )
        if asdict(Traits()) | traits != asdict(model.traits):
            raise ConfigError(
                f"{where}: traits: model.backbone={model.backbone} has others here; load the plugin it was trained with"
            )
        objective = {"objective": config["objective"], "block_size": config["block_size"]}
        noise = schema.check(config.get("noise") or {}, dict[str, Any], f"{where}: noise", error=ConfigError)
        diffusion = section(DiffusionConfig, {**before_new_keys(DiffusionConfig), **noise, **objective}, where)
        return model, diffusion, lazy_from_hf(source.tensors(), model)

    def write(self, folder: Path, contents: Contents) -> None:
        """See the base class; tensors keep their type."""
        model, diffusion, tokens = contents.model, contents.diffusion, contents.tokens
        for name, trained in (("bos", model.bos_id), ("eos", model.eos_id), ("mask", model.mask_id)):
            if trained not in (None, getattr(tokens, name)):
                raise ConfigError(
                    f"tokens.{name}={getattr(tokens, name)}: the model was trained with model.{name}_id={trained}"
                )
        state = lazy_to_hf(contents.weights, model)
        if tokens.mask is None or tokens.mask >= model.vocab_size:
            raise ConfigError(f"tokens.mask={tokens.mask}: not below model.vocab_size={model.vocab_size}")
        config = hf_config(model, diffusion, tokens, contents.dtype or next(iter(state.values())).dtype)
        config |= {} if contents.run is None else {RUN: contents.run}
        tokenizer = None if contents.tokenizer is None else tokenizer_with_mask(contents.tokenizer, tokens, model)
        write_json(folder / "config.json", config)
        write_weights(folder, state, contents.dtype, contents.shard_bytes)
        shutil.copyfile(MODELING, folder / MODELING.name)
        if tokenizer is not None:
            write_tokenizer(folder, tokenizer, tokens, model)
        card = _model_card(model, diffusion, has_tokenizer=tokenizer is not None)
        (folder / "README.md").write_text(card, encoding="utf-8")


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
            "AutoModel": f"{module}.BD3Model",
            "AutoModelForMaskedLM": f"{module}.BD3ForMaskedLM",
        },
        "tokenizer_class": "PreTrainedTokenizerFast",  # transformers 4 asks it for a pipeline
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{name: getattr(resolved, ours) for ours, name in FIELDS.items()},
        "position_scaling": None if model.rope_scaling.kind == "none" else model.rope_scaling.model_dump(),
        "traits": asdict(model.traits),
        "objective": diffusion.objective,
        "block_size": diffusion.block_size,
        "noise": diffusion.model_dump(exclude={"objective", "block_size"}),
        "pad_token_id": tokens.eos if tokens.pad is None else tokens.pad,
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
