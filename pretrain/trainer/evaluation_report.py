"""Evaluation of a run's checkpoint on the validation split: the results of `bd3 eval`, as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_common.errors import ConfigError
from bd3_common.text import counted
from pretrain.checkpoint.loaded_run import LoadedRun
from pretrain.config.schema import EvalConfig
from pretrain.run_folder.data import check_documents, open_stream, verify
from pretrain.trainer.document_likelihood import DocumentEvaluation, DocumentTally
from pretrain.trainer.likelihood import Evaluation, evaluate


@dataclass(frozen=True)
class EvaluationReport:
    """Results for one checkpoint.

    Attributes:
        weights: ``ema`` or ``raw``, as chosen.
        draws: noise draws per row.
        split_rows: rows of the validation split.
        unigram_perplexity: of the validation split, with the token counts of the train split.
        documents: None without ``per_document``.
    """

    step: int
    weights: str
    draws: int
    split_rows: int
    unigram_perplexity: float
    result: Evaluation
    documents: DocumentEvaluation | None = None

    def record(self) -> dict[str, Any]:
        """All values, for JSON."""
        values = self.result.record() | {
            "step": self.step,
            "weights": self.weights,
            "draws": self.draws,
            "unigram_perplexity": self.unigram_perplexity,
        }
        return values | (self.documents.record() if self.documents else {})

    def text(self) -> str:
        """Lines for a person."""
        result, documents = self.result, self.documents
        lines = [
            f"checkpoint          step {self.step}, {self.weights} weights",
            f"validation rows     {result.rows} of {self.split_rows}, {result.tokens} tokens, "
            f"{counted(self.draws, 'draw')} each",
            f"NELBO               {result.nelbo:.4f} +- {result.nelbo_stderr:.4f} nats per token",
            f"perplexity          {result.perplexity:.2f} +- {result.perplexity_stderr:.2f}",
            f"unigram perplexity  {self.unigram_perplexity:.2f} (whole split, train counts)",
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


def evaluate_run(
    loaded: LoadedRun,
    weights: str,
    options: EvalConfig,
    data: str | None = None,
    per_document: bool = False,
    documents_file: Path | None = None,
) -> EvaluationReport:
    """Evaluate the loaded weights in a world of 1.

    Args:
        weights: ``ema`` or ``raw``, as loaded.
        data: data set; None means the run's.
        per_document: also compute statistics over whole documents.
        documents_file: file for one line of JSON per document; implies ``per_document``.

    Raises:
        ConfigError, DataError: a data set that does not fit, or no folder for ``documents_file``.
    """
    config, data_config = loaded.config, loaded.config.data
    if data is not None:
        data_config = data_config.model_copy(update={"path": data, "mix": None})
    stream = open_stream(data_config, "validation", config.model)
    verify(stream, data_config.verify_gb)
    per_document = per_document or documents_file is not None
    if per_document:
        check_documents(stream, "--per-document")
    if documents_file is not None and not documents_file.parent.is_dir():
        raise ConfigError(f"documents_file={documents_file}: there is no folder {documents_file.parent}; make it first")
    if config.diffusion.objective == "causal":  # no noise to draw
        options = options.model_copy(update={"draws": 1})
    tally = DocumentTally(stream) if per_document else None
    with loaded.engine() as engine:
        result = evaluate(
            engine,
            stream,
            config.model,
            config.diffusion,
            options,
            options.micro_batch or config.eval.micro_batch or config.train.micro_batch,
            document_mask=config.data.document_mask,
            tally=tally,
        )
        documents = tally.gather() if tally else None
    statistics = documents.summarize() if documents else None
    if documents_file is not None:
        documents.write(documents_file)
    return EvaluationReport(
        loaded.checkpoint.step,
        weights,
        options.draws,
        len(stream),
        stream.unigram_perplexity,
        result,
        statistics,
    )
