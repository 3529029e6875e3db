"""Block diffusion language model on one device, in plain torch (arXiv 2503.09573).

This file ships with every exported checkpoint, so it imports nothing but torch and transformers (4.51 or
later). The attention mask is dense and every step is written out: read it top to bottom.

A row of L tokens is cut into blocks. The *noisy* stream holds the row with some tokens masked, and the model
predicts those. Each block sees itself and, through the *clean* stream, the true blocks before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

KeysValues = tuple[Tensor, Tensor]  # of one layer, each [b, groups, length, head_dim]


# Backbones that older exports name without their traits.
TRAITS = {
    "qwen3": {
        "norm": "RMSNorm",
        "activation": "silu",
        "gated": True,
        "mlp_bias": False,
        "qk_norm": True,
        "head_bias": False,
        "qkv_bias": False,
    },
    "dit": {
        "norm": "LayerNorm",
        "activation": "gelu_tanh",
        "gated": False,
        "mlp_bias": True,
        "qk_norm": False,
        "head_bias": True,
        "qkv_bias": False,
    },
}


class BD3Config(PretrainedConfig):
    """Shape of the model and its objective.

    Args:
        backbone: name of the backbone.
        traits: what the backbone computes; None needs a backbone of :data:`TRAITS`. ``norm`` is RMSNorm or LayerNorm
            (with bias), ``activation`` silu or gelu_tanh; ``gated``, ``mlp_bias``, ``qk_norm`` (norms of the heads of
            q and k), ``head_bias`` and ``qkv_bias`` are true or false.
        vocab_size: tokens, the mask included.
        num_key_value_heads: heads of keys and values; None means as many as query heads.
        head_dim: width of one head; None means ``hidden_size / num_attention_heads``.
        max_position_embeddings: tokens per row in training, L.
        position_scaling: change of the rotary frequencies: ``kind`` (linear or llama3), ``factor``, ``low``, ``high``,
            ``original_length``; None: none.
        block_size: tokens per block; ``max_position_embeddings`` is MDLM.
        objective: ``diffusion`` (predict the masked tokens) or ``causal`` (predict the next token).
        mask_token_id: never predicted; None means ``vocab_size - 1``.
    """

    model_type = "bd3_megatron"

    def __init__(
        self,
        backbone: str = "qwen3",
        traits: dict | None = None,
        vocab_size: int = 50258,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int = 2304,
        max_position_embeddings: int = 1024,
        rope_theta: float = 10_000.0,
        position_scaling: dict | None = None,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        block_size: int = 16,
        objective: str = "diffusion",
        mask_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        traits = TRAITS.get(backbone) if traits is None else traits
        if traits is None:
            raise ValueError(f"backbone={backbone!r}: give its traits, or use {' or '.join(map(repr, TRAITS))}")
        traits = {"qkv_bias": False} | traits  # which older exports do not name
        if wrong := sorted(traits.keys() ^ next(iter(TRAITS.values())).keys()):
            raise ValueError(f"traits: {wrong[0]} is missing or unknown; take modeling_bd3.py from the export itself")
        for name, values in (("norm", ("RMSNorm", "LayerNorm")), ("activation", ("silu", "gelu_tanh"))):
            if traits[name] not in values:
                raise ValueError(f"traits.{name}={traits[name]!r}: use {' or '.join(map(repr, values))}")
        if objective not in ("diffusion", "causal"):
            raise ValueError(f"objective={objective!r}: use 'diffusion' or 'causal'")
        self.backbone = backbone
        self.traits = dict(traits)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.position_scaling = position_scaling
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.block_size = block_size
        self.objective = objective
        self.mask_token_id = vocab_size - 1 if mask_token_id is None else mask_token_id
        # After super().__init__, which resets these four in transformers 4 and drops some of them in 5.
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings

    @property
    def causal_block(self) -> int:
        """Tokens that a single stream uncovers at once: a block, or one token under the causal objective."""
        return 1 if self.objective == "causal" else self.block_size


def block_causal_mask(length: int, size: int, device: torch.device | None = None, first: int = 0) -> Tensor:
    """``[length - first, length]`` bool: queries from ``first`` on see their own block and those before."""
    block = torch.arange(length, device=device) // size
    return block[first:, None] >= block[None, :]


def two_stream_mask(length: int, size: int, device: torch.device | None = None) -> Tensor:
    """``[2 length, 2 length]`` bool, queries by keys, the noisy stream first, then the clean one.

    Noisy block i sees noisy block i and the clean blocks before i; clean block i sees clean blocks up to i.
    """
    block = torch.arange(length, device=device) // size
    query, key = block[:, None], block[None, :]
    noisy = torch.cat([query == key, query > key], dim=1)
    clean = torch.cat([torch.zeros_like(query == key), query >= key], dim=1)
    return torch.cat([noisy, clean])


def inside_documents(mask: Tensor, documents: Tensor | None) -> Tensor:
    """``[b, 1, s, s]`` bool: of what ``mask`` ``[s, s]`` admits, keys of the query's document ``[b, s]``."""
    if documents is None:
        return mask
    return (mask & (documents[:, :, None] == documents[:, None, :]))[:, None]


