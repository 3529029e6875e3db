"""One position per row and forward pass, in uniform order.

Source: arXiv 2409.02908, for blocks in arXiv 2503.09573.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bd3_megatron.sampling.algorithms import DecodingAlgorithm

if TYPE_CHECKING:
    from bd3_megatron.sampling.block import Block


class FirstHitting(DecodingAlgorithm):
    """First-hitting sampler.

    With n masked positions, the next one is revealed at time ``t u^(1/n)``. The network does not see the time, so only
    the order counts: the position is uniform among the masked ones.
    """

    def step(self, block: Block) -> None:
        import torch

        masked = block.masked
        # A row without masks draws a position too and reveals nothing.
        position = torch.multinomial(
            masked.double() + ~masked.any(1, keepdim=True), 1, generator=block.generator
        )  # [b, 1]
        chosen = masked & torch.zeros_like(masked).scatter(1, position, True)
        block.reveal(chosen, block.draw(block.logits(chosen)))
