"""`bd3 eval`: evaluate a run's checkpoint on the validation split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from bd3_common.errors import ConfigError
from bd3_megatron.config import Seed
from pretrain.config.checkpoint_options import CheckpointOptions
from pretrain.config.command_line import parse_options
from pretrain.config.schema import EvalConfig

if TYPE_CHECKING:
    from data_prep.read.stream import RowStream
    from pretrain.trainer.document_likelihood import DocumentEvaluation
    from pretrain.trainer.likelihood import Evaluation


class EvalOptions(CheckpointOptions):
    """Evaluate a run's checkpoint on the validation split of its data."""

    data: str | None = Field(default=None, description="data set; null means the one the run was trained on")
    rows: int | None = Field(
        default=None, ge=2, description="rows used, at random or (--per-document) the first; null: all"
    )
    draws: int = Field(default=1, ge=1, description="noise draws per row; more make the bound's estimate less noisy")
    seed: Seed = Field(default=0, description="seed of the evaluation noise")
    micro_batch: int | None = Field(default=None, ge=1, description="rows per forward pass; null means as in training")
    per_document: bool = Field(default=False, description="also statistics over documents, joined from all their rows")
    documents_file: str | None = Field(
        default=None, description="file for one line of JSON per document: its number in the split, tokens, nats"
    )
    json_: bool = Field(default=False, description="print one line of JSON")


def main(args: list[str]) -> None:
    """`bd3 eval RUN`."""
    options = parse_options(EvalOptions, args, "bd3 eval")
    # Not for --help, nor for a mistyped flag.
    from pretrain.checkpoint.loaded_run import load_chosen
    from pretrain.run_folder import data as run_data
    from pretrain.trainer.document_likelihood import DocumentTally
    from pretrain.trainer.likelihood import evaluate

    loaded = load_chosen(options)
    config, data = loaded.config, loaded.config.data
    if options.data is not None:
        data = data.model_copy(update={"path": options.data, "mix": None})
    reader = run_data.open_stream(data, "validation", config.model)
    run_data.verify(reader, data.verify_gb)
    per_document = options.per_document or options.documents_file is not None
    if per_document:
        run_data.check_documents(reader, "--per-document")
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
