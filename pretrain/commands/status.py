"""`bd3 status RUN`: show the status of a run in Slurm and in training."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from bd3_common.text import json_line, show
from bd3_megatron.config import Section
from pretrain.config.command_line import Positional, parse_options


class StatusOptions(Section):
    """Show the status of a run, or of each run in a sweep's folder, in Slurm and in training."""

    run: Positional[str] = Field(description="run folder, or the folder of a sweep")
    json_: bool = Field(default=False, description="print one line of JSON for each run")


def main(args: list[str]) -> None:
    """`bd3 status`.

    Raises:
        ConfigError: not a folder of runs.
    """
    options = parse_options(StatusOptions, args, "bd3 status")
    from pretrain.jobs.run_status import find_runs, run_status, status_lines

    for number, run in enumerate(find_runs(Path(options.run))):
        found = run_status(run)
        if options.json_:
            print(json_line(found))
        else:
            show(("\n" if number else "") + "\n".join(status_lines(found)))
