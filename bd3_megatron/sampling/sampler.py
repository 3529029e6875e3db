"""Sampling block by block with a cache of the finished blocks (arXiv 2503.09573, section 3 and appendix)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bd3_megatron.model import BlockDiffusionModel
from bd3_megatron.sampling.algorithms import DECODING_ALGORITHMS
from bd3_megatron.sampling.block import Block, Sampling, draw, probabilities
from bd3_megatron.sampling.cache import BlockForward

# A sample of more than this many tokens repeats itself if its last ones have less entropy than the floor.
_ENTROPY_WINDOW = 256
_ENTROPY_FLOOR = 4.0  # nats


@dataclass
class Samples:
    """Sampled rows.

    Attributes:
        ids: ``[b, n]``; EOS from a row's first new EOS on.
        nfe: forward passes of the decoding (number of function evaluations), those for the cut tail of the last block
            included.
        ends: length of each row without its EOS.
    """

    ids: Tensor
    nfe: int
    ends: list[int] = field(default_factory=list)


@torch.no_grad()
def sample(
    model: BlockDiffusionModel,
    prompt: Tensor,
    new_tokens: int,
    sampling: Sampling,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> Samples:
    """Continue prompts block by block.

    Args:
        prompt: ids ``[b, p]``, p at least 1 (BOS); a tail shorter than a block is fixed inside the first one.
        new_tokens: tokens to add at most; rounded up to whole blocks while sampling, cut after.
        eos_id: ends a row; None never ends one.
        report: called after every block with the number of tokens so far.

    Raises:
        ConfigError: ``sampling.method`` is not a decoding algorithm.
        ValueError: the rows would be longer than the model's length, or a prompt has the mask in it.
    """
    if (prompt == model.model.mask_id).any():
        raise ValueError(f"the prompt holds the mask id {model.model.mask_id}; a prompt has real tokens only")
    if model.streams.noisy == 0:
        return _sample_causal(model, prompt, new_tokens, sampling, eos_id, generator, report)
    size, mask_id, total = model.streams.block_size, model.model.mask_id, prompt.shape[1] + new_tokens
    padded = -(-total // size) * size
    if padded > model.model.length:
        raise ValueError(f"{total} tokens are more than the model's row of {model.model.length}")
    generator = generator or torch.Generator(prompt.device)
    ids = torch.full((len(prompt), padded), mask_id, dtype=torch.long, device=prompt.device)
    ids[:, : prompt.shape[1]] = prompt
    algorithm = DECODING_ALGORITHMS.load(sampling.method)(sampling.options)
    forward, nfe = BlockForward(model), 0
    whole = prompt.shape[1] // size * size
    for start in range(0, whole, size):
        forward.append(ids[:, start : start + size])
    end = whole
    for start in range(whole, padded, size):
        block = Block(ids[:, start : start + size], mask_id, forward.logits, sampling, generator)  # a view of ids
        algorithm.decode(block)
        nfe += block.calls
        end = start + size
        report(min(end, total))
        if end < padded:
            if _finished(ids[:, :end], prompt.shape[1], eos_id, sampling):
                break
            forward.append(block.ids)
    return _trimmed(ids[:, : min(end, total)], prompt.shape[1], eos_id, nfe)


def _sample_causal(
    model: BlockDiffusionModel,
    prompt: Tensor,
    new_tokens: int,
    sampling: Sampling,
    eos_id: int | None,
    generator: torch.Generator | None,
    report: Callable[[int], None],
) -> Samples:
    """Left to right for the causal objective: each token is drawn from the logits of the one before it."""
    if prompt.shape[1] + new_tokens > model.model.length:
        raise ValueError(f"{prompt.shape[1] + new_tokens} tokens are more than the model's row of {model.model.length}")
    generator = generator or torch.Generator(prompt.device)
    forward, ids = BlockForward(model), prompt
    for start in range(prompt.shape[1] - 1):
        forward.append(prompt[:, start : start + 1])
    for _ in range(new_tokens):
        last = ids[:, -1:]
        p = probabilities(forward.logits(last), sampling)
        forward.append(last)
        ids = torch.cat([ids, draw(p, generator)], 1)
        report(ids.shape[1])
        if _finished(ids, prompt.shape[1], eos_id, sampling):
            break
    return _trimmed(ids, prompt.shape[1], eos_id, ids.shape[1] - prompt.shape[1])


def _finished(ids: Tensor, prompt: int, eos_id: int | None, sampling: Sampling) -> bool:
    """True if every row has ended: by an EOS after the prompt, or by the entropy of its last tokens."""
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    if eos_id is not None:
        ended |= (ids[:, prompt:] == eos_id).any(1)
    if sampling.stop_on_low_entropy and ids.shape[1] > _ENTROPY_WINDOW:
        ended |= torch.stack([_entropy(row[-_ENTROPY_WINDOW:]) < _ENTROPY_FLOOR for row in ids])
    return bool(ended.all())


def _entropy(ids: Tensor) -> Tensor:
    """Entropy in nats of the empirical distribution of ids ``[n]``."""
    p = torch.unique(ids, return_counts=True)[1].double() / len(ids)
    return -(p * p.log()).sum()


def _trimmed(ids: Tensor, prompt: int, eos_id: int | None, nfe: int) -> Samples:
    """Samples whose rows are EOS from their first new EOS on."""
    ids, ends = ids.clone(), []
    for row in ids:
        hits = [] if eos_id is None else (row[prompt:] == eos_id).nonzero().flatten().tolist()
        ends.append(prompt + hits[0] if hits else len(row))
        if hits:
            row[prompt + hits[0] :] = eos_id
    return Samples(ids, nfe, ends)


def log_likelihood(model: BlockDiffusionModel, ids: Tensor) -> Tensor:
    """Exact log-likelihood in nats of rows ``[b, L]`` for a model with blocks of one token, position 0 given.

    Token by token through the cache: position l is predicted from a mask at l and the clean tokens before it, which
    is the objective's likelihood when every token is masked (docs/science.md, step 9).

    Returns:
        ``[b, L - 1]`` log-conditionals of positions 1 to L - 1.
    """
    if model.streams.block_size != 1:
        raise ValueError("the likelihood is exact for blocks of one token only")
    forward, out = BlockForward(model), []
    mask = torch.full_like(ids[:, :1], model.model.mask_id)
    for position in range(ids.shape[1]):
        token = ids[:, position : position + 1]
        if position:
            query = mask if model.streams.noisy else ids[:, position - 1 : position]
            logits = forward.logits(query)[:, 0]
            out.append(torch.log_softmax(logits.double(), -1).gather(1, token)[:, 0])
        if model.streams.noisy:
            forward.append(token)
        elif position:
            forward.append(ids[:, position - 1 : position])
    return torch.stack(out, 1)
