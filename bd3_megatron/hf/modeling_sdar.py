"""Block diffusion language model with Qwen3's layers, as SDAR checkpoints have it.

This file ships with exports, and needs torch and transformers (4.51 or later). The layers are transformers' own; the
attention mask and the decoding are here. A block of tokens sees itself whole and every block before it. Positions that
hold the mask token are predicted in place: logits at position i are those of token i.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3ForCausalLM, Qwen3Model

from .configuration_sdar import SDARConfig


def block_causal_bias(first: int, end: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to attention scores ``[1, 1, end - first, end]``, queries from ``first`` on, keys from 0 on.

    It is 0 where the key's block is the query's or one before, else the lowest number.
    """
    block = torch.arange(end, device=device) // size
    unseen = block[first:, None] < block[None, :]
    return torch.zeros(unseen.shape, dtype=dtype, device=device).masked_fill(unseen, torch.finfo(dtype).min)[None, None]


class SDARModel(Qwen3Model):
    """The layers under the block-causal mask."""

    config_class = SDARConfig

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, **kwargs):
        """As of Qwen3Model; ``attention_mask`` may be ``[b, keys]``, 0 where a key is padding, or ``[b, 1, queries,
        keys]``, which is added to the scores in place of the block-causal one."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        first = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None or attention_mask.dim() == 2:
            dtype = self.embed_tokens.weight.dtype
            bias = block_causal_bias(first, first + given.shape[1], self.config.block_size, dtype, given.device)
            if attention_mask is not None:
                padding = attention_mask[:, None, None, :] == 0
                bias = bias.masked_fill(padding, torch.finfo(dtype).min)
            attention_mask = bias
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class SDARForCausalLM(Qwen3ForCausalLM):
    """The model with its head. Logits at a position are of the token there, not of the next one."""

    config_class = SDARConfig

    def __init__(self, config: SDARConfig):
        super().__init__(config)
        self.model = SDARModel(config)
        self.post_init()

    def forward(self, *args, labels=None, **kwargs):
        """As of Qwen3ForCausalLM, without ``labels``: its loss would shift them by one position.

        Raises:
            ValueError: labels are given.
        """
        if labels is not None:
            raise ValueError("labels: a block diffusion model has no next-token loss; compute its own from the logits")
        return super().forward(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 128,
        strategy: str = "low_confidence_static",
        steps: int | None = None,
        threshold: float = 0.9,
        temperature: float = 0.0,
        stop_at_eos: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts block by block; blocks begin at multiples of the block size, prompts included.

        Args:
            input_ids: ``[b, p]``, prompts of one length. The tail of a prompt stays in the first block.
            max_new_tokens: n. Blocks are generated whole, then cut to n.
            strategy: which masked positions a forward pass fills. ``low_confidence_static``: a fixed number, those of
                the highest probability; ``low_confidence_dynamic``: all above ``threshold``, at least one;
                ``sequential``: a fixed number from the left.
            steps: forward passes for a block of masks, of the strategies with a fixed number; None: one per token.
            temperature: divides the logits; 0 takes the likeliest token.
            stop_at_eos: end when every row has an EOS; what follows it is padding.
            generator: source of chance, on the model's device.

        Returns:
            ``[b, p + n]``, or fewer columns where every row ended earlier.

        Raises:
            ValueError: one line naming the argument that does not fit.
        """
        size, mask_id = self.config.block_size, self.config.mask_token_id
        if strategy not in ("low_confidence_static", "low_confidence_dynamic", "sequential"):
            raise ValueError(
                f"strategy={strategy!r}: use 'low_confidence_static', 'low_confidence_dynamic' or 'sequential'"
            )
        if max_new_tokens < 1 or (steps is not None and not 1 <= steps <= size):
            raise ValueError(f"max_new_tokens={max_new_tokens}, steps={steps}: use 1 or more, steps up to {size}")
        if (input_ids == mask_id).any():
            raise ValueError(f"input_ids: holds the mask id {mask_id}; a prompt has real tokens only")
        rows, given = input_ids.shape
        end, start = given + max_new_tokens, given // size * size
        canvas = input_ids.new_full((rows, -(-end // size) * size), mask_id)
        canvas[:, :given] = input_ids
        cache = DynamicCache()
        if start:
            self.model(input_ids=canvas[:, :start], past_key_values=cache, use_cache=True)
        quota = -(-size // (steps or size))
        eos = self.config.eos_token_id if stop_at_eos else None
        for first in range(start, end, size):
            block = canvas[:, first : first + size]  # a view
            while (masked := block == mask_id).any():
                logits = self._block_logits(block, cache)
                for begin, stop in [(mask_id, mask_id + 1), *self.config.unused_ids]:
                    logits[..., begin:stop] = -torch.inf
                tokens, confidence = _draw(logits, temperature, generator)
                chosen = _choose(confidence.masked_fill(~masked, -1.0), masked, strategy, quota, threshold)
                block[chosen] = tokens[chosen]
            if eos is not None and (canvas[:, given : first + size] == eos).any(1).all():
                break
            self.model(input_ids=block, past_key_values=cache, use_cache=True)
        ids = canvas[:, : min(end, first + size)]
        if eos is not None:
            is_eos = (ids[:, given:] == eos).long()
            after = is_eos.cumsum(1) - is_eos > 0
            ids[:, given:].masked_fill_(
                after, self.config.pad_token_id if self.config.pad_token_id is not None else eos
            )
            ids = ids[:, : given + int((~after).sum(1).max())]
        return ids

    def _block_logits(self, block: Tensor, cache: DynamicCache) -> Tensor:
        """Logits ``[b, B', V]`` of a block behind the cached ones, in fp64; the cache stays as it is."""
        hidden = self.model(input_ids=block, past_key_values=cache, use_cache=True)[0]
        cache.crop(-block.shape[1])  # a positive length is refused by some releases of transformers
        return self.lm_head(hidden).double()


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A token for each position, and its probability."""
    probabilities = torch.softmax(logits / temperature if temperature else logits, dim=-1)
    if temperature:
        tokens = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(logits.shape[:-1])
    else:
        tokens = logits.argmax(-1)
    return tokens, probabilities.gather(-1, tokens[..., None])[..., 0]


def _choose(confidence: Tensor, masked: Tensor, strategy: str, quota: int, threshold: float) -> Tensor:
    """Positions ``[b, B']`` to fill: among the masked ones, at least one in a row that has any."""
    if strategy == "sequential":
        return masked & (masked.cumsum(1) <= quota)
    rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    if strategy == "low_confidence_static":
        return masked & (rank < quota)
    return masked & ((confidence > threshold) | (rank == 0))
