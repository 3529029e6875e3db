"""State of one block while it is decoded, and how a token is drawn from logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.config import Section

# (ids [b, l], chosen bool [b, l]) -> logits [n, V] of the n chosen positions, row-major.
BlockLogits = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """Options of sampling.

    Attributes:
        method: name of a decoding algorithm.
        steps: steps per block, for algorithms with a fixed number of them; None: as many as the block has tokens.
        top_p: nucleus: the most likely tokens of joint probability ``top_p``, and no others, are sampled.
        temperature: divides the logits; 0 takes the most likely token.
        stop_on_low_entropy: end a long sample whose last 256 tokens have an entropy under 4 nats.
        options: of the algorithm alone; None: its defaults.
    """

    method: str = "first_hitting"
    steps: int | None = None
    top_p: float = 0.9
    temperature: float = 1.0
    stop_on_low_entropy: bool = True
    options: Section | None = None


@dataclass
class Block:
    """One block of every row while it is decoded.

    Attributes:
        ids: ``[b, l]``, changed in place; masked positions have ``mask_id``. Positions of the prompt are not masked.
        predict: the network's forward pass on the block after the clean blocks before it.
        generator: the only source of chance.
        calls: forward passes so far.
        steps_taken: steps so far.
    """

    ids: Tensor
    mask_id: int
    predict: BlockLogits
    sampling: Sampling
    generator: torch.Generator
    calls: int = 0
    steps_taken: int = 0

    @property
    def masked(self) -> Tensor:
        """Masked positions, bool ``[b, l]``."""
        return self.ids == self.mask_id

    @property
    def levels(self) -> Tensor:
        """Masked share of each row, float64 ``[b]``: its noise level under the log-linear schedule."""
        return self.masked.double().mean(1)

    def logits(self, chosen: Tensor) -> Tensor:
        """Logits of the chosen positions, bool ``[b, l]`` -> fp32 ``[n, V]`` in row-major order; one forward pass."""
        self.calls += 1
        return self.predict(self.ids, chosen)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Token probabilities after temperature and nucleus, ``[..., V]`` -> float64 ``[..., V]``."""
        return probabilities(logits, self.sampling)

    def draw(self, logits: Tensor) -> Tensor:
        """One token id per logit vector after temperature and nucleus, ``[..., V]`` -> ``[...]``."""
        return draw(self.probabilities(logits), self.generator)

    def reveal(self, chosen: Tensor, tokens: Tensor) -> None:
        """Write ``tokens`` ``[n]`` to the chosen positions, bool ``[b, l]``, in row-major order."""
        self.ids[chosen] = tokens

    def mask(self, chosen: Tensor) -> None:
        """Mask the chosen positions, bool ``[b, l]``, again; positions of the prompt must not be among them."""
        self.ids[chosen] = self.mask_id


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Token probabilities after temperature and nucleus, ``[..., V]`` -> float64 ``[..., V]``."""
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


def draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """One token id per distribution, ``[..., V]`` -> ``[...]``."""
    flat = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
    return flat.view(p.shape[:-1])
