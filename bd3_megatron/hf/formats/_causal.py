"""Common part of the formats of causal language models: the names of ``transformers``' Llama-like classes.

A run has a mask among its tokens, and no rows for padding: reading adds the one and takes the other away, and writing
gives the checkpoint its own vocabulary back (:mod:`bd3_megatron.hf.origin`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bd3_common import schema
from bd3_common.errors import ConfigError
from bd3_common.text import shorten
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.hf.files import LazyTensors, Loaded, Source, json_text, section, write_json, write_weights
from bd3_megatron.hf.formats import CheckpointFormat, Contents, TokenIds, check_keys
from bd3_megatron.hf.mapping import check_depth, check_shapes, entries, lazy_from_hf, lazy_to_hf
from bd3_megatron.hf.origin import Origin, text_files
from bd3_megatron.hf.tokenizer import tokenizer_files

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "ffn_hidden": "intermediate_size",
    "length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
_DEFAULTS = {"kv_heads": "num_key_value_heads", "init_std": "initializer_range"}
_ALIKE = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (None,),
}
"""keys whose other values change what the model computes: those that are computed here"""
_ROPE_LLAMA3 = {
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}


class CausalFormat(CheckpointFormat):
    """A causal language model with the layers of one backbone. A subclass sets what differs."""

    backbone: ClassVar[str]
    architecture: ClassVar[str]
    """class of transformers that serves it"""
    states_tokens: ClassVar[bool] = False
    exact: ClassVar[bool] = False  # the mask stays behind
    own_vocabulary: ClassVar[bool] = True
    mask: ClassVar[tuple[str, int] | None] = None
    """token and id of the mask in a checkpoint; None: it has none"""
    default_head_dim: ClassVar[int | None] = None
    """width of one head where ``config.json`` states none; None: hidden / heads"""

    def read(self, source: Source, tokens: TokenIds) -> Loaded:
        """See the base class. The objective is the causal one, which the model was trained with."""
        model = self.model_section(source, tokens)
        return model, self.objective(source, model), self.weights(source, model, tokens)

    def objective(self, source: Source, model: ModelConfig) -> DiffusionConfig:
        """Objective that the model was trained with."""
        return DiffusionConfig(objective="causal", block_size=1, beta=1.0, omega=1.0)

    def model_section(self, source: Source, tokens: TokenIds) -> ModelConfig:
        """Shape of the model, with the vocabulary of the run."""
        config, where = source.config, str(source.config_file)
        check_keys(source, [*_FIELDS.values(), "vocab_size"])
        check_computed(config, where)
        values = {ours: config[key] for ours, key in _FIELDS.items()}
        values |= {ours: config[key] for ours, key in _DEFAULTS.items() if config.get(key) is not None}
        head_dim = config.get("head_dim")
        rope = _rope(config, where)
        values |= {
            "backbone": self.backbone,
            "head_dim": self.default_head_dim if head_dim is None else head_dim,
            "tie_embeddings": config.get("tie_word_embeddings", False),
            "rope_theta": rope.pop("theta"),
            "rope_scaling": rope,
            "vocab_size": config["vocab_size"],
        }
        stated = section(ModelConfig, values, where)
        size, mask = vocabulary(stated.vocab_size or 0, tokens, where)
        special = {"mask_id": mask, "bos_id": tokens.bos, "eos_id": tokens.eos, "pad_id": tokens.pad}
        return section(ModelConfig, values | special | {"vocab_size": size}, where)

    def weights(self, source: Source, model: ModelConfig, tokens: TokenIds) -> LazyTensors:
        """Weights by Megatron's names, with the vocabulary of the run."""
        stored = self.stored(source, model)
        rows = {EMBEDDING, HEAD} & stored.shapes.keys()
        width = int(source.config["vocab_size"])
        whole = model.model_copy(update={"vocab_size": width, "mask_id": None})
        check_depth(stored, model)
        check_shapes(stored, {name: shape for entry in entries(whole) for name, shape in entry.exported.items()})
        assert model.vocab_size is not None
        shapes = {
            name: (model.vocab_size, *shape[1:]) if name in rows else shape for name, shape in stored.shapes.items()
        }

        def read(name: str) -> Tensor:
            tensor = stored[name]
            return with_mask(tensor, model, tokens) if name in rows else tensor

        return lazy_from_hf(LazyTensors(shapes, read), model)

    def stored(self, source: Source, model: ModelConfig) -> LazyTensors:
        """The checkpoint's tensors, without those that repeat others."""
        found = source.tensors()
        repeated = {name for name in found if name.endswith("rotary_emb.inv_freq")}
        if model.tie_embeddings and HEAD in found:
            if not torch.equal(found[HEAD], found[EMBEDDING]):
                raise ConfigError(
                    f"{source.config_file}: tie_word_embeddings=true: {HEAD} is not {EMBEDDING}; set it "
                    f"to false if the head is trained"
                )
            repeated.add(HEAD)
        return found.renamed({name: name for name in found if name not in repeated})

    def origin(self, source: Source, loaded: Loaded, tokens: TokenIds) -> Origin | None:
        """See the base class: rows behind the run's own tokens, ``config.json``, texts of the folder's files."""
        model = loaded[0]
        stored = self.stored(source, model)
        first = model.vocab_size if has_mask(tokens, model.mask_id) else model.mask_id
        rows = {name: stored[name][first:].clone() for name in (EMBEDDING, HEAD) if name in stored}
        return Origin(self.model_type, source.config, rows, text_files(source.path))

    def write(self, folder: Path, contents: Contents) -> None:
        """See the base class. Without the origin the vocabulary is the run's, less a mask at its end."""
        model = contents.model
        self.check_writable(model, contents.diffusion)
        origin = contents.origin if contents.origin and contents.origin.format == self.model_type else None
        weights = lazy_to_hf(contents.weights, model)
        mask = model.mask_id
        assert model.vocab_size is not None
        if origin is not None and EMBEDDING in origin.tensors:
            behind = {name: rows for name, rows in origin.tensors.items() if name in weights}
            first = int(origin.config["vocab_size"]) - len(origin.tensors[EMBEDDING])
            if not 0 < first <= model.vocab_size or len(behind) != len({EMBEDDING, HEAD} & weights.shapes.keys()):
                raise ConfigError(
                    f"format={self.model_type}: the rows kept at the import do not fit the run's vocabulary of "
                    f"{model.vocab_size}; use --format bd3"
                )
            weights = with_rows(weights, lambda name, rows: torch.cat([rows[:first], behind[name].to(rows)]))
        elif mask == model.vocab_size - 1:
            weights = with_rows(weights, lambda _, rows: rows[:-1])
        else:
            weights = without_mask(weights, model)
        self.write_files(folder, contents, weights, origin)

    def write_files(self, folder: Path, contents: Contents, weights: LazyTensors, origin: Origin | None) -> None:
        """Write configuration, weights and tokenizer."""
        config = self.config(contents, weights, origin)
        written = tokenizer_files(contents, config["vocab_size"], self.mask)
        write_json(folder / "config.json", config)
        write_weights(folder, weights, contents.dtype, contents.shard_bytes)
        special = {f"{name}_token_id": getattr(contents.tokens, name) for name in ("bos", "eos", "pad")}
        files = {"generation_config.json": json_text({k: v for k, v in special.items() if v is not None})}
        files |= written | (dict(origin.files) if origin is not None else {})
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")

    def config(self, contents: Contents, weights: LazyTensors, origin: Origin | None) -> dict[str, Any]:
        """Content of ``config.json``."""
        model, tokens = contents.model, contents.tokens
        dtype = str(contents.dtype or weights[EMBEDDING].dtype).removeprefix("torch.")
        size = {"vocab_size": weights.shapes[EMBEDDING][0], "tie_word_embeddings": HEAD not in weights}
        if origin is not None:
            return dict(origin.config) | size | {"dtype" if "dtype" in origin.config else "torch_dtype": dtype}
        scaling = model.rope_scaling
        rope: dict[str, Any] | None = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope = {"rope_type": "llama3"} | {theirs: getattr(scaling, ours) for ours, theirs in _ROPE_LLAMA3.items()}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "torch_dtype": dtype,
            "hidden_act": "silu",
            "num_hidden_layers": model.layers,
            "hidden_size": model.hidden,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.groups,
            "head_dim": model.width_per_head,
            "intermediate_size": model.ffn,
            "max_position_embeddings": model.length,
            "rms_norm_eps": model.eps,
            "initializer_range": model.init_std,
            "rope_theta": model.rope_theta,
            "rope_scaling": None if scaling.kind == "none" else rope,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "bos_token_id": tokens.bos,
            "eos_token_id": tokens.eos,
            "pad_token_id": tokens.eos if tokens.pad is None else tokens.pad,
            **size,
        }

    def check_writable(self, model: ModelConfig, diffusion: DiffusionConfig) -> None:
        """Check that the format can say what the model computes.

        Raises:
            ConfigError: with the reason.
        """
        if model.backbone != self.backbone:
            raise ConfigError(
                f"format={self.model_type}: has the layers of model.backbone={self.backbone}, the run those of "
                f"{model.backbone}; use bd3"
            )
        if diffusion.objective != "causal":
            raise ConfigError(
                f"format={self.model_type}: is of causal models, and diffusion.objective={diffusion.objective} sees "
                f"whole blocks; use bd3 or sdar"
            )


