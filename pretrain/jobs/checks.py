"""Checks before a job is submitted: the layout fits the nodes, Slurm can grant the job, the folder is free."""

from __future__ import annotations

import shutil
from pathlib import Path

from bd3_common.errors import ConfigError
from bd3_common.text import counted
from data_prep.format.manifest import load_manifest
from data_prep.format.remote import is_remote
from pretrain.config.data_fit import resolve_model
from pretrain.config.schema import RunConfig, check_batches, check_run
from pretrain.run_folder import events
from slurm import client
from slurm.options import JobOptions, seconds_of


def fitting_node_counts(config: RunConfig, options: JobOptions) -> list[int]:
    """Check the data and the layout; the node counts of ``options.nodes`` that the layout fits.

    Data sets behind a URL are looked at by the job only.

    Raises:
        ConfigError: there are no data, they do not fit the model, or the smallest node count does not fit.
    """
    weights = config.data.weights()
    if not weights:
        raise ConfigError("data.path: not set; give the folder that bd3 prep wrote with --data.path")
    for path in weights:
        if not is_remote(path):
            model = resolve_model(config.model, load_manifest(Path(path)), path)
            config = config.model_copy(update={"model": model})
    fitting: list[int] = []
    for nodes in options.node_counts:
        try:
            check_batches(config.train, config.parallel, check_run(config, nodes * options.ranks))
        except ConfigError as error:
            if not fitting:
                raise ConfigError(f"{error} ({counted(nodes, 'node')} x {counted(options.ranks, 'task')})") from None
            continue
        fitting.append(nodes)
    return fitting


def check_slurm(options: JobOptions, nodes: int) -> None:
    """Check partition, node count and time limit, so that a job does not wait for nodes that never come.

    Args:
        nodes: smallest node count of the job.

    Raises:
        ConfigError, SlurmError: one line.
    """
    if shutil.which("sbatch") is None:
        client.call("sbatch")  # raises with a remedy
    there = client.partitions()
    name = options.partition or next((p for p, found in there.items() if found.get("Default") == "YES"), None)
    for part in options.partition.split(",") if options.partition is not None else ():
        if part not in there:
            raise ConfigError(f"partition={part}: there is none of this name; use {', '.join(there)}")
    if name not in there:  # no default, or several to choose from
        return
    limits = there[name]
    total, most = _count(limits.get("TotalNodes")), _count(limits.get("MaxNodes"))
    if total is not None and nodes > total:
        raise ConfigError(f"nodes={options.nodes}: partition {name} has {counted(total, 'node')}; use at most {total}")
    if most is not None and nodes > most:
        raise ConfigError(
            f"nodes={options.nodes}: partition {name} gives a job {counted(most, 'node')} at most; use {most}"
        )
    longest = limits.get("MaxTime", "")
    if options.time and longest[:1].isdecimal() and seconds_of(options.time) > seconds_of(longest):
        raise ConfigError(f"time={options.time}: the limit of partition {name} is {longest}; use that or less")


def check_idle(root: Path) -> None:
    """Check that no submitted job is pending or running in a folder.

    Raises:
        ConfigError: one is.
    """
    for number in {job for event in events.read(root) if event["event"] == "launched" for job in event.get("jobs", ())}:
        for found in client.tasks(number):
            if found.get("JobState", "").split()[0] in client.ACTIVE:
                raise ConfigError(
                    f"{root}: job {number} is {found['JobState']} in it; wait for it, or end it with: scancel {number}"
                )


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
