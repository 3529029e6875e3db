"""`bd3 launch`: fill a batch script in, keep what it runs in the run folder, and submit it."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from bd3_common.errors import ConfigError
from data_prep.build.plan import PrepConfig
from data_prep.format.manifest import load_manifest
from data_prep.format.remote import is_remote
from pretrain.commands.prep import PrepOptions
from pretrain.config.command_line import parse_options, scan_options
from pretrain.config.resolve import RunOptions, resolve
from pretrain.config.schema import RunConfig, check_batches, check_run
from pretrain.config.site import site_layer
from pretrain.config.values import Layer, did_you_mean, leaves, show
from pretrain.resilience.hang_detection import spans
from pretrain.resilience.supervisor import finished
from pretrain.run_folder import events, layout
from pretrain.run_folder.launch_snapshot import LaunchFolder, quote
from slurm import client, script
from slurm.options import JobOptions, seconds_of

CHAIN = "BD3_CHAIN"


class SubmitOptions(JobOptions):
    """What all jobs have."""

    site: str | None = Field(
        None, description="YAML file with any of the job's options for this cluster; null: $BD3_SITE, if set"
    )
    dry_run: bool = Field(False, description="print the script; write and submit nothing")


class PretrainJob(RunOptions, SubmitOptions):
    """Submit a training run to Slurm. All options of bd3 pretrain, and those of the job."""

    chain: int = Field(
        1, ge=1, description="jobs that go on one after another, for sites where a job may not be requeued at its limit"
    )


class SweepJob(RunOptions, SubmitOptions):
    """Submit a run for every combination of values as a job array. All options of bd3 pretrain, and those of the job.

    The run folders lie in the folder --run; those that are finished are not submitted again.
    """

    grid: dict[str, str] = Field(
        {}, description="keys of the configuration with their values: train.lr 1e-3,3e-3 train.seed 0,1,2"
    )
    at_once: int | None = Field(None, ge=1, description="runs at a time; null: as many as Slurm starts")


class PrepJob(PrepOptions, SubmitOptions):
    """Submit the preparation of a data set as a job array. All options of bd3 prep, and those of the job."""

    dry_run: bool = SubmitOptions.model_fields["dry_run"]  # not that of bd3 prep, which estimates
    tasks: int = Field(8, ge=1, description="shares of the input, each a task of the array")
    at_once: int | None = Field(None, ge=1, description="tasks at a time; null: as many as Slurm starts")


def main(args: list[str]) -> int:
    """`bd3 launch pretrain | sweep | prep`.

    Raises:
        ConfigError, SlurmError, OSError: one line; nothing was submitted, and nothing half-written is left.
    """
    kinds: dict[str, Callable[[list[str]], None]] = {"pretrain": pretrain, "sweep": sweep, "prep": prep}
    if not args or args[0] in ("-h", "--help"):
        print("usage: bd3 launch pretrain | sweep | prep [OPTIONS]\n")
        for name, cls in zip(kinds, (PretrainJob, SweepJob, PrepJob)):
            print(f"  {name:<9} {cls.__doc__.splitlines()[0]}")
        print("\nbd3 launch pretrain --help lists the options; docs/slurm.md has the way from an empty account.")
        return 0 if args else 2
    if args[0] not in kinds:
        raise ConfigError(f"launch {show(args[0])}: unknown kind of job; use {', '.join(kinds)}")
    os.environ.pop(CHAIN, None)  # of the job that this is called in, if any
    kinds[args[0]](args[1:])
    return 0


def pretrain(args: list[str]) -> None:
    """`bd3 launch pretrain`."""
    config, options = resolve(PretrainJob, args, "bd3 launch pretrain", _site)
    run = Path(config.run).absolute()
    if not options.dry_run:
        _check_slurm(options)
    fitting = _check(config, options)
    name = "single_node" if options.nodes == "1" else "multi_node"
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
    directives = options.directives() | {"output": run / layout.LOGS / "%x-%j.log"}
    directives["job-name"] = options.job_name or run.name
    text = script.fill(script.template(name), directives, lines)
    config = config.model_copy(update={"run": str(run)})
    if options.dry_run:
        print(text, end="")
        return
    _check_idle(run)
    with launch.written(text, {layout.CONFIG: config}):
        for link in range(1, options.chain + 1):
            after = [f"--dependency=afterany:{launch.jobs[-1]}"] if launch.jobs else []
            export = [f"--export=ALL,{CHAIN}={launch.name} {link} {options.chain}"] if options.chain > 1 else []
            launch.submit(*after, *export)
    size = f"{options.nodes} node(s) x {options.ranks} task(s)"
    jobs = " ".join(map(str, launch.jobs))
    print(f"job {jobs.replace(' ', ', ')}: {size}, {launch.script}")
    print(f"follow it with: bd3 status {quote(run)}    stop it with: scancel {jobs}")


def sweep(args: list[str]) -> None:
    """`bd3 launch sweep`."""
    config, options = resolve(SweepJob, args, "bd3 launch sweep", _site)
    folder = Path(config.run).absolute()
    if not options.dry_run:
        _check_slurm(options)
    runs: dict[Path, RunConfig] = {}
    for words, name in _combinations(options.grid):
        run = folder / name
        if run in runs:
            raise ConfigError(f"grid: two combinations would train in {run}; submit one of them in a folder of its own")
        runs[run] = resolve(SweepJob, [*args, *words, f"--run={run}"], "bd3 launch sweep", _site)[0]
        _check(runs[run], options)
    left = [number for number, (run, found) in enumerate(runs.items()) if not finished(run, found.train.steps)]
    launch = LaunchFolder(folder, options)
    lines = [
        f"RUNS={quote(launch.folder / layout.LAUNCH_RUNS)}",
        f"TASKS={options.ranks}",
        f"ATTEMPT=({quote('--restarts', options.restarts)})",
        *launch.environment(),
    ]
    directives = options.directives() | {
        "array": _array(left, options.at_once),
        "output": folder / layout.LOGS / "%x-%A_%a.log",
        "job-name": options.job_name or folder.name,
    }
    text = script.fill(script.template("sweep"), directives, lines)
    if not left:
        print(f"{folder}: all {len(runs)} runs are done; nothing to submit")
        return
    if options.dry_run:
        print(text, end="")
        return
    _check_idle(folder)
    configs = {str(run / "sweep.yaml"): runs[run] for number, run in enumerate(runs) if number in left}
    with launch.written(text, {layout.LAUNCH_RUNS: "".join(f"{run}\n" for run in runs)} | configs):
        number = launch.submit()
    at_once = f", {options.at_once} at a time" if options.at_once else ""
    print(f"job {number}: {len(left)} of {len(runs)} runs{at_once}, {launch.script}")
    print(f"follow it with: bd3 status {quote(folder)}    stop it with: scancel {number}")


def prep(args: list[str]) -> None:
    """`bd3 launch prep`."""
    options = parse_options(PrepJob, args, "bd3 launch prep", _site)
    fields = set(PrepConfig.model_fields)
    config = PrepConfig(**options.model_dump(include=fields))
    if options.part is not None:
        raise ConfigError(f"--part={options.part}: set by the array; give --tasks, the number of shares")
    if options.workers is not None:
        raise ConfigError(f"--workers={options.workers}: one for each core of a task; give --cpus-per-task")
    out = Path(options.out).absolute()
    if options.overwrite:
        raise ConfigError(f"overwrite=true: each task of the array would begin anew; remove {out} first")
    if os.path.lexists(out) and not options.dry_run:
        from data_prep.build.prep import prep as check

        check(config, print)  # says that it is there, or what it differs in
        return
    launch = LaunchFolder(out.with_name(out.name + ".launch"), options)
    words = _prep_words(args)
    lines = [
        f"SHARES={options.tasks}",
        f"PREP=(bd3 prep {quote(*words)})",
        f"cd {quote(os.getcwd())}",
        *[line for line in launch.environment() if not line.startswith("CONTAINER=")],
    ]
    directives = options.task_directives() | {
        "array": _array(range(options.tasks), options.at_once),
        "output": launch.root / layout.LOGS / "%x-%A_%a.log",
        "job-name": options.job_name or f"prep-{out.name}",
    }
    text = script.fill(script.template("prep"), directives, lines)
    if options.dry_run:
        print(text, end="")
        return
    _check_slurm(options)
    _check_idle(launch.root)
    with launch.written(text, {}):
        number = launch.submit()
    print(f"job {number}: {options.tasks} tasks, {launch.script}")
    print(f"logs: {launch.root / layout.LOGS}    stop it with: scancel {number}")


def _check(config: RunConfig, options: SubmitOptions) -> list[int]:
    """Check the run on every number of nodes that it may get; the numbers that its layout fits.

    Raises:
        ConfigError: the least does not fit, or there are no data.
    """
    weights = config.data.weights()
    if not weights:
        raise ConfigError("data.path: not set; give the folder that bd3 prep wrote with --data.path")
    for path in weights:
        if not is_remote(path):
            load_manifest(Path(path))
    fitting = []
    for nodes in options.node_counts:
        try:
            check_batches(config.train, config.parallel, check_run(config, nodes * options.ranks))
        except ConfigError as error:
            if not fitting:
                raise ConfigError(f"{error} ({nodes} node(s) x {options.ranks} task(s))") from None
            continue
        fitting.append(nodes)
    return fitting


def _check_slurm(options: SubmitOptions) -> None:
    """Refuse what Slurm would refuse, or would let wait for ever, in words that say what there is.

    Raises:
        ConfigError, SlurmError: one line.
    """
    if shutil.which("sbatch") is None:
        client.call("sbatch")  # says what to do
    there = client.partitions()
    name = options.partition or next((p for p, found in there.items() if found.get("Default") == "YES"), None)
    for part in options.partition.split(",") if options.partition is not None else ():
        if part not in there:
            raise ConfigError(f"partition={part}: there is none of this name; use {', '.join(there)}")
    if name not in there:  # no default, or several to choose from
        return
    limits = there[name]
    least = options.node_counts[0] if isinstance(options, PretrainJob | SweepJob) else 1
    total, most = (
        int(limits.get(key, "")) if limits.get(key, "").isdecimal() else None for key in ("TotalNodes", "MaxNodes")
    )
    if total is not None and least > total:
        raise ConfigError(f"nodes={options.nodes}: partition {name} has {total} node(s); use at most {total}")
    if most is not None and least > most:
        raise ConfigError(f"nodes={options.nodes}: partition {name} gives a job {most} node(s) at most; use {most}")
    longest = limits.get("MaxTime", "")
    if options.time and longest[:1].isdecimal() and seconds_of(options.time) > seconds_of(longest):
        raise ConfigError(f"time={options.time}: the limit of partition {name} is {longest}; use that or less")


def _check_idle(root: Path) -> None:
    """Refuse a second job in a folder that one works in or waits for."""
    for number in {job for event in events.read(root) if event["event"] == "launched" for job in event["jobs"]}:
        for found in client.tasks(number):
            if found.get("JobState", "").split()[0] in client.ACTIVE:
                raise ConfigError(
                    f"{root}: job {number} is {found['JobState']} in it; wait for it, or end it with: scancel {number}"
                )


def _site(flags: Mapping[str, Any]) -> list[Layer]:
    """The options of the site's file, which flags win over."""
    path = flags.get("site") or os.environ.get("BD3_SITE")
    return [site_layer(path, JobOptions)] if path else []


