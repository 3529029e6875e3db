"""Sampling block by block with a cache of the finished blocks (arXiv 2503.09573, section 3 and appendix)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from bd3_megatron.attention.core import BlockCache, TwoStreamAttention
from bd3_megatron.model import BlockDiffusionModel

# Past this many tokens, a sample whose last tokens have less entropy than the floor is repeating itself.
_ENTROPY_WINDOW = 256
_ENTROPY_FLOOR = 4.0  # nats


# (block [b, l], chosen bool [b, l]) -> logits [n, V] of the n chosen positions; see BlockForward.logits.
BlockLogits = Callable[[Tensor, Tensor], Tensor]


class BlockForward:
    """The model's forward pass on one block at a time, after the clean blocks so far.

    A block sees all of itself and of every cached block, which is what the noisy stream sees in training, so these
    logits equal the two-stream forward's. Needs a model that is a single pipeline stage.
    """

    def __init__(self, model: BlockDiffusionModel):
        if not (model.pre_process and model.post_process):
            raise ValueError("sampling needs the whole model on one pipeline stage")
        self.model = model
        self.length = 0
        self._attentions = [m for m in model.modules() if isinstance(m, TwoStreamAttention)]
        self._caches = [BlockCache() for _ in self._attentions]

    @contextlib.contextmanager
    def _cached(self, append: bool) -> Iterator[None]:
        for attention, cache in zip(self._attentions, self._caches):
            cache.append = append
            attention.cache = cache
        try:
            yield
        finally:
            for attention in self._attentions:
                attention.cache = None

    @torch.no_grad()
    def logits(self, block: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Logits of a (noisy) block of ids ``[b, l]`` in fp32, -inf for the mask token.

        Args:
            chosen: the positions to predict, bool ``[b, l]``; only they reach the head. None means all.

        Returns:
            ``[n, V]`` for the n chosen positions in row-major order; ``[b, l, V]`` where none were named.
        """
        self.model.eval()
        with self._cached(append=False):
            hidden = self.model.block_states(block, self.length).transpose(0, 1)  # [b, l, h]
        logits = self.model.logits(hidden if chosen is None else hidden[chosen])
        return gather_from_tensor_model_parallel_region(logits)[..., : self.model.model.vocab_size].float()

    @torch.no_grad()
    def append(self, block: Tensor) -> None:
        """Run a finished clean block ``[b, l]`` once and keep its keys and values."""
        self.model.eval()
        with self._cached(append=True):
            self.model.block_states(block, self.length)
        self.length += block.shape[1]


@dataclass
class Sampling:
    """How to sample.

    Attributes:
        method: ``first_hitting`` unmasks one position per call at the time the reverse process would have;
            ``steps`` is ancestral sampling in ``steps`` steps of the log-linear schedule.
        steps: number of steps T per block for ``steps``; None means one per token.
        top_p: nucleus: only the most likely tokens of joint probability top_p are sampled.
        temperature: divides the logits; 0 takes the most likely token.
        stop_on_low_entropy: end a long sample whose last 256 tokens have an entropy under 4 nats.
    """

    method: str = "first_hitting"
    steps: int | None = None
    top_p: float = 0.9
    temperature: float = 1.0
    stop_on_low_entropy: bool = True


@dataclass
class Samples:
    """Sampled ids ``[b, n]`` (eos from the first end on), where each row ends, and the calls that changed state (NFE),
    those for the cut tail of the last block included."""

    ids: Tensor
    nfe: int
    ends: list[int] = field(default_factory=list)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Token probabilities in float64 after temperature and nucleus; ``[..., V]`` -> ``[..., V]``."""
    logits = logits.double()
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Shifted before the division: a tiny temperature then gives -inf at worst, never inf.
    p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, index = p.sort(-1, descending=True)
        kept = ordered.cumsum(-1) - ordered < sampling.top_p  # always keeps the most likely token
        p = torch.zeros_like(p).scatter(-1, index, ordered * kept)
        p = p / p.sum(-1, keepdim=True)
    return p


def _draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """One token id per distribution, ``[..., V]`` -> ``[...]``."""
    flat = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
    return flat.view(p.shape[:-1])


def first_hitting(
    block: Tensor,
    mask_id: int,
    logits: BlockLogits,
    sampling: Sampling,
    generator: torch.Generator,
) -> int:
    """Fill the masked positions of ``block [b, l]`` in place, one per row and call; returns the calls.

    The next unmasking time of n masked positions is ``t u^(1/n)``. With no time conditioning the time does not enter
    the model, so only the order matters: the position is uniform among the masked ones.
    """
    calls = 0
    while (masked := block == mask_id).any():
        # A row that is full already draws too (any position) and takes none.
        position = torch.multinomial(masked.double() + ~masked.any(1, keepdim=True), 1, generator=generator)  # [b, 1]
        chosen = masked & torch.zeros_like(masked).scatter(1, position, True)
        block[chosen] = _draw(probabilities(logits(block, chosen), sampling), generator)
        calls += 1
    return calls


def ancestral(
    block: Tensor,
    mask_id: int,
    logits: BlockLogits,
    sampling: Sampling,
    generator: torch.Generator,
) -> int:
    """T-step ancestral sampling of ``block [b, l]`` in place; returns the calls that changed it.

    From time t to s < t a masked position is unmasked with probability ``(t - s) / t``. A prediction stays valid while
    the block does not change, so steps that unmask nothing cost no call.
    """
    steps = sampling.steps or block.shape[1]
    calls = 0
    for i in range(steps, 0, -1):
        masked = block == mask_id
        if not masked.any():
            break
        # At i = 1 all: rand is below 1.
        chosen = masked & (torch.rand(block.shape, generator=generator, device=block.device) < 1 / i)
        if chosen.any():
            block[chosen] = _draw(probabilities(logits(block, chosen), sampling), generator)
            calls += 1
    return calls


METHODS = {"first_hitting": first_hitting, "steps": ancestral}


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
        report: told the number of tokens so far after every block.

    Raises:
        ValueError: the rows would be longer than the model's length, or a prompt holds the mask.
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
    forward, nfe = BlockForward(model), 0
    whole = prompt.shape[1] // size * size
    for start in range(0, whole, size):
        forward.append(ids[:, start : start + size])
    end = whole
    for start in range(whole, padded, size):
        block = ids[:, start : start + size]
        nfe += METHODS[sampling.method](block, mask_id, forward.logits, sampling, generator)
        end = start + size
        report(min(end, total))
        if end < padded:
            if _finished(ids[:, :end], prompt.shape[1], eos_id, sampling):
                break
            forward.append(block)
    return _trimmed(ids[:, : min(end, total)], prompt.shape[1], eos_id, nfe)


def _sample_causal(model, prompt, new_tokens, sampling, eos_id, generator, report) -> Samples:
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
        ids = torch.cat([ids, _draw(p, generator)], 1)
        report(ids.shape[1])
        if _finished(ids, prompt.shape[1], eos_id, sampling):
            break
    return _trimmed(ids, prompt.shape[1], eos_id, ids.shape[1] - prompt.shape[1])


def _finished(ids: Tensor, prompt: int, eos_id: int | None, sampling: Sampling) -> bool:
    """True when every row has ended: by EOS after the prompt, or by the entropy of its last tokens."""
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
    """Fill each row with EOS behind its first end, and note where the rows end."""
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
    is the objective's likelihood when every token is masked (objective, step 9).

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
