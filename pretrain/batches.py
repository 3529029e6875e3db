"""Which rows make up a step, and the noise that belongs to them: functions of (seed, step), whatever the layout."""

from __future__ import annotations

import numpy as np

from bd3_megatron.attention.mask import Streams
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.diffusion.batch import Batch, causal_batch, diffusion_batch
from bd3_megatron.diffusion.noise import Purpose, SampleKeys, draw_noise
from data_prep.order import RowOrder
from data_prep.reader import RowReader


class Batches:
    """Micro-batches of one split for one data-parallel rank.

    Args:
        global_batch: rows per batch over all data-parallel ranks.
        micro_batch: rows per micro-batch.
        rank, size: this data-parallel rank's coordinates; it takes consecutive slots of every batch.
        order_seed, noise_seed: of the row order and of the noise.
        document_mask: whether attention keeps to the documents of a row.
    """

    def __init__(
        self,
        reader: RowReader,
        model: ModelConfig,
        diffusion: DiffusionConfig,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        size: int = 1,
        order_seed: int = 0,
        noise_seed: int = 0,
        document_mask: bool = False,
    ):
        self.reader, self.model, self.diffusion = reader, model, diffusion
        self.order = RowOrder(len(reader), order_seed)
        self.global_batch, self.micro_batch = global_batch, micro_batch
        share = global_batch // size
        self.slots = np.arange(rank * share, (rank + 1) * share)
        self.noise_seed, self.document_mask = noise_seed, document_mask

    def at(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global batch ``step`` (0 is the first); the last may be smaller."""
        return [
            self._batch(step, self.slots[start : start + self.micro_batch])
            for start in range(0, len(self.slots), self.micro_batch)
        ]

    def _batch(self, step: int, slots: np.ndarray) -> Batch:
        epochs, rows = self.order.epoch_and_row(step * self.global_batch + slots)
        keys = SampleKeys(epochs, rows, slots, batch=step, batch_rows=self.global_batch)
        return make_batch(
            self.reader, self.model, self.diffusion, keys, self.noise_seed, document_mask=self.document_mask
        )


def make_batch(
    reader: RowReader,
    model: ModelConfig,
    diffusion: DiffusionConfig,
    keys: SampleKeys,
    noise_seed: int,
    purpose: Purpose = Purpose.TRAIN,
    document_mask: bool = False,
) -> Batch:
    """Read the keyed rows and noise them as the objective asks; with ``document_mask`` also their documents."""
    tokens = reader.rows(keys.rows).astype(np.int64)
    documents = reader.documents(keys.rows) if document_mask else None
    if diffusion.objective == "causal":
        return causal_batch(tokens, documents)
    noise = draw_noise(diffusion, model.length, noise_seed, keys, purpose)
    return diffusion_batch(tokens, noise, model.mask_id, Streams.of(diffusion, model.length), documents)
