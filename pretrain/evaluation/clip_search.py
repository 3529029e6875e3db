"""Search for the clip interval of least loss variance (arXiv 2503.09573, section 5.3), by counts or directly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.diffusion.clips import (
    ClipChoice,
    CountMoments,
    DirectMoments,
    choose,
    default_grid,
    jackknife_groups,
    search_objective,
)
from bd3_megatron.diffusion.noise import Noise, Purpose, SampleKeys, draw_noise, strata_of
from bd3_megatron.engine.base import Engine
from data_prep.read.order import RowOrder
from data_prep.read.reader import RowReader
from data_prep.read.stream import RowStream
from pretrain.config.schema import ClipSearchConfig
from pretrain.distributed.messages import all_gather_values
from pretrain.evaluation.rows import forward_pass

Forward = Callable[..., Iterator[tuple[NDArray[np.int64], NDArray[np.bool_], Batch, Tensor]]]
Grid = Sequence[tuple[float, float]]


def search(
    engine: Engine,
    reader: RowReader | RowStream,
    model: ModelConfig,
    diffusion: DiffusionConfig,
    options: ClipSearchConfig,
    number: int,
    micro: int,
    document_mask: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> ClipChoice:
    """Search with the engine's current weights over ``options.rows`` rows; the same on every rank.

    The sums over blocks are added over data-parallel ranks, so the result does not depend on the layout.

    Args:
        diffusion: the objective, with the interval it has now.
        number: of the search in the run: each draws other noise.
        micro: rows per micro-batch.
        progress: called after every group of micro-batches.
    """
    grid = options.grid or default_grid(diffusion.block_size)
    count = min(options.rows, len(reader))
    _, rows = RowOrder(len(reader), 0).epoch_and_row(np.arange(count))
    forward = functools.partial(
        forward_pass, engine, reader, model, rows=rows, micro=micro, document_mask=document_mask, progress=progress
    )
    make = _direct if options.estimator == "direct" else _by_counts
    moments = make(forward, model.length, count, diffusion, options.seed, number, grid)
    group = parallel_state.get_data_parallel_group()
    moments.sums = np.sum(all_gather_values(moments.sums, group), axis=0)
    return choose(moments, diffusion, grid, options.significance)


def _by_counts(
    forward: Forward, length: int, rows: int, diffusion: DiffusionConfig, seed: int, number: int, grid: Grid
) -> CountMoments:
    drawing = search_objective(diffusion)
    size = drawing.block_size
    moments = CountMoments(size)
    fractions: dict[int, float] = {}

    def noise(keys: SampleKeys) -> Noise:
        drawn = draw_noise(drawing, length, seed, keys, Purpose.SEARCH)
        fractions.update(zip(keys.slots.tolist(), drawn.t[0]))  # BOS counted as another token, unlike in the mask
        return drawn

    for slots, own, _, weighted in forward(diffusion=drawing, number=number, noise=noise):
        mine = slots[own]
        if len(mine):
            counts = np.rint(np.stack([fractions.pop(slot) for slot in mine.tolist()]) * size).astype(np.int64)
            groups = _groups(drawing, length, rows, seed, number, mine)
            moments.add(groups, counts, _by_block(weighted.double().numpy()[own], size))
    return moments


def _direct(
    forward: Forward, length: int, rows: int, diffusion: DiffusionConfig, seed: int, number: int, grid: Grid
) -> DirectMoments:
    """The reference's way: the model runs once for every interval."""
    size = diffusion.block_size
    moments = DirectMoments(size, len(grid) + 1)
    for place, (beta, omega) in enumerate((*grid, (diffusion.beta, diffusion.omega))):
        clipped = diffusion.model_copy(update={"beta": beta, "omega": omega, "draws": 1, "coupling": "independent"})

        def noise(keys: SampleKeys, clipped: DiffusionConfig = clipped) -> Noise:
            return draw_noise(clipped, length, seed, keys, Purpose.SEARCH)

        for slots, own, _, weighted in forward(diffusion=clipped, number=number, noise=noise):
            groups = _groups(clipped, length, rows, seed, number, slots[own])
            moments.add(place, groups, _by_block(weighted.double().numpy()[own], size))
    return moments


def _groups(
    diffusion: DiffusionConfig, length: int, rows: int, seed: int, number: int, slots: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Groups ``[b]`` of these of the searched ``rows``."""
    keys = SampleKeys(slots, slots, slots, batch=number, batch_rows=rows)
    return jackknife_groups(strata_of(diffusion, length, seed, keys, Purpose.SEARCH), slots)


def _by_block(weighted: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Sums over blocks ``[b, L / B']`` of values ``[b, L]``."""
    return weighted.reshape(len(weighted), -1, size).sum(-1)
