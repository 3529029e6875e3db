"""Conversion of weights between Hugging Face and Megatron names, both ways, by one table.

Tensors are whole on both sides: no shards, and no padding of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_common.text import printable
from bd3_megatron.backbones import Parameter, Shape
from bd3_megatron.config import ModelConfig
from bd3_megatron.hf.files import LazyTensors, shapes_of

Weights = Mapping[str, Tensor]
_FEW = 100  # up to so many layers the missing names are listed; beyond, only their number


def entries(model: ModelConfig) -> list[Parameter]:
    """The table of parameters of one model.

    Raises:
        ConfigError: the model's vocabulary is not known yet.
    """
    if model.vocab_size is None:
        raise ConfigError("model.vocab_size=null: the weights' shapes depend on it; set it to the number of tokens")
    return list(model.family.parameters(model, model.vocab_size))


def to_hf(weights: Weights, model: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face weights from Megatron weights; differentiable, the inverse of :func:`from_hf`.

    Raises:
        ConfigError: a name is missing, unknown, or has another shape than the model gives it.
    """
    return dict(lazy_to_hf(weights, model))


def from_hf(weights: Weights, model: ModelConfig) -> dict[str, Tensor]:
    """Megatron weights from Hugging Face weights; differentiable, the inverse of :func:`to_hf`.

    Raises:
        ConfigError: a name is missing, unknown, or has another shape than the model gives it.
    """
    return dict(lazy_from_hf(weights, model))


def lazy_to_hf(weights: Weights, model: ModelConfig) -> LazyTensors:
    """As :func:`to_hf`, each Megatron tensor read and split when one of its parts is asked for."""
    check_depth(weights, model)
    table = entries(model)
    check_shapes(weights, {entry.name: entry.shape for entry in table})
    owners = {name: entry for entry in table for name in entry.exported}
    last: dict[str, dict[str, Tensor]] = {}  # parts of one tensor are asked for one after the other

    def read(name: str) -> Tensor:
        entry = owners[name]
        if entry.name not in last:
            last.clear()
            last[entry.name] = _parts(weights[entry.name], entry, model)
        return last[entry.name][name]

    return LazyTensors({name: entry.exported[name] for name, entry in owners.items()}, read)


def _parts(weight: Tensor, entry: Parameter, model: ModelConfig) -> dict[str, Tensor]:
    """Exported tensors that a Megatron tensor is made of."""
    if entry.by_group:
        # [groups, rows of one group, ...]: each group holds its share of the rows of q, of k and of v.
        weight = weight.unflatten(0, (model.groups, -1))
        sizes = [shape[0] // model.groups for shape in entry.exported.values()]
        parts = [part.flatten(0, 1) for part in weight.split(sizes, dim=1)]
    else:
        parts = list(weight.split([shape[0] for shape in entry.exported.values()]))
    return dict(zip(entry.exported, parts))


def lazy_from_hf(weights: Weights, model: ModelConfig) -> LazyTensors:
    """As :func:`from_hf`, the parts of each Megatron tensor read and joined when it is asked for."""
    check_depth(weights, model)
    table = {entry.name: entry for entry in entries(model)}
    check_shapes(weights, {name: shape for entry in table.values() for name, shape in entry.exported.items()})

    def read(name: str) -> Tensor:
        entry = table[name]
        parts = [weights[part] for part in entry.exported]
        if entry.by_group:
            parts = [part.unflatten(0, (model.groups, -1)) for part in parts]
            return torch.cat(parts, dim=1).flatten(0, 1)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    return LazyTensors({name: entry.shape for name, entry in table.items()}, read)


def check_depth(weights: Weights, model: ModelConfig) -> None:
    """Check that there is a tensor for each layer, before the names of all layers are listed.

    Raises:
        ConfigError: there are more layers than tensors.
    """
    if model.layers > max(_FEW, len(weights)):
        raise ConfigError(
            f"model.layers={model.layers}: the weights are {len(weights)} tensors; the checkpoint is not of this "
            "model's shape"
        )


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
            first = printable(names[0])
            raise ConfigError(f"weights: {first}{more} {problem}; the checkpoint is not of this model's shape")
    found = shapes_of(weights)
    for name, shape in expected.items():
        if found[name] != shape:
            raise ConfigError(
                f"weights: {name} has shape {list(found[name])}, the model needs {list(shape)}; "
                f"check model.hidden, heads, kv_heads, head_dim, ffn_hidden and vocab_size"
            )
