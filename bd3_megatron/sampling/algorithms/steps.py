"""Ancestral sampling in --steps even steps of time.

Source: arXiv 2406.07524, with the log-linear schedule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bd3_megatron.sampling.algorithms import DecodingAlgorithm

if TYPE_CHECKING:
    from bd3_megatron.sampling.block import Block


class Steps(DecodingAlgorithm):
    """Ancestral sampler of T steps.

    From time t to s < t a masked position is revealed with probability ``(t - s) / t``. A step that reveals nothing
    does not call the network: its prediction stays valid while the block does not change.
    """

    def step(self, block: Block) -> None:
        import torch

        steps = block.sampling.steps or block.ids.shape[1]
        remaining = steps - block.steps_taken  # t = remaining / steps
        # With 1 remaining all: rand is below 1.
        uniform = torch.rand(block.ids.shape, generator=block.generator, device=block.ids.device)  # [b, l]
        chosen = block.masked & (uniform < 1 / remaining)
        if chosen.any():
            block.reveal(chosen, block.draw(block.logits(chosen)))