def without_padding(mask: Tensor, attention_mask: Tensor | None, ids: Tensor, streams: int = 1) -> Tensor:
    """``mask`` without keys where ``attention_mask`` ``[b, L]`` is 0; padding sees itself, so that no row is empty.

    Raises:
        ValueError: of another shape than ``ids``, or a row has padding before a token.
    """
    if attention_mask is None:
        return mask
    if attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask: shape {list(attention_mask.shape)} differs from input_ids {list(ids.shape)}")
    seen = attention_mask.bool()
    if (seen[:, 1:] & ~seen[:, :-1]).any():
        raise ValueError("attention_mask: padding before a token would move its position; pad at the end of rows")
    seen = seen.repeat(1, streams)
    itself = torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)
    mask = mask if mask.dim() == 4 else mask[None, None]
    return mask & (seen[:, None, None, :] | itself)


def rotary(positions: Tensor, head_dim: int, theta: float, scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[s, head_dim]`` in fp32 for positions ``[s]``; ``scaling`` as in :class:`BD3Config`.

    Computed in every forward: a buffer from ``__init__`` is lost where models are built on the meta device.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = theta**-exponent
    if scaling is not None:
        slow = frequencies / scaling["factor"]
        turns = scaling["original_length"] * frequencies / (2 * math.pi)
        kept = ((turns - scaling["low"]) / (scaling["high"] - scaling["low"])).clamp(0, 1)
        frequencies = torch.lerp(slow, frequencies, kept) if scaling["kind"] == "llama3" else slow
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x`` ``[b, heads, s, d]`` by the angles of its positions; dimension i pairs with i + d / 2."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log p(target)`` in fp32 nats: ``[b, s, V]``, ``[b, s] -> [b, s]``; 0 where the target is -100."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with bias, over the last axis, computed in fp32."""

    def __init__(self, width: int, config: BD3Config):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if config.traits["norm"] == "LayerNorm" else None

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        if self.bias is not None:
            h = F.layer_norm(h, self.weight.shape, self.weight.float(), self.bias.float(), self.eps)
        else:
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float()
        return h.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; some backbones normalize the heads of q and k before."""

    def __init__(self, config: BD3Config):
        super().__init__()
        self.heads, self.groups, self.width = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        bias = config.traits["qkv_bias"]
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.groups * self.width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.groups * self.width, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.width, config.hidden_size, bias=False)
        normed = config.traits["qk_norm"]
        self.q_norm = Norm(self.width, config) if normed else nn.Identity()
        self.k_norm = Norm(self.width, config) if normed else nn.Identity()

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        b, s, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, s, self.heads, self.width)).transpose(1, 2)  # [b, heads, s, d]
        k = self.k_norm(self.k_proj(x).view(b, s, self.groups, self.width)).transpose(1, 2)  # [b, groups, s, d]
        v = self.v_proj(x).view(b, s, self.groups, self.width).transpose(1, 2)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        queries_per_group = self.heads // self.groups
        out = F.scaled_dot_product_attention(
            q,
            k.repeat_interleave(queries_per_group, dim=1),
            v.repeat_interleave(queries_per_group, dim=1),
            attn_mask=mask,
        )
        return self.o_proj(out.transpose(1, 2).reshape(b, s, self.heads * self.width)), (k, v)