def _combinations(grid: Mapping[str, str]) -> Iterator[tuple[list[str], str]]:
    """Flags and a folder's name for every combination of values.

    Raises:
        ConfigError: an empty grid, an unknown key, or one value twice.
    """
    if not grid:
        raise ConfigError("grid: empty; give keys with their values: --grid train.lr 1e-3,3e-3 train.seed 0,1,2")
    known = leaves(RunConfig)
    choices = []
    for key, text in grid.items():
        path = key.replace("-", "_")
        if path not in known or path == "run":
            raise ConfigError(f"grid={key}: no key of the configuration{did_you_mean(path, known)}")
        values = [value for value in text.split(",") if value]
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"grid={key} {text}: give different values with commas between them")
        choices.append([(path, value) for value in values])
    tails = [key.rpartition(".")[2] for key in grid]
    for pairs in itertools.product(*choices):
        names = [tail if tails.count(tail) == 1 else path for tail, (path, _) in zip(tails, pairs)]
        name = ",".join(f"{name}={value}" for name, (_, value) in zip(names, pairs))
        yield [f"--{path}={value}" for path, value in pairs], name.replace("/", "_").replace(" ", "_")


def _array(numbers: Sequence[int], at_once: int | None) -> str:
    """``[0, 1, 2, 5], 2 -> "0-2,5%2"``"""
    limit = f"%{at_once}" if at_once else ""
    return spans(numbers).replace(" ", "") + limit


def _prep_words(args: list[str]) -> list[str]:
    """The words of a command line of bd3 launch prep that are for bd3 prep."""
    given = scan_options(PrepJob, args)
    words = given.pop("inputs")
    for path, values in given.items():
        if path in PrepConfig.model_fields and path not in ("part", "workers", "overwrite"):
            words += [f"--{path.replace('_', '-')}", *values]
    return words
