"""Evaluations of checkpoints on validation splits: the results of `bd3 eval`, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_common.errors import ConfigError
from bd3_common.text import counted
from bd3_megatron.diffusion.estimators import LikelihoodEstimator
from bd3_megatron.layout import check_layout
from data_prep.read.stream import RowStream
from pretrain.checkpoint.loaded_run import LoadedRun
from pretrain.config.schema import DataConfig, EvalConfig, RunConfig
from pretrain.evaluation.document_likelihood import DocumentEvaluation
from pretrain.evaluation.likelihood import Evaluation, Likelihood, evaluate
from pretrain.run_folder.data import check_documents, open_stream, verify


@dataclass(frozen=True)
class EvaluationReport:
    """Results for one checkpoint on one data set with one block size.

    Attributes:
        weights: ``ema`` or ``raw``, as chosen.
        estimator: name of the estimator.
        draws: noise draws per row; with ``exact`` the number of masks of a block.
        data: the data set, or those of a mix.
        block_size: B'.
        split_rows: rows of the validation split.
        unigram_perplexity: of the validation split, with the token counts of the train split.
        documents: None without ``per_document``.
    """

    step: int
    weights: str
    estimator: str
    draws: int
    data: str
    block_size: int
    split_rows: int
    unigram_perplexity: float
    likelihood: Likelihood
    documents: DocumentEvaluation | None = None

    @property
    def result(self) -> Evaluation:
        """Mean and standard errors."""
        return self.likelihood.summarize()

    def record(self) -> dict[str, Any]:
        """All values, for JSON."""
        error = self.likelihood.document_stderr
        values = self.result.record() | {
            "nelbo_stderr_documents": None if math.isnan(error) else error,
            "step": self.step,
            "weights": self.weights,
            "estimator": self.estimator,
            "draws": self.draws,
            "data": self.data,
            "block_size": self.block_size,
            "unigram_perplexity": self.unigram_perplexity,
        }
        if self.likelihood.blocks is not None:
            values |= {f"nll_by_count_{name}": nats for name, nats in self.likelihood.blocks.by_count().items()}
            values |= {f"nelbo_by_position_{name}": nats for name, nats in self._by_position().items()}
        return values | (self.documents.record() if self.documents else {})

    def _by_position(self) -> dict[str, float]:
        assert self.likelihood.blocks is not None
        return {name: nats / self.result.tokens for name, nats in self.likelihood.blocks.by_position().items()}

    def text(self) -> str:
        """Lines for a person."""
        result, documents = self.result, self.documents
        estimator = f"{self.estimator}, blocks of {self.block_size}"
        if self.likelihood.blocks is None:
            estimator = "none needed: the likelihood itself"
        elif self.estimator != "exact":
            estimator += f", {counted(self.draws, 'draw')} each"
        lines = [
            f"checkpoint          step {self.step}, {self.weights} weights",
            f"validation rows     {result.rows} of {self.split_rows} of {self.data}, {result.tokens} tokens",
            f"estimator           {estimator}",
            f"NELBO               {result.nelbo:.4f} +- {result.nelbo_stderr:.4f} nats per token (over rows)"
            + _over_documents(self.likelihood.document_stderr),
            f"perplexity          {result.perplexity:.2f} +- {result.perplexity_stderr:.2f}",
            f"unigram perplexity  {self.unigram_perplexity:.2f} (whole split, train counts)",
        ]
        if self.likelihood.blocks is not None and self.block_size > 1:
            by_count = self.likelihood.blocks.by_count()
            lines += [
                f"nll by masked       {_listed(by_count)} (tokens masked of a block: nats each)",
                f"NELBO by position   {_listed(self._by_position())} (position in a block: its share)",
            ]
        if documents is not None:
            d = documents
            lines += [
                f"whole documents     {d.documents}, {d.document_tokens} tokens; "
                f"{d.documents_cut} others are cut by the rows",
                f"NELBO of documents  {d.document_nelbo:.4f} +- {d.document_nelbo_stderr:.4f} nats per token",
                f"perplexity          {d.document_perplexity:.2f} +- {d.document_perplexity_stderr:.2f}",
                f"mean of documents   {d.document_mean:.4f} +- {d.document_mean_stderr:.4f} nats per token, all alike",
            ]
        return "\n".join(lines)


def _over_documents(error: float) -> str:
    return "" if math.isnan(error) else f", +- {error:.4f} (over documents)"


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name}: {value:.3f}" for name, value in values.items())


def evaluate_run(
    loaded: LoadedRun,
    weights: str,
    options: EvalConfig,
    data: tuple[DataConfig, ...] = (),
    block_sizes: tuple[int, ...] = (),
    per_document: bool = False,
    documents_file: Path | None = None,
    single_draw: bool = False,
) -> Iterator[EvaluationReport]:
    """Evaluate the loaded weights in a world of 1, on each data set with each block size.

    Args:
        weights: ``ema`` or ``raw``, as loaded.
        data: data sections with other sources; none means the run's.
        block_sizes: none means the run's.
        per_document: also compute statistics over whole documents.
        documents_file: file for one line of JSON per document; implies ``per_document``.
        single_draw: one draw in a pass where the run trains with K, so that runs with other K share the noise of a
            seed.

    Raises:
        ConfigError, DataError: a data set or a block size that does not fit, or no folder for ``documents_file``.
    """
    per_document = per_document or documents_file is not None
    if documents_file is not None and not documents_file.parent.is_dir():
        raise ConfigError(f"documents_file={documents_file}: there is no folder {documents_file.parent}; make it first")
    if documents_file is not None and max(1, len(data)) * max(1, len(block_sizes)) > 1:
        raise ConfigError(f"documents_file={documents_file}: for one data set and one block size; give one of each")
    configs = [_with_blocks(loaded.config, size) for size in block_sizes or (loaded.config.diffusion.block_size,)]
    if single_draw:
        single = {"draws": 1, "coupling": "independent"}
        configs = [c.model_copy(update={"diffusion": c.diffusion.model_copy(update=single)}) for c in configs]
    for config in configs:  # before the first of them takes its time
        LikelihoodEstimator(config.diffusion, options.estimator)
    streams = [_open(loaded.config, source, per_document) for source in data or (loaded.config.data,)]
    for config in configs:
        with loaded.engine(config) as engine:
            for name, stream in streams:
                found = evaluate(
                    engine,
                    stream,
                    config.model,
                    config.diffusion,
                    options,
                    options.micro_batch or config.eval.micro_batch or config.train.micro_batch,
                    document_mask=config.data.document_mask,
                    by_document=True,
                    whole_documents=per_document,
                )
                statistics = None
                if per_document and found.documents is not None:
                    statistics = found.documents.summarize()
                    if documents_file is not None:
                        found.documents.write(documents_file)
                yield EvaluationReport(
                    loaded.checkpoint.step,
                    weights,
                    options.estimator,
                    LikelihoodEstimator(config.diffusion, options.estimator, options.draws).passes,
                    name,
                    config.diffusion.block_size,
                    len(stream),
                    stream.unigram_perplexity,
                    found,
                    statistics,
                )


def _with_blocks(config: RunConfig, size: int) -> RunConfig:
    """The configuration with blocks of another size.

    Raises:
        ConfigError: rows are no multiple of it, or the objective has no blocks.
    """
    trained = config.diffusion
    if size == trained.block_size:
        return config
    if trained.objective == "causal":
        raise ConfigError(f"block_sizes={size}: a causal model has no blocks; leave it out")
    given = {"count_probabilities": None, "count_weights": None}
    diffusion = trained.model_copy(update={"block_size": size} | given)
    changed = config.model_copy(update={"diffusion": diffusion})
    try:
        check_layout(changed.engine(), config.parallel.tensor * config.parallel.pipeline * config.parallel.context)
    except ConfigError as error:
        raise ConfigError(str(error).replace("diffusion.block_size", "block_sizes")) from None
    return changed


def _open(config: RunConfig, data: DataConfig, per_document: bool) -> tuple[str, RowStream]:
    stream = open_stream(data, "validation", config.model)
    verify(stream, data.verify_gb)
    if per_document:
        check_documents(stream, "--per-document")
    return ", ".join(data.weights()), stream
