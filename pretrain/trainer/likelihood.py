"""Evaluation: NELBO per token on the validation split, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state

from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.diffusion.noise import Purpose, SampleKeys
from bd3_megatron.engine.base import Engine
from data_prep.read.order import RowOrder
from data_prep.read.reader import RowReader
from data_prep.read.stream import RowStream
from pretrain.config.schema import EvalConfig
from pretrain.distributed.messages import all_gather_values
from pretrain.trainer.batches import make_batch
from pretrain.trainer.document_likelihood import DocumentTally, JsonRecord, ratio

# Micro-batches per call of the engine: enough to fill a pipeline, few enough to keep their results in memory.
_GROUP = 16


@dataclass(frozen=True)
class Evaluation(JsonRecord):
    """Result over validation rows.

    Tokens that nothing predicts do not count: position 0 (BOS), and under the causal objective with document masks
    the first token of every document.

    Attributes:
        nelbo: negative evidence lower bound, nats per token: an upper bound on the negative log-likelihood.
        nelbo_stderr: its standard error over rows; rows are independent samples, tokens of one row are not.
        perplexity, perplexity_stderr: exp(nelbo), and its standard error to first order.
        rows, tokens: numbers of rows and tokens in the mean.
    """

    nelbo: float
    nelbo_stderr: float
    perplexity: float
    perplexity_stderr: float
    rows: int
    tokens: int


def likelihood_bound(diffusion: DiffusionConfig) -> DiffusionConfig:
    """Objective of evaluations: the log-linear schedule on the full interval of noise levels.

    The bound does not depend on the schedule, but on a clipped interval it is none. With blocks of one token all are
    masked (t = 1): the expectation is the same, and the value exact.
    """
    beta = 1.0 if diffusion.block_size == 1 else 1e-3
    full = {"schedule": "loglinear", "beta": beta, "omega": 1.0, "resample": False, "stratify": True}
    return diffusion.model_copy(update=full)


def evaluate(
    engine: Engine,
    reader: RowReader | RowStream,
    model: ModelConfig,
    diffusion: DiffusionConfig,
    options: EvalConfig,
    micro: int,
    progress: Callable[[], None] = lambda: None,
    document_mask: bool = False,
    tally: DocumentTally | None = None,
) -> Evaluation:
    """NELBO of the engine's current weights over ``options.rows`` rows and ``options.draws`` noise draws each.

    Rows are split over data-parallel ranks; the result is the same on every rank and under every layout.

    Args:
        micro: rows per micro-batch.
        progress: called after every group of micro-batches.
        document_mask: as in training.
        tally: collects the nll of every token of this rank's rows.
    """
    diffusion = likelihood_bound(diffusion)
    count = min(options.rows or len(reader), len(reader))
    # The same rows for every seed, which is that of the noise. With a tally the first rows: documents go on from row to
    # row, and among random rows only short ones would be whole.
    rows = np.arange(count)
    if tally is None:
        _, rows = RowOrder(len(reader), 0).epoch_and_row(rows)
    share = -(-count // engine.world.data_size)
    # Every rank runs the same number of rows, because a forward pass may have collectives (ZeRO-3 gathers weights):
    # the last row pads the last share.
    mine = np.arange(engine.world.data_rank * share, (engine.world.data_rank + 1) * share)
    sums, tokens = np.zeros(len(mine)), np.zeros(len(mine), np.int64)
    # The causal objective has no noise to draw.
    draws = 1 if diffusion.objective == "causal" else options.draws
    for draw in range(draws):
        for group in _groups(mine, micro):
            batches = []
            for slots in (np.minimum(slots, count - 1) for slots in group):
                keys = SampleKeys(np.full(len(slots), draw), rows[slots], slots, batch=draw, batch_rows=count)
                batches.append(
                    make_batch(reader, model, diffusion, keys, options.seed, Purpose.EVALUATE, document_mask)
                )
            for slots, batch, weighted in zip(group, batches, engine.forward(batches)):
                per_draw = weighted.double().sum(1).view(-1, len(slots))  # [K, b]
                sums[slots - mine[0]] += per_draw.mean(0).numpy() / draws
                counted = counted_tokens(batch, diffusion)
                tokens[slots - mine[0]] = counted.sum(1)
                if tally is not None:
                    own = slots < count
                    nats = _nats_by_token(weighted, len(slots), diffusion) / draws
                    # Tokens count once, in the first draw.
                    tally.add(rows[slots[own]], nats[own], counted[own] & (draw == 0))
            progress()
    gathered = all_gather_values((sums, tokens), parallel_state.get_data_parallel_group())
    sums, tokens = (np.concatenate(parts)[:count] for parts in zip(*gathered))
    return summarize(sums, tokens)


def counted_tokens(batch: Batch, diffusion: DiffusionConfig) -> np.ndarray:
    """Mask of the tokens that count, bool ``[b, L]``: all but position 0 and tokens that nothing predicts."""
    if diffusion.objective == "causal":
        return (batch.weight != 0).roll(1, 1).numpy()  # position l predicts token l + 1
    rows, length = batch.labels.shape
    return np.tile(np.arange(length) > 0, (rows // diffusion.draws, 1))


def _nats_by_token(weighted: torch.Tensor, rows: int, diffusion: DiffusionConfig) -> np.ndarray:
    """Nats of every token ``[b, L]``: the mean over K draws of the weighted nll ``[K b, L]`` of predictions."""
    nats = weighted.double().view(-1, rows, weighted.shape[1]).mean(0)
    return (nats.roll(1, 1) if diffusion.objective == "causal" else nats).numpy()


def summarize(row_sums: np.ndarray, tokens: np.ndarray | int) -> Evaluation:
    """Mean and standard error from the nll of rows, nats ``[n]``, and their tokens: ``[n]`` or one number for all."""
    mean, error = ratio(row_sums, tokens)
    perplexity = math.exp(min(mean, 700.0))
    count = len(row_sums)
    return Evaluation(mean, error, perplexity, perplexity * error, count, int(np.broadcast_to(tokens, count).sum()))


def _groups(slots: np.ndarray, micro: int) -> Iterator[list[np.ndarray]]:
    """Groups of micro-batches of equal size, which a pipeline needs; a smaller last one is a group of its own."""
    whole = len(slots) // micro * micro
    batches = [slots[start : start + micro] for start in range(0, whole, micro)]
    for start in range(0, len(batches), _GROUP):
        yield batches[start : start + _GROUP]
    if whole < len(slots):
        yield [slots[whole:]]
