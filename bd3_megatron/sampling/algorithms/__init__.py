"""Decoding algorithms: the order in which the masked tokens of a block are revealed.

Each module of this folder is one algorithm. The network is given no time, so an algorithm has only the masks and the
logits to decide by.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from bd3_common.registry import Registry
from bd3_megatron.config import Section

if TYPE_CHECKING:
    from bd3_megatron.sampling.block import Block


class NoOptions(Section):
    """No options of the algorithm's own."""


class DecodingAlgorithm(ABC):
    """A decoding algorithm. A subclass implements :meth:`step`.

    Args:
        options: an ``Options``.
    """

    Options: ClassVar[type[Section]] = NoOptions
    """options of this algorithm alone, a pydantic model with defaults: ``bd3 sample --options NAME VALUE``"""

    def __init__(self, options: Section | None = None):
        self.options = self.Options() if options is None else options

    @abstractmethod
    def step(self, block: Block) -> None:
        """Reveal some masked positions of ``block``, or none.

        Choose positions ``[b, l]`` (bool) among ``block.masked``, take ``block.logits(chosen)`` ``[n, V]``, and write
        tokens with ``block.reveal(chosen, tokens)``. Draw from ``block.generator`` alone, so that the seed decides the
        sample. ``block.mask(chosen)`` takes tokens back.
        """

    def decode(self, block: Block) -> None:
        """Take steps until no position of ``block`` is masked. State of the decoding belongs to ``block``."""
        while block.masked.any():
            self.step(block)
            block.steps_taken += 1


DECODING_ALGORITHMS = Registry(
    DecodingAlgorithm, kind="decoding algorithm", key="method", group="bd3_megatron.decoding_algorithms"
)