class MLP(nn.Module):
    """``down(activation(gate(x)) * up(x))`` where gated, else ``down(activation(up(x)))``."""

    def __init__(self, config: BD3Config):
        super().__init__()
        hidden, width, bias = config.hidden_size, config.intermediate_size, config.traits["mlp_bias"]
        self.tanh_gelu = config.traits["activation"] == "gelu_tanh"
        self.gate_proj = nn.Linear(hidden, width, bias=bias) if config.traits["gated"] else None
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh") if self.tanh_gelu else F.silu(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: BD3Config):
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        attended, present = self.self_attn(self.input_layernorm(x), angles, mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


@dataclass(frozen=True)
class Place:
    """Where tokens stand and what they see.

    Attributes:
        positions: ``[s]``.
        mask: ``[s, keys]`` or ``[b, 1, s, keys]``; None lets all see all.
        past: each layer's keys and values of tokens before them.
    """

    positions: Tensor
    mask: Tensor | None
    past: list[KeysValues] | None = None


class BD3PreTrainedModel(PreTrainedModel):
    """What both models share: their configuration, and how their weights begin."""

    config_class = BD3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


class BD3Model(BD3PreTrainedModel):
    """Embedding, layers and the final norm."""

    def __init__(self, config: BD3Config):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        documents: Tensor | None = None,
        return_dict: bool | None = None,
        place: Place | None = None,
    ) -> BaseModelOutput | tuple[Tensor, ...] | tuple[Tensor, list[KeysValues]]:
        """Hidden states of one stream, in which a block sees those before it as they stand in the input.

        Args:
            input_ids, attention_mask, documents: as in :meth:`BD3ForMaskedLM.forward`.
            place: what the tokens see and where they stand, in place of that; then the result is the hidden states
                ``[b, s, h]`` and each layer's keys and values, those of ``place.past`` in front.
        """
        if place is not None:
            return self._run(input_ids, place)
        length = input_ids.shape[1]
        mask = block_causal_mask(length, self.config.causal_block, input_ids.device)
        mask = without_padding(inside_documents(mask, documents), attention_mask, input_ids)
        hidden, _ = self._run(input_ids, Place(torch.arange(length, device=input_ids.device), mask))
        as_tuple = return_dict is False or (return_dict is None and not self.config.return_dict)
        return (hidden,) if as_tuple else BaseModelOutput(last_hidden_state=hidden)

    def _run(self, ids: Tensor, place: Place) -> tuple[Tensor, list[KeysValues]]:
        x = self.embed_tokens(ids)
        config = self.config
        angles = rotary(place.positions, config.head_dim, config.rope_theta, config.position_scaling)
        present = []
        for index, layer in enumerate(self.layers):
            arguments = (x, angles, place.mask, None if place.past is None else place.past[index])
            if self.gradient_checkpointing and self.training:
                x, keys_values = self._gradient_checkpointing_func(layer.__call__, *arguments)
            else:
                x, keys_values = layer(*arguments)
            present.append(keys_values)
        return self.norm(x), present


class CleanBlocks:
    """The finished part of a text that is being generated: keys and values of its tokens, or without a cache
    its ids, which are then run again in every forward pass (slow, and the same result)."""

    def __init__(self, backbone: BD3Model, rows: int, use_cache: bool):
        self.backbone, self.use_cache = backbone, use_cache
        self.ids = torch.empty(rows, 0, dtype=torch.long, device=backbone.embed_tokens.weight.device)  # [b, n]
        self.past: list[KeysValues] | None = None

    def append(self, ids: Tensor) -> Tensor:
        """Add whole blocks ``ids`` ``[b, s]`` and return their hidden states ``[b, s, h]``."""
        hidden, present = self._run(ids)
        self.past = present if self.use_cache else None
        self.ids = torch.cat([self.ids, ids], dim=1)
        return hidden

    def hidden(self, block: Tensor) -> Tensor:
        """Hidden states ``[b, B', h]`` of a noisy ``block`` ``[b, B']`` that follows the clean ones."""
        return self._run(block)[0]

    def _run(self, ids: Tensor) -> tuple[Tensor, list[KeysValues]]:
        # The last block of a block-causal call sees what a noisy block sees: itself and the blocks before it.
        new = ids.shape[1]
        stop = self.ids.shape[1] + new
        if not self.use_cache:
            ids = torch.cat([self.ids, ids], dim=1)
        start = stop - ids.shape[1]
        mask = block_causal_mask(stop, self.backbone.config.causal_block, ids.device, first=start)
        positions = torch.arange(start, stop, device=ids.device)
        hidden, present = self.backbone(ids, place=Place(positions, mask, self.past))
        return hidden[:, -new:], present


