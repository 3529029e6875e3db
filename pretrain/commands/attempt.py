"""`bd3 attempt`: start a run in a batch script, and again where that helps."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from bd3_common import exit_codes
from bd3_common.errors import ConfigError
from bd3_megatron.config import Section
from pretrain.config.command_line import Positional, parse_options
from pretrain.resilience.supervisor import Asked, Job, attempt, finished, newest_step, say, settle


class AttemptOptions(Section):
    """Start a run's command and, where another start helps, put the Slurm job back into the queue afterwards.

    bd3 attempt RUN [OPTIONS] -- COMMAND...
    """

    run: Positional[str] = Field(description="run folder")
    restarts: int = Field(3, ge=0, description="starts without a new checkpoint after which to end")
    steps: int | None = Field(None, ge=1, description="do nothing where there is a checkpoint of this step or a later")
    fits: list[int] = Field(
        [],
        description="numbers of nodes that the layout fits, if the job may get several: of others some are left out",
    )


def main(args: list[str]) -> int:
    """`bd3 attempt`.

    Raises:
        ConfigError: one line for a mistake of the user.
    """
    if "--" not in args and not {"-h", "--help"} & set(args):
        raise ConfigError("bd3 attempt: no command; usage: bd3 attempt RUN [OPTIONS] -- COMMAND...")
    at = args.index("--") if "--" in args else len(args)
    options, command = parse_options(AttemptOptions, args[:at], "bd3 attempt"), args[at + 1 :]
    if not command:
        raise ConfigError("bd3 attempt: nothing after --; give the command that starts the run")
    run = Path(options.run)
    run.mkdir(parents=True, exist_ok=True)
    asked = Asked(in_job="SLURM_JOB_ID" in os.environ)
    while True:
        job = Job.of(os.environ)
        if options.steps is not None and finished(run, options.steps):
            say(f"{run}: already at step {newest_step(run)}: nothing to do")
            return 0
        if (refusal := settle(run, job, options.restarts)) is not None:
            say(refusal)
            return exit_codes.FAILED
        code, again = attempt(run, job, command, asked, options.restarts, options.fits)
        if not again or job.number:
            return code
