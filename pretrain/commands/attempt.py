"""`bd3 attempt`: start a run in a batch script, and again where that helps."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from bd3_common import logs
from bd3_common.atomic import refuse_link
from bd3_common.errors import ConfigError
from bd3_megatron.config import Section
from pretrain.config.command_line import Positional, parse_options


class AttemptOptions(Section):
    """Start a run's command and, where another start helps, put the Slurm job back into the queue afterwards.

    bd3 attempt RUN [OPTIONS] -- COMMAND...
    """

    run: Positional[str] = Field(description="run folder")
    restarts: int = Field(default=3, ge=0, description="starts without a new checkpoint after which to give up")
    steps: int | None = Field(
        default=None, ge=1, description="do nothing if the run has a checkpoint of this step or a later one"
    )
    fits: list[int] = Field(
        default=[], description="node counts that the layout fits, if the job may get several: other nodes stay idle"
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
    from pretrain.resilience.supervisor import supervise

    # Ranks write to the same log: lines of this process begin with its name.
    logs.to_console("bd3 attempt: ")
    refuse_link(Path(options.run), "run", ConfigError)
    return supervise(Path(options.run), command, options.restarts, options.steps, options.fits)
