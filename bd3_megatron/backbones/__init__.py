"""Backbones: families of transformers, each a class with frozen traits, and the table of a model's parameters.

Each module of this folder is one backbone. Its traits decide layer specifications, costs, and the model that ships with
exports; its table gives every parameter's Megatron name, export names and shape. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from bd3_common.registry import Registry

if TYPE_CHECKING:
    from bd3_megatron.config import ModelConfig

Shape = tuple[int, ...]

EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Traits:
    """Traits: the choices that define the layers of a backbone. Exports carry them in ``config.json``.

    Every backbone is pre-norm with rotary positions, grouped-query attention, and two-matrix or gated MLPs.

    Attributes:
        norm: kind of all norms; LayerNorm has a bias, RMSNorm has none.
        activation: of the MLP; ``gelu_tanh`` is the tanh approximation of GELU.
        gated: the MLP is ``down(activation(gate(x)) * up(x))``, else ``down(activation(up(x)))``.
        mlp_bias: the MLP's matrices have biases.
        qk_norm: each head of queries and keys is normalized before the rotary embedding.
        head_bias: the output head has a bias.
        qkv_bias: the projections to queries, keys and values have biases.
    """

    norm: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    activation: Literal["silu", "gelu_tanh"] = "silu"
    gated: bool = True
    mlp_bias: bool = False
    qk_norm: bool = False
    head_bias: bool = False
    qkv_bias: bool = False


@dataclass(frozen=True)
class Parameter:
    """One parameter of the whole model: vocabulary not padded, no tensor parallelism.

    Attributes:
        name: Megatron's, global: layers are counted over all pipeline stages.
        exported: names and shapes of the exported tensors that make it up, stacked along the first axis.
        axis: the axis that tensor-parallel ranks split; None: every rank holds all of it.
        by_group: rows of the exported tensors alternate: of each group of attention heads the query heads, the key
            head, the value head.
    """

    name: str
    exported: Mapping[str, Shape]
    axis: int | None = None
    by_group: bool = False

    @property
    def shape(self) -> Shape:
        """Shape of the Megatron tensor."""
        shapes = list(self.exported.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def local(self, tensor: int) -> Shape:
        """Shape on one of ``tensor`` tensor-parallel ranks; a vocabulary is rounded up to a multiple of them."""
        return tuple(-(-n // tensor) if axis == self.axis else n for axis, n in enumerate(self.shape))


class Backbone:
    """Base class of backbones. A new one sets ``traits``, and the defaults that differ.

    The methods that list parameters give them in the order in which Megatron builds them.
    """

    traits: ClassVar[Traits]
    norm_eps: ClassVar[float] = 1e-6
    """default of ``model.norm_eps``"""
    grouped_queries: ClassVar[bool] = True
    """``model.kv_heads`` may be less than ``model.heads``"""
    may_tie: ClassVar[bool] = True
    """``model.tie_embeddings`` may be true"""
    zero_head: ClassVar[bool] = False
    """the output head starts at zero"""

    def default_ffn(self, hidden: int) -> int:
        """Default of ``model.ffn_hidden``, the width between the MLP's matrices."""
        return 3 * hidden

    def parameters(self, model: ModelConfig, vocab_size: int) -> Iterator[Parameter]:
        """Every parameter of the whole model."""
        yield from self.embedding_parameters(model, vocab_size)
        for layer in range(model.layers):
            yield from self.layer_parameters(model, layer)
        yield from self.head_parameters(model, vocab_size)

    def embedding_parameters(self, model: ModelConfig, vocab_size: int) -> Iterator[Parameter]:
        """Parameters of the embedding."""
        yield Parameter(EMBEDDING, {"model.embed_tokens.weight": (vocab_size, model.hidden)}, axis=0)

    def layer_parameters(self, model: ModelConfig, layer: int) -> Iterator[Parameter]:
        """Parameters of one layer, counted from 0."""
        hidden, ffn, width = model.hidden, model.ffn, model.width_per_head
        query, grouped = model.heads * width, model.groups * width
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
        rows = {"q": query, "k": grouped, "v": grouped}
        qkv = {f"{attention}{name}_proj.weight": (count, hidden) for name, count in rows.items()}
        up = {f"{mlp}{name}_proj.weight": (ffn, hidden) for name in (("gate", "up") if self.traits.gated else ("up",))}
        up_bias = {name.removesuffix("weight") + "bias": (ffn,) for name in up}
        yield from self._norm(hidden, f"{ours}input_layernorm", f"{theirs}input_layernorm")
        yield Parameter(f"{ours}self_attention.linear_proj.weight", {f"{attention}o_proj.weight": (hidden, query)}, 1)
        yield Parameter(f"{ours}self_attention.linear_qkv.weight", qkv, 0, by_group=True)
        if self.traits.qkv_bias:
            qkv_bias: dict[str, Shape] = {f"{attention}{name}_proj.bias": (count,) for name, count in rows.items()}
            yield Parameter(f"{ours}self_attention.linear_qkv.bias", qkv_bias, 0, by_group=True)
        if self.traits.qk_norm:
            yield from self._norm(width, f"{ours}self_attention.q_layernorm", f"{attention}q_norm")
            yield from self._norm(width, f"{ours}self_attention.k_layernorm", f"{attention}k_norm")
        yield from self._norm(hidden, f"{ours}pre_mlp_layernorm", f"{theirs}post_attention_layernorm")
        yield Parameter(f"{ours}mlp.linear_fc1.weight", up, 0)
        if self.traits.mlp_bias:
            yield Parameter(f"{ours}mlp.linear_fc1.bias", up_bias, 0)
        yield Parameter(f"{ours}mlp.linear_fc2.weight", {f"{mlp}down_proj.weight": (hidden, ffn)}, 1)
        if self.traits.mlp_bias:
            yield Parameter(f"{ours}mlp.linear_fc2.bias", {f"{mlp}down_proj.bias": (hidden,)})

    def head_parameters(self, model: ModelConfig, vocab_size: int) -> Iterator[Parameter]:
        """Parameters of the final norm and the output head; a tied head has no weight of its own."""
        yield from self._norm(model.hidden, "final_norm", "model.norm")
        if not model.tie_embeddings:
            yield Parameter("output_layer.weight", {"lm_head.weight": (vocab_size, model.hidden)}, 0)
        if self.traits.head_bias:
            yield Parameter("output_layer.bias", {"lm_head.bias": (vocab_size,)}, 0)

    def _norm(self, width: int, ours: str, theirs: str) -> Iterator[Parameter]:
        for part in ("weight", "bias") if self.traits.norm == "LayerNorm" else ("weight",):
            yield Parameter(f"{ours}.{part}", {f"{theirs}.{part}": (width,)})


BACKBONES = Registry(Backbone, "backbone", "model.backbone", "bd3_megatron.backbones")
