"""`bd3 launch`: fill a batch script in, keep what it runs in the run folder, and submit it."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

import yaml
from pydantic import Field

from bd3_megatron.config import ConfigError
from data_prep.manifest import load_manifest
from data_prep.plan import PrepConfig
from data_prep.remote import is_remote
from pretrain import events
from pretrain.attempt import newest_step
from pretrain.config import RunConfig, check_batches, check_run
from pretrain.load import RunOptions, resolve, save_config
from pretrain.options import did_you_mean, leaves, parse_options, scan_options, show
from pretrain.prepare import PrepOptions
from pretrain.verdict import spans
from slurm import client, script
from slurm.options import JobOptions, seconds_of

FOLDER = "launch"
CHAIN = "BD3_CHAIN"
_ROOMS = ("bd3_megatron", "pretrain", "data_prep", "slurm")
# Variables that change how a job computes or talks, kept for whoever wonders later.
_TELLING = ("CUDA_", "NCCL_", "UCX_", "FI_", "OMP_", "MKL_", "NVTE_", "TORCH", "PYTHON", "MASTER_", "SLURM_", "BD3_")
_TELLING += ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "LOADEDMODULES")


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
    kinds[args[0]](args[1:])
    return 0


def pretrain(args: list[str]) -> None:
    """`bd3 launch pretrain`."""
    config, options = resolve(PretrainJob, _with_site(PretrainJob, args), "bd3 launch pretrain")
    run = Path(config.run).absolute()
    if not options.dry_run:
        _check_slurm(options)
    fitting = _check(config, options)
    name = "single_node" if options.nodes == "1" else "multi_node"
    launch = _Launch(run, options)
    steps = ["--steps", config.train.steps, "--restarts", options.restarts]
    fits = ["--fits", *fitting] if len(options.node_counts) > 1 else []
    lines = [
        f"RUN={_quote(run)}",
        f'BD3=(bd3 pretrain --config {_quote(launch.folder / "config.yaml")} --run "$RUN")',
        f"TASKS={options.ranks}",
        f"ATTEMPT=({_quote(*steps, *fits)})",
        *launch.environment(),
    ]
    directives = options.directives() | {"output": run / "logs" / "%x-%j.log"}
    directives["job-name"] = options.job_name or run.name
    text = script.fill(script.template(name), directives, lines)
    config = config.model_copy(update={"run": str(run)})
    if options.dry_run:
        print(text, end="")
        return
    _check_idle(run)
    with launch.written(text, {"config.yaml": config}):
        previous: list[int] = []
        for link in range(1, options.chain + 1):
            after = [f"--dependency=afterany:{previous[-1]}"] if previous else []
            export = [f"--export=ALL,{CHAIN}={launch.name} {link} {options.chain}"] if options.chain > 1 else []
            try:
                previous.append(client.submit(launch.script, *after, *export))
            except client.SlurmError:
                for number in previous:
                    client.call("scancel", str(number))
                raise
        launch.submitted(previous)
    size = f"{options.nodes} node(s) x {options.ranks} task(s)"
    jobs = " ".join(map(str, previous))
    print(f"job {jobs.replace(' ', ', ')}: {size}, {launch.script}")
    print(f"follow it with: bd3 status {config.run}    stop it with: scancel {jobs}")


def sweep(args: list[str]) -> None:
    """`bd3 launch sweep`."""
    args = _with_site(SweepJob, args)
    config, options = resolve(SweepJob, args, "bd3 launch sweep")
    folder = Path(config.run).absolute()
    if not options.dry_run:
        _check_slurm(options)
    runs: dict[Path, RunConfig] = {}
    for words, name in _combinations(options.grid):
        run = folder / name
        runs[run] = resolve(SweepJob, [*args, *words, f"--run={run}"], "bd3 launch sweep")[0]
        _check(runs[run], options)
    left = [number for number, (run, found) in enumerate(runs.items()) if newest_step(run) < found.train.steps]
    launch = _Launch(folder, options)
    lines = [
        f"RUNS={_quote(launch.folder / 'runs.txt')}",
        f"TASKS={options.ranks}",
        f"ATTEMPT=({_quote('--restarts', options.restarts)})",
        *launch.environment(),
    ]
    directives = options.directives() | {
        "array": _array(left, options.at_once),
        "output": folder / "logs" / "%x-%A_%a.log",
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
    with launch.written(text, {"runs.txt": "".join(f"{run}\n" for run in runs)}):
        for number in left:
            run = list(runs)[number]
            run.mkdir(parents=True, exist_ok=True)
            save_config(runs[run], run / "sweep.yaml")
        number = client.submit(launch.script)
        launch.submitted([number])
    at_once = f", {options.at_once} at a time" if options.at_once else ""
    print(f"job {number}: {len(left)} of {len(runs)} runs{at_once}, {launch.script}")
    print(f"follow it with: bd3 status {folder}    stop it with: scancel {number}")


def prep(args: list[str]) -> None:
    """`bd3 launch prep`."""
    options = parse_options(PrepJob, _with_site(PrepJob, args), "bd3 launch prep")
    fields = set(PrepConfig.model_fields)
    config = PrepConfig(**options.model_dump(include=fields))
    if options.part is not None:
        raise ConfigError(f"--part={options.part}: set by the array; give --tasks, the number of shares")
    out = Path(options.out).absolute()
    if os.path.lexists(out) and not options.overwrite and not options.dry_run:
        from data_prep.prep import prep as check

        check(config, print)  # says that it is there, or what it differs in
        return
    launch = _Launch(out.with_name(out.name + ".launch"), options)
    words = _prep_words(args)
    lines = [
        f"SHARES={options.tasks}",
        f"PREP=(bd3 prep {_quote(*words)})",
        f"cd {_quote(os.getcwd())}",
        *[line for line in launch.environment() if not line.startswith("CONTAINER=")],
    ]
    directives = options.task_directives() | {
        "array": _array(range(options.tasks), options.at_once),
        "output": launch.root / "logs" / "%x-%A_%a.log",
        "job-name": options.job_name or f"prep-{out.name}",
    }
    text = script.fill(script.template("prep"), directives, lines)
    if options.dry_run:
        print(text, end="")
        return
    _check_slurm(options)
    _check_idle(launch.root)
    with launch.written(text, {}):
        number = client.submit(launch.script)
        launch.submitted([number])
    print(f"job {number}: {options.tasks} tasks, {launch.script}")
    print(f"logs: {launch.root / 'logs'}    stop it with: scancel {number}")


class _Launch:
    """The folder ``<root>/launch/<number>``: code, configuration, environment and script of what was submitted."""

    def __init__(self, root: Path, options: SubmitOptions):
        self.root, self.options = root, options
        taken = [int(path.name) for path in (root / FOLDER).glob("[0-9]*") if path.name.isdecimal()]
        self.name = f"{max(taken, default=-1) + 1:03d}"
        self.folder = root / FOLDER / self.name
        self.script = self.folder / "job.sbatch"

    def environment(self) -> list[str]:
        """Lines of the shell: what the site needs, then this interpreter and the copy of the code."""
        options = self.options
        binaries = os.path.dirname(sys.executable)
        if not os.access(os.path.join(binaries, "bd3"), os.X_OK):
            raise ConfigError(f"{binaries}/bd3: not there; install the project for {sys.executable}: pip install -e .")
        container = [f"--{word.lstrip('-')}" for word in options.srun]
        threads = [] if "OMP_NUM_THREADS" in options.env else ["export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}"]
        return [
            f"CONTAINER=({_quote(*container)})",
            *options.setup,
            *(f"export {name}={_quote(value)}" for name, value in options.env.items()),
            *threads,
            f"export PATH={_quote(binaries)}:$PATH",
            f"export PYTHONPATH={_quote(self.folder / 'code')}${{PYTHONPATH:+:$PYTHONPATH}}",
        ]

    @contextlib.contextmanager
    def written(self, text: str, files: Mapping[str, RunConfig | str]) -> Iterator[None]:
        """Write the folder; what was written goes again if the context fails."""
        made = [path for path in (self.root, *self.root.parents) if not path.exists()]
        try:
            for folder in (self.folder, self.root / "logs"):
                folder.mkdir(parents=True, exist_ok=True)
            for room in _ROOMS:
                source = Path(importlib.util.find_spec(room).origin).parent
                shutil.copytree(source, self.folder / "code" / room, ignore=shutil.ignore_patterns("__pycache__"))
            for name, content in files.items():
                if isinstance(content, str):
                    (self.folder / name).write_text(content)
                else:
                    save_config(content, self.folder / name)
            (self.folder / "environment.txt").write_text(_environment_text())
            self.script.write_text(text)
            yield
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in (self.folder.parent, self.root / "logs", *made):
                with contextlib.suppress(OSError):
                    folder.rmdir()  # if it is empty
            raise

    def submitted(self, jobs: Sequence[int]) -> None:
        events.record(self.root, "launched", jobs=list(map(str, jobs)), launch=self.name)


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
    if options.partition is not None and options.partition not in there:
        raise ConfigError(f"partition={options.partition}: there is none of this name; use {', '.join(there)}")
    if name is None:
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


def _with_site(cls: type[SubmitOptions], args: list[str]) -> list[str]:
    """The arguments after those that the site's file stands for, so that they win."""
    if {"-h", "--help"} & set(args):
        return args
    given = scan_options(cls, args)
    path = given.get("site", [os.environ.get("BD3_SITE", "")])[0]
    if not path:
        return args
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"site={path}: no such file; give a YAML file with options of the job") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"site={path}: cannot be read ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"site={path}: not options; write 'partition: gpu' lines")
    first = []
    for key, value in values.items():
        if key not in JobOptions.model_fields:
            raise ConfigError(f"site={path}: {key}: unknown option{did_you_mean(str(key), JobOptions.model_fields)}")
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, dict):
            first += [flag, *(str(word) for pair in value.items() for word in pair)]
        elif isinstance(value, list):
            first += [flag, *map(str, value)]
        elif value is not None:
            first.append(f"{flag}={value}")
    return [*first, *args]


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
        if path in PrepConfig.model_fields and path not in ("part", "workers"):
            words += [f"--{path.replace('_', '-')}", *values]
    return words


def _environment_text() -> str:
    lines = [f"python {platform.python_version()} {sys.executable}", *_git_state(), ""]
    lines += [*sorted(f"{found.name}=={found.version}" for found in distributions() if found.name), ""]
    lines += sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(_TELLING))
    return "\n".join(lines) + "\n"


def _git_state() -> list[str]:
    """Commit of the code and what differs from it, where it lies in a checkout."""
    folder = Path(__file__).parent
    try:
        answers = [
            subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=20, check=True).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--short", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return ["not in a git checkout"]
    return [f"commit {answers[0].strip()}", *(f"changed {line.strip()}" for line in answers[1].splitlines())]


def _quote(*words: object) -> str:
    return " ".join(shlex.quote(str(word)) for word in words)