@dataclass(frozen=True)
class Sampler:
    """Sampler of a block's masked positions; arguments as in ``BD3ForMaskedLM.generate``."""

    name: str
    steps: int
    top_p: float
    temperature: float
    generator: torch.Generator | None

    def __post_init__(self):
        if self.name not in ("first_hitting", "steps"):
            raise ValueError(f"sampler={self.name!r}: use 'first_hitting' or 'steps'")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: use 1 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: use a value above 0 and up to 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: use 0 or more")

    def draw(self, logits: Tensor) -> Tensor:
        """One token per logit vector, ``[..., V] -> [...]``; in fp64, because fp32 distorts the tail."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.double()
        # Shifted before the division: a tiny temperature then gives -inf at worst, never inf.
        shifted = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        probabilities = torch.softmax(shifted, dim=-1).flatten(0, -2)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            # A token stays when the likelier ones fall short of top_p, so at least the first does.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0)
            probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
        return torch.multinomial(probabilities, 1, generator=self.generator).view(logits.shape[:-1])

    def fill(self, block: Tensor, model: BD3ForMaskedLM, clean: CleanBlocks) -> None:
        """Replace every mask in ``block`` ``[b, B']``, in place; all rows hold equally many."""
        fill = self._first_hitting if self.name == "first_hitting" else self._ancestral
        fill(block, model, clean)

    def _first_hitting(self, block: Tensor, model: BD3ForMaskedLM, clean: CleanBlocks) -> None:
        """One position per row and forward pass. The paper also draws the times at which masks fall; the network is
        given no time, so the uniform order of the positions is all that matters."""
        while (masked := block == model.config.mask_token_id).any():
            position = torch.multinomial(masked.double(), 1, generator=self.generator)  # [b, 1]
            hidden = clean.hidden(block).take_along_dim(position[..., None], dim=1)  # [b, 1, h]
            block.scatter_(1, position, self.draw(model.logits(hidden)))

    def _ancestral(self, block: Tensor, model: BD3ForMaskedLM, clean: CleanBlocks) -> None:
        """Time falls from 1 to 0 in equal steps; between t and s a mask goes with probability (t - s) / t."""
        for remaining in range(self.steps, 0, -1):  # t = remaining / steps, s = (remaining - 1) / steps
            uniform = torch.rand(block.shape, dtype=torch.float64, device=block.device, generator=self.generator)
            reveal = (block == model.config.mask_token_id) & (uniform < 1 / remaining)
            if reveal.any():
                block[reveal] = self.draw(model.logits(clean.hidden(block)[reveal]))


class BD3ForMaskedLM(BD3PreTrainedModel):
    """The model with its head, its loss and its sampler."""

    # transformers 5 wants target and source; 4 wants the target alone.
    _tied_weights_keys = (
        {"lm_head.weight": "model.embed_tokens.weight"}
        if int(transformers.__version__.split(".")[0]) >= 5
        else ["lm_head.weight"]
    )

    def __init__(self, config: BD3Config):
        super().__init__(config)
        self.model = BD3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.traits["head_bias"])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def logits(self, hidden: Tensor) -> Tensor:
        """Head on ``hidden``, ``[..., h] -> [..., V]``; the mask id gets the lowest finite value."""
        logits = self.lm_head(hidden)
        mask_id = torch.tensor([self.config.mask_token_id], device=logits.device)
        return logits.index_fill(-1, mask_id, torch.finfo(logits.dtype).min)

    def forward(
        self,
        input_ids: Tensor,
        clean_ids: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        return_dict: bool | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Logits of a noisy row, and its loss.

        Args:
            input_ids: ``[b, L]``, the row with masks in it (training never masks position 0, the BOS).
            clean_ids: ``[b, L]``, the true row. Given, both streams run under :func:`two_stream_mask`, as in
                training. Without it a block sees the blocks before it as they stand in the input.
            labels: ``[b, L]``, the true row; -100 leaves a position out.
            loss_weights: ``[b, L]`` or ``[b, 1]``, w of the noise schedule (log-linear: 1 / t); None means 1.
            documents: ``[b, L]`` int, the document that each position belongs to. Given, a position sees its own
                document only, and under the causal objective none predicts the first token of the next one.
            attention_mask: ``[b, L]``, 0 at padding, which ends a row: positions count from its first token.

        Returns:
            ``loss`` (nats per token: the sum of w nll over masked positions, divided by b L) and ``logits``
            ``[b, L, V]`` of the noisy stream. Under the causal objective the logits at i predict token i + 1,
            and the loss sums the L - 1 shifted targets.

        Raises:
            ValueError: clean_ids, documents or attention_mask of another shape, padding that is not at the end of a
                row, or clean_ids under the causal objective.
        """
        length = input_ids.shape[1]
        if documents is not None and documents.shape != input_ids.shape:
            raise ValueError(f"documents: shape {list(documents.shape)} differs from input_ids {list(input_ids.shape)}")
        positions = torch.arange(length, device=input_ids.device)
        if clean_ids is None:
            mask = block_causal_mask(length, self.config.causal_block, input_ids.device)
            mask = without_padding(inside_documents(mask, documents), attention_mask, input_ids)
            hidden, _ = self.model(input_ids, place=Place(positions, mask))
        else:
            if self.config.objective == "causal":
                raise ValueError("clean_ids: the causal objective has one stream; pass input_ids alone")
            if clean_ids.shape != input_ids.shape:
                raise ValueError(
                    f"clean_ids: shape {list(clean_ids.shape)} differs from input_ids {list(input_ids.shape)}"
                )
            mask = two_stream_mask(length, self.config.block_size, input_ids.device)
            mask = inside_documents(mask, None if documents is None else documents.repeat(1, 2))
            mask = without_padding(mask, attention_mask, input_ids, streams=2)
            hidden, _ = self.model(torch.cat([input_ids, clean_ids], dim=1), place=Place(positions.repeat(2), mask))
            hidden = hidden[:, :length]
        logits = self.logits(hidden)
        if labels is not None and documents is not None and self.config.objective == "causal":
            first = documents != documents.roll(1, dims=1)
            labels = labels.masked_fill(first, -100)
        loss = None if labels is None else self.loss(logits, input_ids, labels, loss_weights)
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return (logits,) if loss is None else (loss, logits)
        return MaskedLMOutput(loss=loss, logits=logits)

    def loss(self, logits: Tensor, input_ids: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Scalar NELBO in nats per token; arguments as in :meth:`forward`."""
        weights = torch.ones(1, 1, device=labels.device) if weights is None else weights
        weights = weights.expand(labels.shape)
        if self.config.objective == "causal":
            weighted = weights[:, 1:] * token_nll(logits[:, :-1], labels[:, 1:])
        else:
            # Unmasked positions are known, so log p = 0 there.
            masked = input_ids == self.config.mask_token_id
            weighted = torch.where(masked, weights * token_nll(logits, labels), 0.0)
        return weighted.sum() / labels.numel()

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        max_new_tokens: int | None = None,
        sampler: str = "first_hitting",
        steps: int | None = None,
        top_p: float = 0.9,
        temperature: float = 1.0,
        stop_at_eos: bool = True,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        *,
        max_length: int | None = None,
        do_sample: bool | None = None,
        num_return_sequences: int = 1,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **others: object,
    ) -> Tensor:
        """Continue prompts, block after block (token after token under the causal objective).

        Args:
            input_ids: ``[b, p]``, prompts of one length that begin with the BOS, as training rows do; None
                means one row with the BOS alone. Where a prompt ends inside a block, its tail stays fixed.
            max_new_tokens: n; None fills a training row. Blocks are generated whole, then cut to n.
            sampler: ``first_hitting`` unmasks one uniformly drawn position per forward pass; ``steps`` is
                ancestral sampling on an even grid of times, any number of positions in one. Unused when causal.
            steps: grid points per block of the ``steps`` sampler; None means the block size.
            top_p: nucleus, the smallest set of likeliest tokens that holds this probability.
            temperature: divides the logits; 0 takes the likeliest token.
            stop_at_eos: end a row at its first generated EOS (padding follows), and all once every row ended.
            generator: source of chance, on the model's device.
            use_cache: keep keys and values of finished blocks; without, every forward pass computes them anew.
            max_length: p + n, in place of ``max_new_tokens``.
            do_sample: False takes the likeliest token, as ``temperature=0`` does.
            num_return_sequences: rows for each prompt, one after the other.
            attention_mask: ``[b, p]``, all ones: prompts have one length.
            generation_config: its ``max_new_tokens``, ``max_length``, ``do_sample``, ``temperature``, ``top_p`` and
                ``num_return_sequences`` stand for those that are not given.

        Returns:
            ``[b, p + n]``, or fewer columns where every row ended earlier.

        Raises:
            ValueError: one line naming the argument that does not fit.
        """
        if others:
            raise ValueError(f"{next(iter(others))}: not an argument of this model's generate; leave it out")
        if generation_config is not None:
            chosen = generation_config.to_diff_dict()
            if max_new_tokens is None and max_length is None:
                max_new_tokens = chosen.get("max_new_tokens")
                max_length = chosen.get("max_length") if max_new_tokens is None else None
            do_sample = chosen.get("do_sample") if do_sample is None else do_sample
            temperature = chosen.get("temperature", temperature) if temperature == 1.0 else temperature
            top_p = chosen.get("top_p", top_p) if top_p == 0.9 else top_p
            if num_return_sequences == 1:
                num_return_sequences = chosen.get("num_return_sequences", 1)
        if num_return_sequences < 1:
            raise ValueError(f"num_return_sequences={num_return_sequences}: use 1 or more")
        if do_sample is False:
            temperature = 0.0
        how = Sampler(sampler, self.config.block_size if steps is None else steps, top_p, temperature, generator)
        prompt = self._prompt(input_ids)
        if attention_mask is not None and (attention_mask.shape != prompt.shape or not attention_mask.bool().all()):
            raise ValueError("attention_mask: prompts are of one length, without padding; generate them one by one")
        if max_length is not None:
            if max_new_tokens is not None:
                raise ValueError(f"max_length={max_length}: max_new_tokens={max_new_tokens} is given, too; use one")
            max_new_tokens = max_length - prompt.shape[1]
        prompt = prompt.repeat_interleave(num_return_sequences, 0)
        rows, given = prompt.shape
        size, eos = self.config.causal_block, self.config.eos_token_id if stop_at_eos else None
        end = self.config.max_position_embeddings if max_new_tokens is None else given + max_new_tokens
        if end <= given:
            raise ValueError(f"max_new_tokens={end - given}: use 1 or more")
        start = given // size * size
        canvas = prompt.new_full((rows, -(-end // size) * size), self.config.mask_token_id)
        canvas[:, :given] = prompt
        clean = CleanBlocks(self.model, rows, use_cache)
        hidden = clean.append(prompt[:, :start]) if start else None
        for first in range(start, end, size):
            block = canvas[:, first : first + size]  # a view: what fills it fills the canvas
            if self.config.objective == "causal":
                block.copy_(how.draw(self.logits(hidden[:, -1:])))
            else:
                how.fill(block, self, clean)
            if eos is not None and (canvas[:, given : first + size] == eos).any(1).all():
                break
            if first + size < end:
                hidden = clean.append(block)
        return self._end_at_eos(canvas[:, :end], given, eos)

    def _prompt(self, input_ids: Tensor | None) -> Tensor:
        device = self.model.embed_tokens.weight.device
        if input_ids is None:
            if self.config.bos_token_id is None:
                raise ValueError("input_ids=None: the configuration has no bos_token_id to start from; pass a prompt")
            return torch.tensor([[self.config.bos_token_id]], device=device)
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids: shape {list(input_ids.shape)}; pass [rows, tokens] with one token or more")
        if (input_ids == self.config.mask_token_id).any():
            raise ValueError(f"input_ids: holds the mask id {self.config.mask_token_id}; a prompt has real tokens only")
        return input_ids.to(device)

    def _end_at_eos(self, ids: Tensor, given: int, eos: int | None) -> Tensor:
        """Pad behind each row's first generated EOS and drop the columns that are padding in every row."""
        if eos is None:
            return ids
        pad = eos if self.config.pad_token_id is None else self.config.pad_token_id
        is_eos = (ids[:, given:] == eos).long()
        after = is_eos.cumsum(1) - is_eos > 0
        ids[:, given:].masked_fill_(after, pad)
        return ids[:, : given + int((~after).sum(1).max())]
