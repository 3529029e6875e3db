"""`bd3 eval`: evaluate a run's checkpoint on the validation split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from bd3_common.text import json_line, show
from bd3_megatron.config import MAX_LENGTH
from pretrain.config.checkpoint_options import CheckpointOptions, EvaluationChoices
from pretrain.config.command_line import parse_options


class EvalOptions(EvaluationChoices, CheckpointOptions):
    """Evaluate a run's checkpoint on the validation split of its data."""

    data: list[str] = Field(default=[], description="data sets; none means the one the run was trained on")
    block_sizes: list[Annotated[int, Field(ge=1, le=MAX_LENGTH)]] = Field(
        default=[], description="block sizes B'; none means the run's"
    )
    rows: int | None = Field(
        default=None, ge=2, description="rows used, at random or (--per-document) the first; null: all"
    )
    per_document: bool = Field(default=False, description="also statistics over documents, joined from all their rows")
    documents_file: str | None = Field(
        default=None, description="file for one line of JSON per document: its number in the split, tokens, nats"
    )
    json_: bool = Field(default=False, description="print one line of JSON, or one for each data set and block size")


def main(args: list[str]) -> None:
    """`bd3 eval RUN`."""
    options = parse_options(EvalOptions, args, "bd3 eval")
    # These import torch: not for --help, nor for a mistyped flag.
    from pretrain.checkpoint.loaded_run import load_chosen
    from pretrain.evaluation.report import evaluate_run

    loaded = load_chosen(options)
    reports = evaluate_run(
        loaded,
        options.weights,
        options.evaluation(options.rows),
        tuple(loaded.config.data.at(path) for path in options.data),
        tuple(options.block_sizes),
        options.per_document,
        None if options.documents_file is None else Path(options.documents_file),
    )
    for number, report in enumerate(reports):
        if options.json_:
            print(json_line(report.record()))
        else:
            show(("\n" if number else "") + report.text())
