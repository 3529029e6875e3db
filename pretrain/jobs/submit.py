"""Submission of jobs: fill in a batch script, write the launch folder, call sbatch.

Each function returns the text to print: what was submitted, or the script of a dry run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bd3_common.text import counted
from pretrain.config.schema import RunConfig
from pretrain.jobs.checks import check_idle, check_slurm, fitting_node_counts
from pretrain.resilience.hang_detection import spans
from pretrain.resilience.progress import finished
from pretrain.run_folder import layout
from pretrain.run_folder.launch_snapshot import LaunchFolder, quote
from pretrain.run_folder.place import check_place
from slurm import script
from slurm.environment import CHAIN
from slurm.options import JobOptions


def submit_run(config: RunConfig, options: JobOptions, chain: int, dry_run: bool) -> str:
    """Submit a training run as a job, or as a chain of jobs that continue it one after another.

    Args:
        chain: number of jobs.

    Raises:
        ConfigError, SlurmError, OSError: one line; nothing was submitted, and nothing half-written is left.
    """
    run = Path(config.run).absolute()
    check_place(config)
    if not dry_run:
        check_slurm(options, options.node_counts[0])
    fitting = fitting_node_counts(config, options)
    launch = LaunchFolder(run, options)
    steps = ["--steps", config.train.steps, "--restarts", options.restarts]
    fits = ["--fits", *fitting] if len(options.node_counts) > 1 else []
    lines = [
        f"RUN={quote(run)}",
        f'BD3=(bd3 pretrain --config {quote(launch.folder / layout.CONFIG)} --run "$RUN")',
        f"TASKS={options.ranks}",
        f"ATTEMPT=({quote(*steps, *fits)})",
        *launch.environment(),
    ]
    directives = options.directives() | {"output": str(run / layout.LOGS / "%x-%j.log")}
    directives["job-name"] = options.job_name or run.name
    text = script.fill(script.template("single_node" if options.nodes == "1" else "multi_node"), directives, lines)
    if dry_run:
        return text
    check_idle(run)
    with launch.written(text, {layout.CONFIG: config.model_copy(update={"run": str(run)})}):
        for link in range(1, chain + 1):
            after = [f"--dependency=afterany:{launch.jobs[-1]}"] if launch.jobs else []
            export = [f"--export=ALL,{CHAIN}={launch.name} {link} {chain}"] if chain > 1 else []
            launch.submit(*after, *export)
    size = f"{counted(options.nodes, 'node')} x {counted(options.ranks, 'task')}"
    jobs = " ".join(map(str, launch.jobs))
    return (
        f"job {jobs.replace(' ', ', ')}: {size}, {launch.script}\n"
        f"follow it with: bd3 status {quote(run)}    stop it with: scancel {jobs}\n"
    )


def submit_sweep(
    folder: Path, runs: Mapping[Path, RunConfig], options: JobOptions, at_once: int | None, dry_run: bool
) -> str:
    """Submit the runs of a sweep that are not finished as a job array.

    Args:
        folder: folder of the sweep.
        runs: configurations by run folder.
        at_once: runs at a time; None: as many as Slurm starts.

    Raises:
        ConfigError, SlurmError, OSError: as :func:`submit_run`.
    """
    if not dry_run:
        check_slurm(options, options.node_counts[0])
    for config in runs.values():
        check_place(config)
        fitting_node_counts(config, options)
    left = [number for number, (run, config) in enumerate(runs.items()) if not finished(run, config.train.steps)]
    if not left:
        return f"{folder}: all {len(runs)} runs are done; nothing to submit\n"
    launch = LaunchFolder(folder, options)
    lines = [
        f"RUNS={quote(launch.folder / layout.LAUNCH_RUNS)}",
        f"TASKS={options.ranks}",
        f"ATTEMPT=({quote('--restarts', options.restarts)})",
        *launch.environment(),
    ]
    directives = options.directives() | {
        "array": _array(left, at_once),
        "output": str(folder / layout.LOGS / "%x-%A_%a.log"),
        "job-name": options.job_name or folder.name,
    }
    text = script.fill(script.template("sweep"), directives, lines)
    if dry_run:
        return text
    check_idle(folder)
    files: dict[str, RunConfig | str] = {layout.LAUNCH_RUNS: "".join(f"{run}\n" for run in runs)}
    files |= {str(run / layout.SWEEP): runs[run] for number, run in enumerate(runs) if number in left}
    with launch.written(text, files):
        number = launch.submit()
    limit = f", {at_once} at a time" if at_once else ""
    return (
        f"job {number}: {len(left)} of {len(runs)} runs{limit}, {launch.script}\n"
        f"follow it with: bd3 status {quote(folder)}    stop it with: scancel {number}\n"
    )


def submit_prep(
    out: Path, words: Iterable[str], options: JobOptions, tasks: int, at_once: int | None, dry_run: bool
) -> str:
    """Submit the preparation of a data set as a job array; its launch folder is ``<out>.launch``.

    Args:
        words: command line of bd3 prep without the share of a task.
        tasks: shares of the input, each a task of the array.
        at_once: tasks at a time; None: as many as Slurm starts.

    Raises:
        ConfigError, SlurmError, OSError: as :func:`submit_run`.
    """
    launch = LaunchFolder(out.with_name(out.name + ".launch"), options)
    lines = [
        f"SHARES={tasks}",
        f"PREP=(bd3 prep {quote(*words)})",
        f"cd {quote(os.getcwd())}",
        *[line for line in launch.environment() if not line.startswith("CONTAINER=")],
    ]
    directives = options.task_directives() | {
        "array": _array(range(tasks), at_once),
        "output": str(launch.root / layout.LOGS / "%x-%A_%a.log"),
        "job-name": options.job_name or f"prep-{out.name}",
    }
    text = script.fill(script.template("prep"), directives, lines)
    if dry_run:
        return text
    check_slurm(options, 1)
    check_idle(launch.root)
    with launch.written(text, {}):
        number = launch.submit()
    logs = f"logs: {launch.root / layout.LOGS}    stop it with: scancel {number}"
    return f"job {number}: {tasks} tasks, {launch.script}\n{logs}\n"


def _array(numbers: Sequence[int], at_once: int | None) -> str:
    """``[0, 1, 2, 5], 2 -> "0-2,5%2"``"""
    limit = f"%{at_once}" if at_once else ""
    return spans(numbers).replace(" ", "") + limit
