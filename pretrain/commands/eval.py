"""`bd3 eval`: evaluate a run's checkpoint on the validation split."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from bd3_common.text import json_line, show
from bd3_megatron.config import MAX_ROWS, Seed
from pretrain.config.checkpoint_options import CheckpointOptions
from pretrain.config.command_line import parse_options
from pretrain.config.schema import EvalConfig


class EvalOptions(CheckpointOptions):
    """Evaluate a run's checkpoint on the validation split of its data."""

    data: str | None = Field(default=None, description="data set; null means the one the run was trained on")
    rows: int | None = Field(
        default=None, ge=2, description="rows used, at random or (--per-document) the first; null: all"
    )
    draws: int = Field(
        default=1, ge=1, le=10_000, description="noise draws per row; more make the bound's estimate less noisy"
    )
    seed: Seed = Field(default=0, description="seed of the evaluation noise")
    micro_batch: int | None = Field(
        default=None, ge=1, le=MAX_ROWS, description="rows per forward pass; null means as in training"
    )
    per_document: bool = Field(default=False, description="also statistics over documents, joined from all their rows")
    documents_file: str | None = Field(
        default=None, description="file for one line of JSON per document: its number in the split, tokens, nats"
    )
    json_: bool = Field(default=False, description="print one line of JSON")


def main(args: list[str]) -> None:
    """`bd3 eval RUN`."""
    options = parse_options(EvalOptions, args, "bd3 eval")
    # These import torch: not for --help, nor for a mistyped flag.
    from pretrain.checkpoint.loaded_run import load_chosen
    from pretrain.trainer.evaluation_report import evaluate_run

    report = evaluate_run(
        load_chosen(options),
        options.weights,
        EvalConfig(rows=options.rows, draws=options.draws, seed=options.seed, micro_batch=options.micro_batch),
        options.data,
        options.per_document,
        None if options.documents_file is None else Path(options.documents_file),
    )
    if options.json_:
        print(json_line(report.record()))
    else:
        show(report.text())