def check_computed(config: Mapping[str, Any], where: str) -> None:
    """Check that ``config.json`` asks for nothing that is not computed here.

    Raises:
        ConfigError: names the key.
    """
    for key, values in _ALIKE.items():
        value = config.get(key, values[0])
        if value is not None and value not in values:
            raise ConfigError(f"{where}: {key}={shorten(value)}: not computed here; only {shorten(values[0])} is")
    kinds = config.get("layer_types")
    windows = isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds)
    if windows or config.get("use_sliding_window", config.get("sliding_window") is not None):
        raise ConfigError(f"{where}: sliding-window attention: not computed here; every layer must see all")


def _rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Base of the rotary frequencies, as ``theta``, and the keys of :class:`RopeScaling`."""
    given: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        given |= schema.check(config.get(key) or {}, dict[str, Any], f"{where}: {key}", error=ConfigError)
    name = given.get("rope_type", given.get("type", "default"))
    theta = config.get("rope_theta", given.get("rope_theta", 10_000.0))
    if name == "default":
        return {"theta": theta}
    keys = {"linear": {"factor": "factor"}, "llama3": _ROPE_LLAMA3}
    if not isinstance(name, str) or name not in keys:
        raise ConfigError(
            f"{where}: rope_scaling={shorten(name)}: not computed here; known are {', '.join(keys)}. Without it the "
            f"model keeps the row length of its first training: remove the key to import it so"
        )
    missing = [key for key in keys[name].values() if key not in given]
    if missing:
        raise ConfigError(f"{where}: rope_scaling={name}: has no {missing[0]}; download the checkpoint again")
    return {"theta": theta, "kind": name} | {ours: given[theirs] for ours, theirs in keys[name].items()}


def has_mask(tokens: TokenIds, mask: int | None) -> bool:
    """True if the mask is a token of the tokenizer; else its row is a new one."""
    return tokens.size is not None and mask is not None and mask < tokens.size


def vocabulary(rows: int, tokens: TokenIds, where: str) -> tuple[int, int]:
    """Size of a run's vocabulary, and its mask.

    Args:
        rows: of the checkpoint's embedding, padding included.

    Raises:
        ConfigError: the tokenizer has more tokens than rows, or the mask lies behind all of them.
    """
    size = rows if tokens.size is None else tokens.size
    if size > rows:
        raise ConfigError(
            f"{where}: vocab_size={rows}: the tokenizer has {size} tokens; give the one it was trained with"
        )
    mask = size if tokens.mask is None else tokens.mask
    if mask > rows:
        raise ConfigError(f"--mask-id {mask}: the model has {rows} tokens; use {rows} or less")
    return max(size, mask + 1), mask


def with_mask(table: Tensor, model: ModelConfig, tokens: TokenIds) -> Tensor:
    """Rows of a run's vocabulary ``[V, h]``, from those of a checkpoint, with a new one for the mask.

    The row is by ``tokens.mask_init``: ``mean`` of the tokens' rows; ``noise``, normal with their mean and standard
    deviation; ``eos``, that of EOS.

    Raises:
        ConfigError: ``eos`` without one.
    """
    size, mask = model.vocab_size, model.mask_id
    assert size is not None
    assert mask is not None
    if has_mask(tokens, mask):
        return table[:size]
    known = table[: tokens.size or len(table)].float()
    row = known.mean(0)
    if tokens.mask_init == "noise":
        row += known.std(0) * torch.randn(row.shape, generator=torch.Generator().manual_seed(0))
    elif tokens.mask_init == "eos":
        if tokens.eos is None:
            raise ConfigError("--mask-init eos: the tokenizer names no EOS; name it with --eos, or use mean")
        row = known[tokens.eos]
    return torch.cat([table[:mask], row.to(table)[None]])


def with_rows(weights: LazyTensors, change: Callable[[str, Tensor], Tensor]) -> LazyTensors:
    """Tensors of which ``change`` makes the embedding and the head, from their names and rows."""
    names = {EMBEDDING, HEAD} & weights.shapes.keys()
    shapes = {
        name: tuple(change(name, weights[name]).shape) if name in names else s for name, s in weights.shapes.items()
    }
    return LazyTensors(shapes, lambda name: change(name, weights[name]) if name in names else weights[name])


def without_mask(weights: LazyTensors, model: ModelConfig) -> LazyTensors:
    """Tensors with an untied head whose mask row is the mean of the rows of all other tokens.

    Its logit is then the mean of their logits: never the highest, and the probability of the mask at most 1 / (V + 1)
    by Jensen's inequality, V being the number of the others, whatever the temperature. A model that is served without
    its mask forbidden needs that: nothing has trained the row.
    """
    mask, tied = model.mask_id, HEAD not in weights

    def read(name: str) -> Tensor:
        if name != HEAD:
            return weights[name]
        rows = weights[EMBEDDING if tied else HEAD].clone()
        others = torch.ones(len(rows), dtype=torch.bool)
        others[mask] = False
        rows[mask] = rows[others].float().mean(0).to(rows)
        return rows

    return LazyTensors({**weights.shapes, HEAD: weights.shapes[EMBEDDING]}, read)
