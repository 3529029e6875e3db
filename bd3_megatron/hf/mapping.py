"""Hugging Face names and Megatron names of the same weights, as one table, and the two ways through it.

Both sides are global: Megatron names carry whole tensors, not shards, and the vocabulary is not padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_megatron.config import ModelConfig

Shape = tuple[int, ...]
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor and the Hugging Face tensors it is made of, with their shapes.

    ``rows`` says how: ``stacked`` on their first axis (a single one is itself), or ``by_group``: for each
    group of attention heads its query heads, its key head and its value head.
    """

    megatron: str
    hf: dict[str, Shape]
    rows: Literal["stacked", "by_group"] = "stacked"

    @property
    def shape(self) -> Shape:
        """Shape of the Megatron tensor."""
        shapes = list(self.hf.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def entries(model: ModelConfig) -> list[Entry]:
    """The whole table for one model.

    Raises:
        ConfigError: the model's vocabulary is not known yet.
    """
    if model.vocab_size is None:
        raise ConfigError("model.vocab_size=null: the weights' shapes depend on it; set it to the number of tokens")
    vocabulary = (model.vocab_size, model.hidden)
    table = [Entry("embedding.word_embeddings.weight", {"model.embed_tokens.weight": vocabulary})]
    for index in range(model.layers):
        table += _layer(model, f"decoder.layers.{index}.", f"model.layers.{index}.")
    table += _norm(model, "final_norm", "model.norm")
    if not model.tie_embeddings:
        table.append(Entry("output_layer.weight", {"lm_head.weight": vocabulary}))
    if model.backbone == "dit":
        table.append(Entry("output_layer.bias", {"lm_head.bias": (model.vocab_size,)}))
    return table


def _layer(model: ModelConfig, megatron: str, hf: str) -> list[Entry]:
    hidden, ffn, width = model.hidden, model.ffn, model.width_per_head
    dit = model.backbone == "dit"
    rows = {"q": model.heads * width, "k": model.groups * width, "v": model.groups * width}
    qkv = {f"{hf}self_attn.{name}_proj.weight": (rows[name], hidden) for name in rows}
    up = {f"{hf}mlp.{name}_proj.weight": (ffn, hidden) for name in (("up",) if dit else ("gate", "up"))}
    attention, mlp = f"{megatron}self_attention.", f"{megatron}mlp."
    table = _norm(model, f"{megatron}input_layernorm", f"{hf}input_layernorm")
    table.append(Entry(f"{attention}linear_qkv.weight", qkv, rows="by_group"))
    if not dit:
        table.append(Entry(f"{attention}q_layernorm.weight", {f"{hf}self_attn.q_norm.weight": (width,)}))
        table.append(Entry(f"{attention}k_layernorm.weight", {f"{hf}self_attn.k_norm.weight": (width,)}))
    table.append(Entry(f"{attention}linear_proj.weight", {f"{hf}self_attn.o_proj.weight": (hidden, rows["q"])}))
    table += _norm(model, f"{megatron}pre_mlp_layernorm", f"{hf}post_attention_layernorm")
    table.append(Entry(f"{mlp}linear_fc1.weight", up))
    table.append(Entry(f"{mlp}linear_fc2.weight", {f"{hf}mlp.down_proj.weight": (hidden, ffn)}))
    if dit:
        table.append(Entry(f"{mlp}linear_fc1.bias", {f"{hf}mlp.up_proj.bias": (ffn,)}))
        table.append(Entry(f"{mlp}linear_fc2.bias", {f"{hf}mlp.down_proj.bias": (hidden,)}))
    return table


def _norm(model: ModelConfig, megatron: str, hf: str) -> list[Entry]:
    parts = ("weight", "bias") if model.backbone == "dit" else ("weight",)
    return [Entry(f"{megatron}.{part}", {f"{hf}.{part}": (model.hidden,)}) for part in parts]


def to_hf(weights: Weights, model: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face weights from Megatron weights; differentiable, the inverse of :func:`from_hf`.

    Raises:
        ConfigError: a name is missing, unknown, or has another shape than the model gives it.
    """
    table = entries(model)
    check_shapes(weights, {entry.megatron: entry.shape for entry in table})
    result = {}
    for entry in table:
        weight = weights[entry.megatron]
        if entry.rows == "by_group":
            # [groups, rows of one group, hidden]: each group holds its share of the rows of q, of k and of v.
            weight = weight.unflatten(0, (model.groups, -1))
            sizes = [shape[0] // model.groups for shape in entry.hf.values()]
            parts = [part.flatten(0, 1) for part in weight.split(sizes, dim=1)]
        else:
            parts = weight.split([shape[0] for shape in entry.hf.values()])
        result.update(zip(entry.hf, parts))
    return result


def from_hf(weights: Weights, model: ModelConfig) -> dict[str, Tensor]:
    """Megatron weights from Hugging Face weights; differentiable, the inverse of :func:`to_hf`.

    Raises:
        ConfigError: a name is missing, unknown, or has another shape than the model gives it.
    """
    table = entries(model)
    check_shapes(weights, {name: shape for entry in table for name, shape in entry.hf.items()})
    result = {}
    for entry in table:
        parts = [weights[name] for name in entry.hf]
        if entry.rows == "by_group":
            parts = [part.unflatten(0, (model.groups, -1)) for part in parts]
            result[entry.megatron] = torch.cat(parts, dim=1).flatten(0, 1)
        else:
            result[entry.megatron] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return result


def check_shapes(weights: Weights, expected: Mapping[str, Shape]) -> None:
    """Check that ``weights`` has exactly the ``expected`` names and shapes.

    Raises:
        ConfigError: one line with the first name at fault and how many others there are.
    """
    for problem, names in (
        ("missing", [name for name in expected if name not in weights]),
        ("unknown", [name for name in weights if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(f"weights: {names[0]}{more} {problem}; the checkpoint is not of this model's shape")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise ConfigError(
                f"weights: {name} has shape {list(weights[name].shape)}, the model needs {list(shape)}; "
                f"check model.hidden, heads, kv_heads, head_dim, ffn_hidden and vocab_size"
            )
