"""Evaluation: NELBO per token on the validation split, with its standard errors over rows and over documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.diffusion.estimators import LikelihoodEstimator
from bd3_megatron.diffusion.noise import Noise, SampleKeys
from bd3_megatron.engine.base import Engine
from data_prep.read.order import RowOrder
from data_prep.read.reader import RowReader
from data_prep.read.stream import RowStream
from pretrain.config.schema import EvalConfig
from pretrain.distributed.collectives import sum_over_ranks
from pretrain.evaluation.block_loss import BlockLoss
from pretrain.evaluation.document_likelihood import Documents, DocumentTally, JsonRecord, ratio
from pretrain.evaluation.rows import forward_pass


@dataclass(frozen=True)
class Evaluation(JsonRecord):
    """Result over validation rows.

    Tokens that nothing predicts do not count: position 0 (BOS), and under the causal objective with document masks
    the first token of every document.

    Attributes:
        nelbo: negative evidence lower bound, nats per token: an upper bound on the negative log-likelihood.
        nelbo_stderr: its standard error over rows; rows are independent samples, tokens of one row are not.
        perplexity, perplexity_stderr: exp(nelbo), and its standard error over rows to first order.
        rows, tokens: numbers of rows and tokens in the mean.
    """

    nelbo: float
    nelbo_stderr: float
    perplexity: float
    perplexity_stderr: float
    rows: int
    tokens: int


@dataclass(frozen=True)
class Likelihood:
    """The bound of every row, the same on all ranks.

    Attributes:
        nats: sums of the weighted nll, ``[n]``.
        tokens: ``[n]``.
        documents: of the rows, those that rows cut included; None without ``by_document``, and for data sets without
            document starts.
        blocks: mean nll by count of masked tokens and by position; None for the causal objective.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    documents: Documents | None
    blocks: BlockLoss | None

    def summarize(self) -> Evaluation:
        """Mean and standard errors."""
        mean, error = ratio(self.nats, self.tokens)
        perplexity = math.exp(min(mean, 700.0))
        return Evaluation(mean, error, perplexity, perplexity * error, len(self.nats), int(self.tokens.sum()))

    @property
    def document_stderr(self) -> float:
        """Standard error of the bound over documents: that for new documents, as rows of one document are alike. NaN
        without documents."""
        return math.nan if self.documents is None else ratio(self.documents.nats, self.documents.tokens)[1]

    def details(self) -> dict[str, float | None]:
        """Further numbers for metrics: the error over documents, and the mean nll by count."""
        error = self.document_stderr
        values: dict[str, float | None] = {} if math.isnan(error) else {"nelbo_stderr_documents": error}
        by_count = {} if self.blocks is None else self.blocks.by_count()
        return values | {f"nll_by_count_{name}": value for name, value in by_count.items()}


def evaluate(
    engine: Engine,
    reader: RowReader | RowStream,
    model: ModelConfig,
    diffusion: DiffusionConfig,
    options: EvalConfig,
    micro: int,
    progress: Callable[[], None] = lambda: None,
    document_mask: bool = False,
    by_document: bool = False,
    whole_documents: bool = False,
) -> Likelihood:
    """Bound of the engine's current weights over ``options.rows`` rows.

    Rows are split over data-parallel ranks; the result is the same on every rank and under every layout.

    Args:
        diffusion: objective of the run.
        micro: rows per micro-batch.
        progress: called after every group of micro-batches.
        document_mask: as in training.
        by_document: also sum by document, where the data set has document starts.
        whole_documents: take the first rows: documents go on from row to row, and among random rows only short ones
            would be whole.

    Raises:
        ConfigError: the estimator cannot evaluate blocks of this size.
    """
    estimator = LikelihoodEstimator(diffusion, options.estimator, options.draws)
    diffusion = estimator.objective
    count = min(options.rows or len(reader), len(reader))
    rows = np.arange(count)
    if not whole_documents:  # the same rows for every seed, which is that of the noise
        _, rows = RowOrder(len(reader), 0).epoch_and_row(rows)
    sums, tokens = np.zeros(count), np.zeros(count, np.int64)
    tally = DocumentTally(reader) if by_document and reader.documents_started else None
    blocks = None if diffusion.objective == "causal" else BlockLoss(diffusion.block_size)
    for number in range(estimator.passes):

        def noise(keys: SampleKeys, number: int = number) -> Noise | None:
            return None if blocks is None else estimator.noise(model.length, options.seed, keys, number)

        passed = forward_pass(engine, reader, model, diffusion, rows, number, noise, micro, document_mask, progress)
        for slots, own, batch, weighted in passed:
            nats = _nats_by_token(weighted, len(slots), diffusion) * estimator.share
            counted = counted_tokens(batch, diffusion)
            sums[slots[own]] += nats[own].sum(1)
            tokens[slots[own]] = counted[own].sum(1)
            if tally is not None:
                # Tokens count once, in the first pass.
                tally.add(rows[slots[own]], nats[own], counted[own] & (number == 0))
            if blocks is not None:
                share = estimator.share / diffusion.draws
                blocks.add(weighted.numpy(), batch.weight.numpy(), np.tile(own, diffusion.draws), share)
    group = parallel_state.get_data_parallel_group()
    sums, tokens = sum_over_ranks(sums, group), sum_over_ranks(tokens, group)  # zeros for the rows of others
    if blocks is not None:
        blocks = blocks.over_ranks(group)
    return Likelihood(sums, tokens, None if tally is None else tally.gather(), blocks)


def counted_tokens(batch: Batch, diffusion: DiffusionConfig) -> NDArray[np.bool_]:
    """Mask of the tokens that count, bool ``[b, L]``: all but position 0 and tokens that nothing predicts."""
    if diffusion.objective == "causal":
        return (batch.weight != 0).roll(1, 1).numpy()  # position l predicts token l + 1
    rows, length = batch.labels.shape
    return np.tile(np.arange(length) > 0, (rows // diffusion.draws, 1))


def _nats_by_token(weighted: torch.Tensor, rows: int, diffusion: DiffusionConfig) -> NDArray[np.float64]:
    """Nats of every token ``[b, L]``: the mean over K draws of the weighted nll ``[K b, L]`` of predictions."""
    nats = weighted.double().view(-1, rows, weighted.shape[1]).mean(0)
    return (nats.roll(1, 1) if diffusion.objective == "causal" else nats).numpy()
