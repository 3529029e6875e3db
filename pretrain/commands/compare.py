"""`bd3 compare`: several runs on the same rows and the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from bd3_common.errors import ConfigError
from bd3_common.text import json_line
from pretrain.config.checkpoint_options import EvaluationChoices
from pretrain.config.command_line import Positional, parse_options


class CompareOptions(EvaluationChoices):
    """Compare runs: the bound of each, and paired differences to the first."""

    runs: Positional[list[str]] = Field(description="run folders, two or more")
    step: int | None = Field(default=None, ge=0, description="step of the checkpoints; null means each run's newest")
    weights: Literal["ema", "raw"] = Field(default="ema", description="EMA weights, or the last step's")
    data: str | None = Field(default=None, description="data set for all; null means the first run's")
    rows: int | None = Field(default=None, ge=2, description="rows used, the same for all; null: all")
    json_: bool = Field(default=False, description="print one line of JSON for each run")


def main(args: list[str]) -> None:
    """`bd3 compare RUN RUN...`."""
    options = parse_options(CompareOptions, args, "bd3 compare")
    if len(options.runs) < 2:
        raise ConfigError("bd3 compare: give two or more run folders")
    from pretrain.checkpoint.loaded_run import load_run
    from pretrain.checkpoint.reader import find_checkpoint
    from pretrain.evaluation.comparison import HEADER, Comparison
    from pretrain.evaluation.report import evaluate_run

    chosen = options.evaluation(options.rows)
    for name in options.runs[1:]:  # before the first takes its time
        find_checkpoint(Path(name), options.step)
    reports, data = [], None
    for name in options.runs:
        loaded = load_run(Path(name), options.step, averaged=options.weights == "ema")
        if data is None:
            data = loaded.config.data
            if options.data is not None:
                data = data.at(options.data)
        (report,) = evaluate_run(loaded, options.weights, chosen, (data,), single_draw=True)
        reports.append(report)
    compared = Comparison(options.runs, reports)
    if options.json_:
        for record in compared.records():
            print(json_line(record))
    else:
        _show(HEADER, compared.rows())


def _show(header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    # A table that is cut off helps nobody: without a terminal its lines are as long as they need to be.
    Console(width=None if console.is_terminal else 200).print(table)
