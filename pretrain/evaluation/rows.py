"""Micro-batches of given rows: tokens read from a data set, with their noise; forward passes over the ranks' rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bd3_megatron.attention.mask import Streams
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.diffusion.batches import Batch, causal_batch, diffusion_batch
from bd3_megatron.diffusion.noise import Noise, Purpose, SampleKeys, draw_noise
from bd3_megatron.engine.base import Engine
from data_prep.read.reader import RowReader
from data_prep.read.stream import RowStream


def make_batch(
    reader: RowReader | RowStream,
    model: ModelConfig,
    diffusion: DiffusionConfig,
    keys: SampleKeys,
    noise_seed: int,
    purpose: Purpose = Purpose.TRAIN,
    document_mask: bool = False,
    noise: Noise | None = None,
) -> Batch:
    """Read the rows of ``keys`` (with ``document_mask`` also their document numbers) and draw their noise.

    Args:
        noise: taken instead of a draw.
    """
    tokens = reader.rows(keys.rows).astype(np.int64)
    documents = reader.documents(keys.rows) if document_mask else None
    if diffusion.objective == "causal":
        return causal_batch(tokens, documents)
    if noise is None:
        noise = draw_noise(diffusion, model.length, noise_seed, keys, purpose)
    return diffusion_batch(tokens, noise, model.mask_id, Streams.of(diffusion, model.length), documents)


# Micro-batches per call of the engine: enough to fill a pipeline, few enough to keep their results in memory.
_GROUP = 16


def forward_pass(
    engine: Engine,
    reader: RowReader | RowStream,
    model: ModelConfig,
    diffusion: DiffusionConfig,
    rows: NDArray[np.int64],
    number: int,
    noise: Callable[[SampleKeys], Noise | None],
    micro: int,
    document_mask: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_], Batch, Tensor]]:
    """One pass over this data-parallel rank's share of ``rows`` ``[n]``, by micro-batches.

    Every rank runs the same number of rows, because a forward pass may have collectives (ZeRO-3 gathers weights): the
    last row pads the last share.

    Args:
        number: of the pass; it is the epoch and the batch of the samples' keys.
        noise: of the samples; None for the causal objective.
        micro: rows per micro-batch.
        progress: called after every group of micro-batches.

    Yields:
        slots ``[b]`` (indices into ``rows``; beyond n for padding), True where a row is not padding ``[b]``, the batch,
        and its weighted nll ``[K b, L]``.
    """
    count = len(rows)
    share = -(-count // engine.world.data_size)
    mine = np.arange(engine.world.data_rank * share, (engine.world.data_rank + 1) * share)
    for group in _groups(mine, micro):
        batches = []
        for slots in (np.minimum(slots, count - 1) for slots in group):
            keys = SampleKeys(np.full(len(slots), number), rows[slots], slots, batch=number, batch_rows=count)
            drawn = noise(keys)
            batches.append(make_batch(reader, model, diffusion, keys, 0, document_mask=document_mask, noise=drawn))
        for slots, batch, weighted in zip(group, batches, engine.forward(batches)):
            yield slots, slots < count, batch, weighted
        progress()


def _groups(slots: NDArray[np.int64], micro: int) -> Iterator[list[NDArray[np.int64]]]:
    """Groups of micro-batches of equal size, which a pipeline needs; a smaller last one is a group of its own."""
    whole = len(slots) // micro * micro
    batches = [slots[start : start + micro] for start in range(0, whole, micro)]
    for start in range(0, len(batches), _GROUP):
        yield batches[start : start + _GROUP]
    if whole < len(slots):
        yield [slots[whole:]]
