"""Micro-batches of a step: rows and their noise as functions of (seed, step), the same under every layout."""

from __future__ import annotations

from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.diffusion.noise import SampleKeys
from data_prep.read.stream import RowStream
from pretrain.evaluation.rows import make_batch

_AHEAD = 4  # steps ahead for which shards of remote data sets are fetched


class Batches:
    """Micro-batches of the training stream for one data-parallel rank.

    Args:
        stream: the training stream.
        global_batch: rows per batch over all data-parallel ranks.
        micro_batch: rows per micro-batch.
        rank, size: data-parallel rank and number of ranks; :meth:`RowStream.slots` gives the rank's rows of a batch.
        noise_seed: seed of the noise.
        document_mask: True: attention is restricted to a token's own document.
    """

    def __init__(
        self,
        stream: RowStream,
        model: ModelConfig,
        diffusion: DiffusionConfig,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        size: int = 1,
        noise_seed: int = 0,
        document_mask: bool = False,
    ):
        self.stream, self.model, self.diffusion = stream, model, diffusion
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.size = rank, size
        self.noise_seed, self.document_mask = noise_seed, document_mask
        self._fetched = 0  # shards of steps before this one are fetched

    def at(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global batch ``step`` (0 is the first); the last may be smaller."""
        if self.stream.remote:
            for ahead in range(max(step, self._fetched), step + 1 + _AHEAD):
                self.stream.prefetch(self.keys(ahead).rows)
            self._fetched = step + 1 + _AHEAD
        keys = self.keys(step)
        parts = [slice(start, start + self.micro_batch) for start in range(0, len(keys.rows), self.micro_batch)]
        return [
            make_batch(
                self.stream,
                self.model,
                self.diffusion,
                keys.part(part),
                self.noise_seed,
                document_mask=self.document_mask,
            )
            for part in parts
        ]

    def keys(self, step: int) -> SampleKeys:
        """Rows of this rank in global batch ``step``, with their epochs and slots."""
        slots = self.stream.slots(step, self.global_batch, self.rank, self.size)
        epochs, rows = self.stream.at(step * self.global_batch + slots)
        return SampleKeys(epochs, rows, slots, batch=step, batch_rows=self.global_batch)
