"""Counts of floating-point operations, with their assumptions.

A multiply-add is two operations. Norms, activations, rotary embeddings, softmax and the embedding lookup are not
counted. A token is a data token: L per row, however many streams carry it. A training step is three forward passes
(forward, gradient by input, gradient by weight); recomputation is not counted as useful.
"""

from __future__ import annotations

from dataclasses import dataclass

from bd3_megatron.config import DiffusionConfig, ModelConfig


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs per data token, by part."""

    linear: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.head


def layer_parameters(model: ModelConfig) -> dict[str, int]:
    """Weights of one layer's matrices: query, key and value, output, MLP."""
    inner, grouped = model.heads * model.width_per_head, model.groups * model.width_per_head
    return {
        "query": model.hidden * inner,
        "key_value": 2 * model.hidden * grouped,
        "output": inner * model.hidden,
        "mlp": (3 if model.traits.gated else 2) * model.hidden * model.ffn,
    }


def forward_flops(model: ModelConfig, diffusion: DiffusionConfig, mask_rate: float | None = None) -> Flops:
    """Useful forward FLOPs per data token.

    Useful are pairs that the mask admits, of the clean stream in the last layer only keys and values, and the head on
    masked positions only. The last block of the clean stream is counted although no block attends to it.

    Args:
        mask_rate: fraction of tokens masked; None takes the mean of the configured objective.
    """
    if mask_rate is None:
        mask_rate = diffusion.mean_masked_fraction
    weights = layer_parameters(model)
    per_stream = 2 * sum(weights.values())
    pair = 4 * model.heads * model.width_per_head  # two products per admitted pair, over all heads
    if diffusion.objective == "causal":
        linear, pairs, predicted = model.layers * per_stream, model.layers * (model.length + 1) / 2, 1.0
    else:
        draws, block = diffusion.draws, diffusion.block_size
        has_clean = block < model.length
        streams = draws + has_clean
        # Pairs per position of one stream: its own block and half of what lies before it.
        one = block + (model.length - block) / 2 if has_clean else model.length
        unused = 2 * (weights["query"] + weights["output"] + weights["mlp"]) if has_clean else 0
        linear = model.layers * streams * per_stream - unused
        pairs = model.layers * streams * one - (one if has_clean else 0)
        predicted = draws * mask_rate
    return Flops(linear, pairs * pair, predicted * 2 * model.hidden * (model.vocab_size or 0))


def plain_forward_flops(model: ModelConfig, diffusion: DiffusionConfig) -> float:
    """Forward FLOPs per data token of the plain path: every pair of all streams, all layers and the head on all."""
    streams = diffusion.draws + (diffusion.block_size < model.length) if diffusion.objective == "diffusion" else 1
    layer = 2 * sum(layer_parameters(model).values())
    pairs = streams**2 * model.length * 4 * model.heads * model.width_per_head
    return model.layers * (streams * layer + pairs) + streams * 2 * model.hidden * (model.vocab_size or 0)


def training_flops_per_token(model: ModelConfig, diffusion: DiffusionConfig, mask_rate: float | None = None) -> float:
    """Useful FLOPs of a training step per data token: three forward passes."""
    return 3 * forward_flops(model, diffusion, mask_rate).total


def six_n(model: ModelConfig) -> float:
    """6 N per data token, N counting all parameters but the embedding table: the usual yardstick."""
    head = model.hidden * (model.vocab_size or 0)
    return 6 * (model.layers * sum(layer_parameters(model).values()) + head)
