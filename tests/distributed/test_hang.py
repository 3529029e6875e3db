"""Jobs of two ranks of which one hangs: they end within the timeout, name it, and go on when started again."""

from __future__ import annotations

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bd3_common.exit_codes import HUNG
from bd3_megatron.engine.megatron import MegatronEngine
from pretrain.trainer.batches import Batches
from tests.distributed import launch
from tests.distributed.launch import Job
from tests.polling import until
from tests.unit.commands import Done

TIMEOUT = 6.0  # seconds
# On a busy machine a healthy step may take longer than that: the case is then played again with more time.
TIMEOUTS = (TIMEOUT, 5 * TIMEOUT, 20 * TIMEOUT)
RECIPE = """
model: {layers: 1, hidden: 32, heads: 4, kv_heads: 2, length: 32}
diffusion: {block_size: 4}
train: {steps: 40, global_batch: 4, micro_batch: 2, precision: fp32, warmup_steps: 2, lr: 0.003, ema_decay: 0}
eval: {every: 0, rows: 8}
checkpoint: {every: 5, keep: 2}
log: {tensorboard: false}
"""
HANGS_AT = 12  # step
TOO_LONG = 1.02  # of the timeout


def slow(hang_at: int = 0, hang: Callable[[], None] = lambda: time.sleep(1000)) -> None:
    """Make steps long enough to be hit by a signal; in step ``hang_at`` the data never come."""
    original = Batches.at

    def at(self: Batches, step: int):
        time.sleep(0.03)
        if step + 1 == hang_at:
            hang()
        return original(self, step)

    Batches.at = at


def wait_for_rank_0() -> None:
    """Wait for a message that rank 0 never sends: it waits for this rank's gradients."""
    dist.recv(torch.empty(1), src=0, tag=77)


def under_slurm(port: int) -> None:
    """Set srun's variables instead of torchrun's: rank 0 serves the store."""
    rank = os.environ.pop("RANK")
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    task = {"JOB_ID": 1, "STEP_ID": 0, "PROCID": rank, "NTASKS": 2, "LOCALID": rank, "STEP_NODELIST": "localhost"}
    os.environ.update({f"SLURM_{name}": str(value) for name, value in task.items()})
    os.environ["MASTER_PORT"] = str(port)
    slow()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Case:
    """A job in which ``rank`` hangs: by SIGSTOP, or in its main thread."""

    rank: int
    stopped: bool
    slurm: bool = False
    mismatch: bool = False

    def before(self) -> dict[int, Callable[[], None]]:
        if self.slurm:
            return dict.fromkeys(range(2), functools.partial(under_slurm, free_port()))
        if self.mismatch:
            return {0: slow, 1: functools.partial(slow, HANGS_AT, wait_for_rank_0)}
        return {
            rank: functools.partial(slow, 0 if self.stopped or rank != self.rank else HANGS_AT) for rank in range(2)
        }


CASES = {
    "rank 1 stopped": Case(1, stopped=True),
    "rank 0 stopped": Case(0, stopped=True),
    "rank 0 stopped, which serves the store": Case(0, stopped=True, slurm=True),
    "rank 1 in its data": Case(1, stopped=False),
    "rank 0 in its data": Case(0, stopped=False),
}
MISMATCH = "rank 1 in another collective"


class Run:
    """A small run of two ranks."""

    def __init__(self, folder: Path, data_set: Path, timeout: float = TIMEOUT):
        folder.mkdir(exist_ok=True)
        self.folder, self.run, self.timeout, config = folder, folder / "run", timeout, folder / "recipe.yaml"
        config.write_text(RECIPE)
        options = ("--parallel.timeout-minutes", timeout / 60)
        self.args = ("pretrain", "--config", config, "--data.path", data_set, "--run", self.run, *options)

    def start(self, *args: object, **options) -> Job:
        return Job([*self.args, *args], 2, self.folder, **options)

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_text().count('"grad_norm"') if path.exists() else 0

    def stack_file(self, rank: int) -> Path:
        return self.run / "hang" / f"rank-{rank:05d}.txt"

    def stack(self, rank: int) -> str:
        return self.stack_file(rank).read_text()


@dataclass
class Ended:
    """A job that has ended."""

    run: Run
    pid: int
    ranks: list[Done]


def play(case: Case, folder: Path, data_set: Path) -> Ended:
    """Let a job hang, and wait for its end."""
    folder.mkdir()
    for timeout in TIMEOUTS:
        run = Run(folder / f"{timeout:.0f}", data_set, timeout)
        job = run.start(before=case.before())
        victim = job.ranks[case.rank]
        until(lambda: run.steps() >= HANGS_AT - 1 or not job.running, timeout=launch.TIMEOUT, every=5e-3)  # noqa: B023
        if case.stopped:
            os.kill(victim.pid, signal.SIGSTOP)
        ended = Ended(run, victim.pid, job.finish())
        # Else a slow step before was taken for a hang, or the time to write stacks was too short.
        if run.steps() >= HANGS_AT - 1 and all(run.stack_file(rank).exists() for rank in range(2)):
            break
    return ended


@pytest.fixture(scope="module")
def ended(tmp_path_factory, data_set) -> dict[str, Ended]:
    """All cases at the same time, because they mostly wait."""
    folder = tmp_path_factory.mktemp("hang")
    cases = CASES | {MISMATCH: Case(1, stopped=False, mismatch=True)}
    folders = [folder / str(number) for number in range(len(cases))]
    with ThreadPoolExecutor(len(cases)) as pool:
        return dict(zip(cases, pool.map(play, cases.values(), folders, [data_set] * len(cases))))


