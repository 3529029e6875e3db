"""Search for the clip interval of least loss variance (arXiv 2503.09573, section 5.3), by counts or directly."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from megatron.core import parallel_state
from numpy.typing import NDArray

from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.diffusion.clips import ClipChoice, CountMoments, DirectMoments, choose, default_grid, search_objective
from bd3_megatron.diffusion.noise import Purpose, SampleKeys, draw_noise
from bd3_megatron.engine.base import Engine
from data_prep.read.order import RowOrder
from data_prep.read.reader import RowReader
from data_prep.read.stream import RowStream
from pretrain.config.schema import ClipSearchConfig
from pretrain.distributed.messages import all_gather_values
from pretrain.evaluation.rows import forward_pass


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
    passed = functools.partial(
        forward_pass, engine, reader, model, rows=rows, micro=micro, document_mask=document_mask, progress=progress
    )
    if options.estimator == "direct":
        moments = _direct(passed, model.length, diffusion, options.seed, number, grid)
    else:
        moments = _by_counts(passed, model.length, diffusion, options.seed, number)
    group = parallel_state.get_data_parallel_group()
    moments.sums = np.sum(all_gather_values(moments.sums, group), axis=0)
    return choose(moments, diffusion, grid, options.significance)


def _by_counts(passed: Callable, length: int, diffusion: DiffusionConfig, seed: int, number: int) -> CountMoments:
    drawing = search_objective(diffusion)
    size = drawing.block_size
    moments, levels = CountMoments(size), {}

    def noise(keys: SampleKeys):
        drawn = draw_noise(drawing, length, seed, keys, Purpose.SEARCH)
        levels.update(zip(keys.slots.tolist(), drawn.t[0]))
        return drawn

    for slots, own, _, weighted in passed(diffusion=drawing, number=number, noise=noise):
        some = slots[own]
        if len(some):
            counts = np.rint(np.stack([levels.pop(slot) for slot in some.tolist()]) * size).astype(np.int64)
            moments.add(some, counts, _by_block(weighted.double().numpy()[own], size))
    return moments


def _direct(
    passed: Callable, length: int, diffusion: DiffusionConfig, seed: int, number: int, grid: tuple
) -> DirectMoments:
    """The reference's way: the model runs once for every interval."""
    size = diffusion.block_size
    moments = DirectMoments(size, len(grid) + 1)
    for place, (beta, omega) in enumerate((*grid, (diffusion.beta, diffusion.omega))):
        clipped = diffusion.model_copy(update={"beta": beta, "omega": omega, "draws": 1, "coupling": "independent"})

        def noise(keys: SampleKeys, clipped: DiffusionConfig = clipped):
            return draw_noise(clipped, length, seed, keys, Purpose.SEARCH)

        for slots, own, _, weighted in passed(diffusion=clipped, number=number, noise=noise):
            moments.add(place, slots[own], _by_block(weighted.double().numpy()[own], size))
    return moments


def _by_block(weighted: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Sums over blocks ``[b, L / B']`` of values ``[b, L]``."""
    return weighted.reshape(len(weighted), -1, size).sum(-1)
