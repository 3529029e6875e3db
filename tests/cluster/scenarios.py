"""Runs and what happens to them, all at the same time, because they wait most of the time."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from pretrain.checkpoint.reader import newest_checkpoint
from tests.cluster.cluster import until
from tests.cluster.product import RECIPE, START, Project, Run

# Each step waits, so that there is time to interrupt it and work for other runs.
SLOW = {"BD3_TEST_STEP_SECONDS": "0.25"}
STEPS, FEWER = 100, 50
LONG = (
    RECIPE.replace("steps: 30", f"steps: {STEPS}")
    .replace("every: 10,", "every: 50,")
    .replace("every: 20,", "every: 80,")
)
SHORT = RECIPE.replace("steps: 30", f"steps: {FEWER}").replace("every: 20,", "every: 0,")
TIMEOUT = 20  # seconds after which a run hangs
END = 2 * START

ONE = ("--nodes", 1, "--tasks-per-node", 1)
TWO = ("--nodes", 2, "--tasks-per-node", 1)
ONE_OR_TWO = ("--nodes", "1-2", "--tasks-per-node", 1)
# Most runs share two nodes; those that lose nodes, or have to give them away, have their own.
SHARED = ("--exclude", "node[3-8]")
GIVEN_AWAY = ("--exclude", "node[1-2,5-8]")
LOST = ("--exclude", "node[1-4,7-8]")
KILLED = ("--exclude", "node[1-6]")


@dataclass
class Outcome:
    """A run, and what Slurm says of its last job."""

    run: Run
    job: dict[str, str]


# ---- interrupted ----


def time_limit(project: Project) -> Outcome:
    run = project.run("limit", *TWO, *SHARED, "--time", 30, "--warn-seconds", 120, recipe=LONG,
                      BD3_TEST_STEP_SECONDS="0.6")  # fmt: skip
    run.reaches(20)
    cluster, job = project.cluster, run.jobs[0]
    # How long it takes to come up is not known beforehand: the limit is set so that the warning is due by now.
    hours, minutes, seconds = map(int, cluster.job(job)["RunTime"].split(":"))
    cluster.scontrol("update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + (seconds > 0) + 1}")
    cluster.wait_for(job, lambda seen: seen["Restarts"] == "1" and seen["JobState"] == "PENDING", END)
    cluster.scontrol("update", f"JobId={job}", "TimeLimit=30")
    return Outcome(run, run.finishes(END))


def requeued(project: Project) -> Outcome:
    run = project.run("requeued", *ONE, *SHARED, recipe=LONG, **SLOW)
    run.reaches(20)
    project.cluster.scontrol("requeue", run.jobs[0])
    return Outcome(run, run.finishes(END))


def preempted(project: Project) -> Outcome:
    run = project.run("preempted", *TWO, *GIVEN_AWAY, "--partition", "low", recipe=LONG, **SLOW)
    run.reaches(20)
    cluster = project.cluster
    taken = cluster.sbatch("-p", "main", "-w", "node[3-4]", "--exclusive", "-o", "/dev/null", script="sleep 3\n")
    cluster.wait_for(taken, "COMPLETED", END)
    return Outcome(run, run.finishes(END))


def cancelled(project: Project) -> Outcome:
    run = project.run("cancelled", *ONE, *SHARED, recipe=LONG, **SLOW)
    run.reaches(20)
    cluster = project.cluster
    cluster.run("scancel", run.jobs[0])
    assert run.ends()["JobState"] == "CANCELLED"
    assert newest_checkpoint(run.path).step >= 20
    run.jobs.append(cluster.sbatch(run.path / "launch" / "000" / "job.sbatch", env=project.environ))
    return Outcome(run, run.finishes(END, job=1))


def chained(project: Project) -> Outcome:
    run = project.run("chained", *ONE, *SHARED, "--chain", 3, recipe=LONG, **SLOW)
    run.reaches(20)
    project.cluster.run("scancel", "--signal=USR1", run.jobs[0])
    run.finishes(job=0)
    run.finishes(END, job=1)
    return Outcome(run, run.finishes(job=2))


# ---- failed ----


def node_lost(project: Project) -> Outcome:
    """One of two nodes loses its power: every process on it is gone at once."""
    run = project.run("lost", *ONE_OR_TWO, *LOST, recipe=SHORT, **SLOW)
    run.reaches(15)
    cluster = project.cluster
    batch = cluster.job(run.jobs[0])["BatchHost"]
    (other,) = {"node5", "node6"} - {batch}
    cluster.power_off(other)
    return Outcome(run, run.finishes(END))


def ranks_killed(project: Project) -> Outcome:
    """The processes of one of two nodes are killed by number, while the node itself goes on."""
    run = project.run("killed", *ONE_OR_TWO, *KILLED, recipe=SHORT, **SLOW)
    run.reaches(15)
    for pid in run.pids("node8"):
        os.kill(pid, signal.SIGKILL)
    return Outcome(run, run.finishes(END))


def rank_stopped(project: Project) -> Outcome:
    """A rank is stopped, as one is that waits for a dead disk."""
    where = ("--sbatch", "nodelist=node[1-2]")
    run = project.run("stopped", *TWO, *where, "--parallel.timeout-minutes", TIMEOUT / 60, recipe=SHORT, **SLOW)
    run.reaches(15)
    (victim,) = run.pids("node2")
    os.kill(victim, signal.SIGSTOP)
    until(lambda: run.events("hang"), START, lambda: f"the hang is found; {run.story()}")
    return Outcome(run, run.finishes(END))


def batches_of_nan(project: Project) -> Outcome:
    """Two of three batches that may be skipped."""
    plan = {"BD3_TEST_NAN_STEPS": "4,9"}
    run = project.run("skipped", *ONE, *SHARED, **plan)
    return Outcome(run, run.finishes(END))


def too_many_batches_of_nan(project: Project) -> Outcome:
    plan = {"BD3_TEST_NAN_STEPS": "4,9,11"}
    run = project.run("aborted", *ONE, *SHARED, **plan)
    return Outcome(run, run.ends(END))


INTERRUPTED = (time_limit, requeued, preempted, cancelled, chained)
FAILED = (node_lost, ranks_killed, rank_stopped, batches_of_nan, too_many_batches_of_nan)