@pytest.mark.parametrize("name", CASES)
def test_a_job_with_a_hung_rank_ends_in_time_and_names_it(ended, name):
    case, found = CASES[name], ended[name]
    other = found.ranks[1 - case.rank]
    lines = [line for done in found.ranks for line in done.err.splitlines() if "parallel.timeout_minutes" in line]
    assert len(lines) == 1, [done.err for done in found.ranks]
    assert lines[0] in other.err
    what = "given no sign of life" if case.stopped else "made no progress"
    where = f"the others' stacks are in {found.run.run}/hang"
    if not case.stopped:
        where = f"its stack is in {found.run.run}/hang/rank-0000{case.rank}.txt"
    pattern = (
        f"rank {case.rank} (host {socket.gethostname()}, pid {found.pid}) has {what} for N s in step N "
        f"(parallel.timeout_minutes={found.run.timeout / 60:g}): the job ends; {where}; "
        f"start the job again to go on from its last checkpoint"
    )
    assert re.fullmatch(re.escape(pattern).replace("N", r"\d+"), lines[0]), lines[0]
    assert other.code == HUNG
    assert found.ranks[case.rank].code == (-signal.SIGKILL if case.stopped else HUNG)
    assert not any("Traceback" in done.err for done in found.ranks)


@pytest.mark.parametrize("name", CASES)
def test_the_stacks_of_a_hung_job_are_kept(ended, name):
    case, found = CASES[name], ended[name]
    waiting = found.run.stack(1 - case.rank)
    assert waiting.startswith(f"rank {1 - case.rank} (host {socket.gethostname()}, pid ")
    assert "distributed_c10d.py" in waiting
    hung = found.run.stack(case.rank)
    assert f"rank {case.rank} (host {socket.gethostname()}, pid {found.pid})" in hung
    assert ("State:\tT (stopped)" if case.stopped else "test_hang.py") in hung


def test_ranks_that_wait_for_each_other_are_named_with_their_places(ended):
    found = ended[MISMATCH]
    assert [done.code for done in found.ranks] == [HUNG, HUNG]
    (line,) = [line for done in found.ranks for line in done.err.splitlines() if "parallel.timeout_minutes" in line]
    minutes = found.run.timeout / 60
    place = r"called in \w+ \([a-z0-9_]+/\S+:\d+\)"
    assert re.match(
        rf"all ranks have waited for each other for \d+ s \(parallel.timeout_minutes={minutes:g}\): the job ends: "
        rf"rank 0 in step 12 at \w+, {place}; rank 1 in step 12 at recv, {place}; their stacks are in ",
        line,
    ), line


@pytest.mark.parametrize("name", ["rank 1 stopped", "rank 0 in its data"])
def test_a_job_that_hung_goes_on_from_its_last_checkpoint(ended, name, data_set):
    run = Run(ended[name].run.folder, data_set, timeout=TIMEOUTS[-1])
    for done in run.start("--train.steps", 20).finish():
        assert done.code == 0, done.err
    # Checkpoints are written in the background: the newest may not have been complete.
    assert re.search(r"going on from step (5|10)\n", run.folder.joinpath("rank0.err").read_text())
    assert run.steps() == 20


def slow_but_alive(seconds: float, *calls_to_slow: tuple[type, str]) -> None:
    """The first call of each takes ``seconds`` on rank 0."""
    rank = os.environ["RANK"]
    for owner, name in calls_to_slow:
        original, calls = getattr(owner, name), []

        def late(*args, original=original, calls=calls, **options):
            calls.append(None)
            time.sleep(seconds if rank == "0" and len(calls) == 1 else 0)
            return original(*args, **options)

        setattr(owner, name, late)


def test_what_takes_long_is_not_taken_for_a_hang(tmp_path, data_set):
    for timeout in (5.0, 30.0):  # the second where the machine is so busy that other phases take long, too
        run = Run(tmp_path / f"{timeout:.0f}", data_set, timeout)
        # The first step and a checkpoint; then reading it.
        for steps, slow_calls in [(2, [(Batches, "at"), (MegatronEngine, "state")]), (4, [(MegatronEngine, "state")])]:
            before = dict.fromkeys(range(2), functools.partial(slow_but_alive, TOO_LONG * timeout, *slow_calls))
            ranks = run.start("--train.steps", steps, "--checkpoint.every", 2, before=before).finish()
        if not (run.run / "hang").exists():
            break
    assert [done.code for done in ranks] == [0, 0], [done.err for done in ranks]
    assert run.steps() == 4
    assert not (run.run / "hang").exists()


ONCE = """
import os, sys
from pathlib import Path
from tests.distributed.test_hang import slow
from pretrain.cli import main
slow(12 if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 0)
sys.exit(main())
"""


@pytest.mark.long
def test_torchrun_starts_a_hung_job_again(tmp_path, data_set):
    run = Run(tmp_path, data_set)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    # Without "--" torchrun takes "--run" for one of its own options.
    program = ("--max-restarts", "1", "--monitor-interval", "0.2", "--no-python", "--", sys.executable, "-c", ONCE)
    args = [*torchrun, *program, *map(str, run.args), "--train.steps", "15"]
    job = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
    try:
        _, err = job.communicate(timeout=launch.TIMEOUT)
    except subprocess.TimeoutExpired:
        job.terminate()  # it ends its ranks
        _, err = job.communicate()
    assert job.returncode == 0, err
    assert len(re.findall(r"^rank 1 \(.*made no progress for . s in step 12 ", err, re.MULTILINE)) == 1
    assert re.search(r"going on from step (5|10)\n", err)
    assert run.steps() == 15
