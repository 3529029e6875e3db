"""Evaluation: the NELBO per token on the validation split, with a standard error; `bd3 eval`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from megatron.core import parallel_state
from pydantic import Field

from bd3_megatron.config import ConfigError, DiffusionConfig, ModelConfig, Section, Seed
from bd3_megatron.diffusion.batch import Batch
from bd3_megatron.diffusion.noise import Purpose, SampleKeys
from bd3_megatron.engine.base import Engine
from data_prep.order import RowOrder
from data_prep.reader import RowReader
from data_prep.stream import RowStream
from pretrain import runs
from pretrain.batches import make_batch
from pretrain.config import EvalConfig
from pretrain.documents import DocumentEvaluation, DocumentTally, ratio
from pretrain.options import parse_options

# Micro-batches given to the engine at once: enough to fill a pipeline, few enough to hold their results.
_GROUP = 16


@dataclass(frozen=True)
class Evaluation:
    """Result over the validation rows; position 0 (BOS) is left out of sums and counts (objective, step 6), and under
    the causal objective with document masks so is every first token of a document, which nothing predicts.

    Attributes:
        nelbo: negative evidence lower bound, nats per token: an upper bound on the negative log-likelihood.
        nelbo_stderr: its standard error over rows (rows are independent samples; tokens of one row are not).
        perplexity, perplexity_stderr: exp(nelbo), and its standard error to first order.
        rows, tokens: what the mean runs over.
    """

    nelbo: float
    nelbo_stderr: float
    perplexity: float
    perplexity_stderr: float
    rows: int
    tokens: int

    def record(self) -> dict[str, float | int | None]:
        """The fields for JSON, which has no NaN: the standard error of a single row is null."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def likelihood_bound(diffusion: DiffusionConfig) -> DiffusionConfig:
    """The objective under which likelihood is reported, whatever interval and schedule it was trained on.

    It is the log-linear schedule on the full interval: the bound does not depend on the schedule, and clipping would
    no longer bound anything. With blocks of one token everything is masked (t = 1), which gives the same expectation
    without noise, so that the value is exact.
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

    ``progress`` is called after every group of micro-batches; ``document_mask`` is that of training; ``tally``
    gets the nll of every token of this rank's rows.

    Rows are split over data-parallel ranks; the result is the same on every rank and under every layout.
    """
    diffusion = likelihood_bound(diffusion)
    count = min(options.rows or len(reader), len(reader))
    # Always the same rows, whatever the seed: it is of the noise alone. Documents lie in consecutive rows: among rows
    # at random only short ones would be whole.
    rows = np.arange(count)
    if tally is None:
        _, rows = RowOrder(len(reader), 0).epoch_and_row(rows)
    share = -(-count // engine.world.data_size)
    # Every rank has as many rows, because ranks may need each other in a forward pass (ZeRO-3 gathers weights there):
    # the last row stands in for those that are missing.
    mine = np.arange(engine.world.data_rank * share, (engine.world.data_rank + 1) * share)
    sums, tokens = np.zeros(len(mine)), np.zeros(len(mine), np.int64)
    # The causal objective has no noise: one pass is all there is.
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
                    # Later draws bring further parts of the mean, but no further tokens.
                    tally.add(rows[slots[own]], nats[own], counted[own] & (draw == 0))
            progress()
    gathered: list[tuple] = [()] * engine.world.data_size
    dist.all_gather_object(gathered, (sums, tokens), parallel_state.get_data_parallel_group())
    sums, tokens = (np.concatenate(parts)[:count] for parts in zip(*gathered))
    return summarize(sums, tokens)


def counted_tokens(batch: Batch, diffusion: DiffusionConfig) -> np.ndarray:
    """Which tokens of its rows count, bool ``[b, L]``: all but position 0 and what the causal objective predicts from
    nothing."""
    if diffusion.objective == "causal":
        return (batch.weight != 0).roll(1, 1).numpy()  # position l predicts token l + 1
    rows, length = batch.labels.shape
    return np.tile(np.arange(length) > 0, (rows // diffusion.draws, 1))


def _nats_by_token(weighted: torch.Tensor, rows: int, diffusion: DiffusionConfig) -> np.ndarray:
    """Nats of every token ``[b, L]``, the mean over K draws, from the weighted nll of every prediction ``[K b, L]``."""
    nats = weighted.double().view(-1, rows, weighted.shape[1]).mean(0)
    return (nats.roll(1, 1) if diffusion.objective == "causal" else nats).numpy()


def summarize(row_sums: np.ndarray, tokens: np.ndarray | int) -> Evaluation:
    """Mean and standard error from each row's nll in nats ``[n]`` and its tokens, one number for all or ``[n]``."""
    mean, error = ratio(row_sums, tokens)
    perplexity = math.exp(min(mean, 700.0))
    count = len(row_sums)
    return Evaluation(mean, error, perplexity, perplexity * error, count, int(np.broadcast_to(tokens, count).sum()))


def _groups(slots: np.ndarray, micro: int) -> Iterator[list[np.ndarray]]:
    """Micro-batches in groups of equal size (a pipeline needs that); a smaller last one comes alone."""
    whole = len(slots) // micro * micro
    batches = [slots[start : start + micro] for start in range(0, whole, micro)]
    for start in range(0, len(batches), _GROUP):
        yield batches[start : start + _GROUP]
    if whole < len(slots):
        yield [slots[whole:]]


class EvalOptions(Section):
    """Evaluate a run's checkpoint on the validation split of its data."""

    run: Annotated[str, tyro.conf.Positional] = Field(description="run folder")
    step: int | None = Field(None, ge=0, description="checkpoint to take; null means the newest")
    weights: Literal["ema", "raw"] = Field("ema", description="averaged or last weights")
    data: str | None = Field(None, description="data set; null means the one the run was trained on")
    rows: int | None = Field(None, ge=2, description="rows used, at random or (--per-document) the first; null: all")
    draws: int = Field(1, ge=1, description="noise draws per row; more make the bound's estimate less noisy")
    seed: Seed = Field(0, description="seed of the evaluation noise")
    micro_batch: int | None = Field(None, ge=1, description="rows per forward pass; null means as in training")
    per_document: bool = Field(False, description="also statistics over documents, joined from all their rows")
    documents_file: str | None = Field(
        None, description="file for one line of JSON per document: its number in the split, tokens, nats"
    )
    json_: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, description="print one line of JSON")


def main(args: list[str]) -> None:
    """`bd3 eval RUN`."""
    options = parse_options(EvalOptions, args, "bd3 eval")
    run = Path(options.run)
    loaded = runs.load(run, options.step, averaged=options.weights == "ema")
    config, data = loaded.config, loaded.config.data
    if options.data is not None:
        data = data.model_copy(update={"path": options.data, "mix": None})
    reader = runs.open_stream(data, "validation", config.model)
    runs.verify(reader, data.verify_gb)
    per_document = options.per_document or options.documents_file is not None
    if per_document:
        runs.check_documents(reader, "--per-document")
    file = None if options.documents_file is None else Path(options.documents_file)
    if file is not None and not file.parent.is_dir():
        raise ConfigError(f"documents_file={file}: there is no folder {file.parent}; make it first")
    # The causal objective has no noise to draw.
    draws = 1 if config.diffusion.objective == "causal" else options.draws
    settings = EvalConfig(rows=options.rows, draws=draws, seed=options.seed)
    micro = options.micro_batch or config.eval.micro_batch or config.train.micro_batch
    tally = DocumentTally(reader) if per_document else None
    with loaded.engine() as engine:
        result = evaluate(
            engine,
            reader,
            config.model,
            config.diffusion,
            settings,
            micro,
            document_mask=config.data.document_mask,
            tally=tally,
        )
        documents = tally.gather() if tally else None
    by_document = documents.summarize() if documents else None
    if file is not None:
        documents.write(file)
    if not options.json_:
        print(f"checkpoint          step {loaded.checkpoint.step}, {options.weights} weights")
        _print(result, by_document, reader, draws)
        return
    values = result.record() | {
        "step": loaded.checkpoint.step,
        "weights": options.weights,
        "draws": draws,
        "unigram_perplexity": reader.unigram_perplexity,
    }
    print(json.dumps(values | (by_document.record() if by_document else {})))


def _print(result: Evaluation, by_document: DocumentEvaluation | None, reader: RowStream, draws: int) -> None:
    print(f"validation rows     {result.rows} of {len(reader)}, {result.tokens} tokens, {draws} draw(s) each")
    print(f"NELBO               {result.nelbo:.4f} +- {result.nelbo_stderr:.4f} nats per token")
    print(f"perplexity          {result.perplexity:.2f} +- {result.perplexity_stderr:.2f}")
    print(f"unigram perplexity  {reader.unigram_perplexity:.2f} (whole split, train counts)")
    if by_document is None:
        return
    d = by_document
    print(
        f"whole documents     {d.documents}, {d.document_tokens} tokens; {d.documents_cut} others are cut by the rows"
    )
    print(f"NELBO of documents  {d.document_nelbo:.4f} +- {d.document_nelbo_stderr:.4f} nats per token")
    print(f"perplexity          {d.document_perplexity:.2f} +- {d.document_perplexity_stderr:.2f}")
    print(f"mean of documents   {d.document_mean:.4f} +- {d.document_mean_stderr:.4f} nats per token, all alike")
