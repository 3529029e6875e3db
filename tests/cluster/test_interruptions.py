"""Runs on a real cluster that are interrupted in every way that Slurm knows: they end as if they had not been."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from pretrain import checkpoint
from tests.cluster.product import RECIPE, START, Project, Run

# Each step waits, so that there is time to interrupt it and work for other runs.
SLOW = {"BD3_TEST_STEP_SECONDS": "0.25"}
LONG = RECIPE.replace("steps: 30", "steps: 160").replace("every: 10,", "every: 50,").replace("every: 20,", "every: 80,")
TWO = ("--nodes", 2, "--tasks-per-node", 1)
HERE = (*TWO, "--exclude", "node[3-4]")
THERE = (*TWO, "--exclude", "node[1-2]")  # where another job will want the nodes for itself


@dataclass
class Outcome:
    run: Run
    job: dict[str, str]


def time_limit(project: Project) -> Outcome:
    # The warning comes in the second half minute; a slow machine would need more starts than one to be done by then.
    run = project.run("limit", *HERE, "--time", 2, "--warn-seconds", 90, recipe=LONG, **SLOW)
    cluster = project.cluster
    cluster.wait_for(run.jobs[0], lambda seen: seen["Restarts"] == "1" and seen["JobState"] == "PENDING", 2 * START)
    cluster.scontrol("update", f"JobId={run.jobs[0]}", "TimeLimit=10")
    return Outcome(run, run.finishes(3 * START))


def requeued(project: Project) -> Outcome:
    run = project.run("requeued", *HERE, recipe=LONG, **SLOW)
    run.reaches(20)
    project.cluster.scontrol("requeue", run.jobs[0])
    return Outcome(run, run.finishes(3 * START))


def preempted(project: Project) -> Outcome:
    run = project.run("preempted", *THERE, "--partition", "low", recipe=LONG, **SLOW)
    run.reaches(20)
    cluster = project.cluster
    taken = cluster.sbatch("-p", "main", "-w", "node[3-4]", "--exclusive", "-o", "/dev/null", script="sleep 3\n")
    cluster.wait_for(taken, "COMPLETED", START)
    return Outcome(run, run.finishes(3 * START))


def cancelled(project: Project) -> Outcome:
    run = project.run("cancelled", *HERE, recipe=LONG, **SLOW)
    run.reaches(20)
    cluster = project.cluster
    cluster.run("scancel", run.jobs[0])
    assert run.ends()["JobState"] == "CANCELLED"
    assert checkpoint.newest(run.path).step >= 20
    run.jobs.append(cluster.sbatch(run.path / "launch" / "000" / "job.sbatch", env=project.environ))
    return Outcome(run, run.finishes(3 * START, job=1))


def chained(project: Project) -> Outcome:
    run = project.run("chained", *HERE, "--chain", 3, recipe=LONG, **SLOW)
    run.reaches(20)
    project.cluster.run("scancel", "--signal=USR1", run.jobs[0])
    run.finishes(job=0)
    run.finishes(3 * START, job=1)
    return Outcome(run, run.finishes(job=2))


SCENARIOS = {f.__name__: f for f in (time_limit, requeued, preempted, cancelled, chained)}


@pytest.fixture(scope="module")
def uninterrupted(project) -> Run:
    return project.torchrun("uninterrupted", 2, recipe=LONG)


@pytest.fixture(scope="module")
def outcomes(project) -> dict[str, Outcome]:
    """All at the same time: what they do most of is to wait."""
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        started = {name: pool.submit(scenario, project) for name, scenario in SCENARIOS.items()}
    return {name: future.result() for name, future in started.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_interrupted_run_is_bitwise_the_uninterrupted_one(outcomes, uninterrupted, name):
    run = outcomes[name].run
    assert run.metrics == uninterrupted.metrics, run.story()
    ours, theirs = run.weights(), uninterrupted.weights()
    assert all(torch.equal(x, theirs[key]) for key, x in ours.items())
    (stopped,) = run.events("stopped")
    assert 0 < stopped["step"] < 160
    assert stopped["signal"].split()[0] == ("SIGUSR1" if name in ("time_limit", "chained") else "SIGTERM")
    assert [event["step"] for event in run.events("started")] == [0, stopped["step"]]
    assert [event["kind"] for event in run.events("ended")] == ["asked", "done"]


def test_slurm_counts_the_restarts_of_what_was_put_back(outcomes):
    restarts = {name: int(outcome.job["Restarts"]) for name, outcome in outcomes.items()}
    assert restarts == {"time_limit": 1, "requeued": 1, "preempted": 1, "cancelled": 0, "chained": 0}
    run = outcomes["time_limit"].run
    assert f"job {run.jobs[0]} goes back into the queue" in run.log()


def test_the_rest_of_a_chain_has_nothing_to_do(outcomes):
    log = outcomes["chained"].run.log()
    assert "the next job of the chain goes on" in log
    assert "already at step 160: nothing to do" in log


def test_status_tells_what_happened(outcomes, project):
    out = project.bd3("status", outcomes["time_limit"].run.path).stdout
    assert "state       finished" in out
    assert "160 of 160" in out
    assert "SIGUSR1 (the time limit is near): stopped at step" in out
    assert f"job {outcomes['time_limit'].run.jobs[0]}" in out
    assert "1 restart(s)" in out
