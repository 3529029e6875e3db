"""`bd3 launch`: submit a run, a sweep or a data preparation to Slurm."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from bd3_common.errors import ConfigError
from bd3_common.text import show
from data_prep.build.plan import PrepConfig
from data_prep.format.remote import is_remote
from pretrain.commands.prep import PrepOptions
from pretrain.config.command_line import parse_options, scan_options
from pretrain.config.resolve import RunOptions, resolve
from pretrain.config.schema import RunConfig
from pretrain.config.site import site_layer
from pretrain.config.subcommands import run_subcommand
from pretrain.config.values import Layer
from slurm.options import JobOptions


class SubmitOptions(JobOptions):
    """Options of all kinds of job."""

    site: str | None = Field(
        default=None, description="YAML file with any of the job's options for this cluster; null: $BD3_SITE, if set"
    )
    dry_run: bool = Field(default=False, description="print the script; write and submit nothing")


class PretrainJob(RunOptions, SubmitOptions):
    """Submit a training run to Slurm. All options of bd3 pretrain, and those of the job."""

    chain: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="jobs that continue the run one after another, for sites where a job may not be requeued at its "
        "limit",
    )


class SweepJob(RunOptions, SubmitOptions):
    """Submit a run for every combination of values as a job array. All options of bd3 pretrain, and those of the job.

    The run folders lie in the folder --run; runs that are finished are not submitted again.
    """

    grid: dict[str, str] = Field(
        default={}, description="keys of the configuration with their values: train.lr 1e-3,3e-3 train.seed 0,1,2"
    )
    at_once: int | None = Field(default=None, ge=1, description="runs at a time; null: as many as Slurm starts")


class PrepJob(PrepOptions, SubmitOptions):
    """Submit the preparation of a data set as a job array. All options of bd3 prep, and those of the job."""

    dry_run: bool = Field(default=False, description=SubmitOptions.model_fields["dry_run"].description)
    tasks: int = Field(default=8, ge=1, le=100_000, description="shares of the input, each a task of the array")
    at_once: int | None = Field(default=None, ge=1, description="tasks at a time; null: as many as Slurm starts")


def main(args: list[str]) -> int:
    """`bd3 launch pretrain | sweep | prep`.

    Raises:
        ConfigError, SlurmError, OSError: one line; nothing was submitted, and nothing half-written is left.
    """
    return run_subcommand("launch", "kind of job", {"pretrain": pretrain, "sweep": sweep, "prep": prep}, _usage, args)


def _usage() -> str:
    kinds = {"pretrain": PretrainJob, "sweep": SweepJob, "prep": PrepJob}
    lines = [f"  {name:<9} {(cls.__doc__ or '').splitlines()[0]}" for name, cls in kinds.items()]
    return "\n".join(
        [
            "usage: bd3 launch pretrain | sweep | prep [OPTIONS]",
            "",
            *lines,
            "",
            "bd3 launch pretrain --help lists the options; docs/slurm.md has the way from an empty account.",
        ]
    )


def pretrain(args: list[str]) -> None:
    """`bd3 launch pretrain`."""
    config, options = resolve(PretrainJob, args, "bd3 launch pretrain", _site)
    from pretrain.jobs.submit import submit_run

    show(submit_run(config, options, options.chain, options.dry_run).removesuffix("\n"))


def sweep(args: list[str]) -> None:
    """`bd3 launch sweep`."""
    config, options = resolve(SweepJob, args, "bd3 launch sweep", _site)
    from pretrain.jobs.grid import combinations
    from pretrain.jobs.submit import submit_sweep

    folder = Path(config.run).absolute()
    runs: dict[Path, RunConfig] = {}
    for words, name in combinations(options.grid):
        run = folder / name
        if run in runs:
            raise ConfigError(f"grid: two combinations would train in {run}; submit one of them in a folder of its own")
        runs[run] = resolve(SweepJob, [*args, *words, f"--run={run}"], "bd3 launch sweep", _site)[0]
    show(submit_sweep(folder, runs, options, options.at_once, options.dry_run).removesuffix("\n"))


def prep(args: list[str]) -> None:
    """`bd3 launch prep`."""
    options = parse_options(PrepJob, args, "bd3 launch prep", _site)
    config = PrepConfig(**options.model_dump(include=set(PrepConfig.model_fields)))
    if options.part is not None:
        raise ConfigError(f"--part={options.part}: set by the array; give --tasks, the number of shares")
    if options.index is not None:
        raise ConfigError(f"--index={options.index}: not a job of its own; call bd3 prep --index {options.index}")
    if options.workers is not None:
        raise ConfigError(f"--workers={options.workers}: one for each core of a task; give --cpus-per-task")
    remote = is_remote(options.out)
    if remote and options.work is None:
        raise ConfigError(f"--out={options.out}: all tasks need one work folder on a shared disk: name it with --work")
    out = Path(options.work or "") / options.out.rstrip("/").rpartition("/")[2] if remote else Path(options.out)
    out = out.absolute()
    if options.overwrite:
        raise ConfigError(f"overwrite=true: each task of the array would begin anew; remove {out} first")
    if not remote and os.path.lexists(out) and not options.dry_run:
        from data_prep.build.prep import prep as check

        check(config, show)  # prints that the data set is there, or raises with the difference
        return
    from pretrain.jobs.submit import submit_prep

    text = submit_prep(out, _prep_words(args), options, options.tasks, options.at_once, options.dry_run)
    show(text.removesuffix("\n"))


def _site(flags: Mapping[str, Any]) -> list[Layer]:
    """The site file's options, as a layer below the flags."""
    path = flags.get("site") or os.environ.get("BD3_SITE")
    return [site_layer(path, JobOptions)] if path else []


def _prep_words(args: list[str]) -> list[str]:
    """The part of a command line of bd3 launch prep that bd3 prep understands."""
    given = scan_options(PrepJob, args)
    words = ["./repack" if word == "repack" else word for word in given.pop("inputs")]
    for path, values in given.items():
        if path in PrepConfig.model_fields and path not in ("part", "workers", "overwrite"):
            words += [f"--{path.replace('_', '-')}", *values]
    return words
