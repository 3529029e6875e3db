"""Evaluation: the NELBO per token on the validation split, with a standard error; `bd3 eval`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch.distributed as dist
import tyro
from megatron.core import parallel_state
from pydantic import Field

from bd3_megatron.config import DiffusionConfig, ModelConfig, Section, Seed
from bd3_megatron.diffusion.noise import Purpose, SampleKeys
from bd3_megatron.engine.base import Engine
from data_prep.order import RowOrder
from data_prep.reader import RowReader
from data_prep.stream import RowStream
from pretrain import runs
from pretrain.batches import make_batch
from pretrain.config import EvalConfig
from pretrain.options import parse_options

# Micro-batches given to the engine at once: enough to fill a pipeline, few enough to hold their results.
_GROUP = 16


@dataclass(frozen=True)
class Evaluation:
    """Result over the validation rows; position 0 (BOS) is left out of sums and counts (objective, step 6).

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
) -> Evaluation:
    """NELBO of the engine's current weights over ``options.rows`` rows and ``options.draws`` noise draws each.

    ``progress`` is called after every group of micro-batches.

    Rows are split over data-parallel ranks; the result is the same on every rank and under every layout.
    """
    diffusion = likelihood_bound(diffusion)
    # Always the same rows, whatever the seed: it is of the noise alone.
    order = RowOrder(len(reader), 0)
    count = min(options.rows or len(reader), len(reader))
    _, rows = order.epoch_and_row(np.arange(count))
    share = -(-count // engine.world.data_size)
    # Every rank has as many rows, because ranks may need each other in a forward pass (ZeRO-3 gathers weights there):
    # the last row stands in for those that are missing.
    mine = np.arange(engine.world.data_rank * share, (engine.world.data_rank + 1) * share)
    sums = np.zeros(len(mine))
    # The causal objective has no noise: one pass is all there is.
    draws = 1 if diffusion.objective == "causal" else options.draws
    for draw in range(draws):
        for group in _groups(mine, micro):
            batches = []
            for slots in (np.minimum(slots, count - 1) for slots in group):
                keys = SampleKeys(np.full(len(slots), draw), rows[slots], slots, batch=draw, batch_rows=count)
                batches.append(make_batch(reader, model, diffusion, keys, options.seed, Purpose.EVALUATE))
            for slots, weighted in zip(group, engine.forward(batches)):
                per_draw = weighted.double().sum(1).view(-1, len(slots))  # [K, b]
                sums[slots - mine[0]] += per_draw.mean(0).numpy() / draws
            progress()
    gathered: list[np.ndarray] = [np.empty(0)] * engine.world.data_size
    dist.all_gather_object(gathered, sums, parallel_state.get_data_parallel_group())
    return summarize(np.concatenate(gathered)[:count], model.length - 1)


def summarize(row_sums: np.ndarray, tokens_per_row: int) -> Evaluation:
    """Mean and standard error from each row's nll in nats ``[n]``."""
    per_token = row_sums / tokens_per_row
    count = len(per_token)
    mean = float(per_token.mean())
    error = float(per_token.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    perplexity = math.exp(min(mean, 700.0))
    return Evaluation(mean, error, perplexity, perplexity * error, count, count * tokens_per_row)


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
    rows: int | None = Field(None, ge=2, description="rows used; null means all of the split")
    draws: int = Field(1, ge=1, description="noise draws per row; more make the bound's estimate less noisy")
    seed: Seed = Field(0, description="seed of the evaluation noise")
    micro_batch: int | None = Field(None, ge=1, description="rows per forward pass; null means as in training")
    json_: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, description="print one line of JSON")


def main(args: list[str]) -> None:
    """`bd3 eval RUN`."""
    options = parse_options(EvalOptions, args, "bd3 eval")
    run = Path(options.run)
    loaded = runs.load(run, options.step, averaged=options.weights == "ema")
    data = loaded.config.data
    if options.data is not None:
        data = data.model_copy(update={"path": options.data, "mix": None})
    reader = runs.open_stream(data, "validation", loaded.config.model)
    # The causal objective has no noise to draw.
    draws = 1 if loaded.config.diffusion.objective == "causal" else options.draws
    settings = EvalConfig(rows=options.rows, draws=draws, seed=options.seed)
    micro = options.micro_batch or loaded.config.eval.micro_batch or loaded.config.train.micro_batch
    with loaded.engine() as engine:
        result = evaluate(engine, reader, loaded.config.model, loaded.config.diffusion, settings, micro)
    values = result.record() | {
        "step": loaded.checkpoint.step,
        "weights": options.weights,
        "draws": draws,
        "unigram_perplexity": reader.unigram_perplexity,
    }
    if options.json_:
        print(json.dumps(values))
        return
    print(f"checkpoint          step {loaded.checkpoint.step}, {options.weights} weights")
    print(f"validation rows     {result.rows} of {len(reader)}, {result.tokens} tokens, {draws} draw(s) each")
    print(f"NELBO               {result.nelbo:.4f} +- {result.nelbo_stderr:.4f} nats per token")
    print(f"perplexity          {result.perplexity:.2f} +- {result.perplexity_stderr:.2f}")
    print(f"unigram perplexity  {reader.unigram_perplexity:.2f} (whole split, train counts)")
