"""Runs on a real cluster whose nodes, ranks or batches fail: they end as they should, by themselves."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from pretrain.metrics import read_metrics, series
from tests.cluster.cluster import until
from tests.cluster.product import RECIPE, START, Project, Run

SLOW = {"BD3_TEST_STEP_SECONDS": "0.25"}
LONG = RECIPE.replace("steps: 30", "steps: 80").replace("every: 20,", "every: 0,")
TIMEOUT = 12  # seconds after which a run hangs


@dataclass
class Outcome:
    run: Run
    job: dict[str, str]


def node_lost(project: Project) -> Outcome:
    """One of two nodes loses its power: every process on it is gone at once."""
    run = project.run("lost", "--nodes", "1-2", "--tasks-per-node", 1, "--exclude", "node[3-4]", recipe=LONG, **SLOW)
    run.reaches(15)
    cluster = project.cluster
    batch = cluster.job(run.jobs[0])["BatchHost"]
    (other,) = {"node1", "node2"} - {batch}
    cluster.power_off(other)
    return Outcome(run, run.finishes(3 * START))


def ranks_killed(project: Project) -> Outcome:
    """The processes of one of two nodes are killed by number, while the node itself goes on."""
    run = project.run("killed", "--nodes", "1-2", "--tasks-per-node", 1, "--exclude", "node[1-2]", recipe=LONG, **SLOW)
    run.reaches(15)
    for pid in run.pids("node4"):
        os.kill(pid, signal.SIGKILL)
    return Outcome(run, run.finishes(3 * START))


def rank_stopped(project: Project) -> Outcome:
    """A rank is stopped, as one is that waits for a dead disk."""
    where = ("--nodes", 2, "--tasks-per-node", 1, "--sbatch", "nodelist=node[3-4]")
    run = project.run("stopped", *where, "--parallel.timeout-minutes", TIMEOUT / 60, recipe=LONG, **SLOW)
    run.reaches(15)
    (victim,) = run.pids("node4")
    os.kill(victim, signal.SIGSTOP)
    until(lambda: run.events("hang"), TIMEOUT + 5, lambda: f"the hang is found; {run.story()}")
    return Outcome(run, run.finishes(3 * START))


def batches_of_nan(project: Project) -> Outcome:
    """Two of three batches that may be skipped."""
    plan = {"BD3_TEST_NAN_STEPS": "4,9"}
    run = project.run("skipped", "--nodes", 1, "--tasks-per-node", 1, **plan)
    return Outcome(run, run.finishes(3 * START))


def too_many_batches_of_nan(project: Project) -> Outcome:
    plan = {"BD3_TEST_NAN_STEPS": "4,9,11"}
    run = project.run("aborted", "--nodes", 1, "--tasks-per-node", 1, **plan)
    return Outcome(run, run.ends(3 * START))


FIRST = (node_lost, ranks_killed)  # each has its two nodes for itself
SECOND = (rank_stopped, batches_of_nan, too_many_batches_of_nan)


@pytest.fixture(scope="module")
def expected(project) -> Run:
    """Of one process that nothing happens to."""
    return project.torchrun("alone", 1, recipe=LONG)


@pytest.fixture(scope="module")
def outcomes(project) -> dict[str, Outcome]:
    """Half of them at a time, on nodes of their own."""
    found = {}
    for half in (FIRST, SECOND):
        with ThreadPoolExecutor(len(half)) as pool:
            found |= {f.__name__: pool.submit(f, project) for f in half}
        project.cluster.tidy()
    return {name: future.result() for name, future in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["node_lost", "ranks_killed"])
def test_a_run_that_loses_a_node_goes_on_with_fewer_ranks_over_the_same_rows(outcomes, expected, name):
    run = outcomes[name].run
    assert outcomes[name].job["Restarts"] == "1"
    assert outcomes[name].job["NumNodes"] == "1"
    first, second = run.events("started")
    assert [event["ranks"] for event in (first, second)] == [2, 1]
    assert second["step"] >= 10
    # The same rows with the same noise give the same losses; their order in the sum is another.
    steps, losses = series(read_metrics(run.path), "train", "loss")
    assert steps == list(range(1, 81))
    assert losses == pytest.approx(series(read_metrics(expected.path), "train", "loss")[1], rel=1e-5)
    (ended, done) = run.events("ended")
    assert (ended["kind"], done["kind"]) == ("failed", "done")
    (bad,) = {"node1", "node2"} - set(run.events("attempt")[1]["nodes"]) if name == "node_lost" else {"node4"}
    assert ended["suspects"] == [bad]
    assert bad in ended["cause"]


def test_a_node_whose_ranks_were_killed_is_excluded(outcomes):
    assert outcomes["ranks_killed"].job["ExcNodeList"] == "node1,node2,node4"
    assert outcomes["ranks_killed"].run.events("attempt")[1]["nodes"] == ["node3"]


@pytest.mark.slow
def test_a_stopped_rank_is_found_and_the_job_started_again(outcomes, expected):
    found = outcomes["rank_stopped"]
    run = found.run
    assert found.job["Restarts"] == "1"
    (hang,) = run.events("hang")
    assert hang["hosts"] == ["node4"]
    assert "given no sign of life" in hang["text"]
    last = read_metrics(run.path)
    assert series(last, "train", "loss")[1] == pytest.approx(
        series(read_metrics(expected.path), "train", "loss")[1], rel=1e-5
    )
    stacks = {path.name: path.read_text() for path in (run.path / "hang").iterdir()}
    assert set(stacks) == {"rank-00000.txt"}  # a stopped process cannot tell its own
    assert "distributed_c10d.py" in stacks["rank-00000.txt"]
    assert "not excluded, although to blame: the job asks for it by name" in run.log()


@pytest.mark.slow
def test_batches_of_nan_are_skipped_and_named(outcomes):
    run = outcomes["batches_of_nan"].run
    records = [record for record in read_metrics(run.path) if record["split"] == "train"]
    assert [record["step"] for record in records if record.get("skipped")] == [5, 10]
    names = sorted(path.name for path in (run.path / "skipped").iterdir())
    assert names == ["step-00000005.json", "step-00000010.json"]
    assert "step 5" in run.ranks()


def test_too_many_batches_of_nan_end_the_run_for_good(outcomes):
    found = outcomes["too_many_batches_of_nan"]
    assert (found.job["JobState"], found.job["Restarts"], found.job["ExitCode"]) == ("FAILED", "0", "2:0")
    (ended,) = found.run.events("ended")
    assert ended["kind"] == "mistake"
    assert "guard.nonfinite=3" in ended["cause"]
    assert "not started again, because it would end the same way" in found.run.log()
    assert "Traceback" not in found.run.ranks()
