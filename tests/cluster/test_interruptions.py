"""Runs on a real cluster that are interrupted in every way that Slurm knows: they end as if they had not been."""

from __future__ import annotations

import pytest
import torch

from tests.cluster.scenarios import INTERRUPTED, STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", [scenario.__name__ for scenario in INTERRUPTED])
def test_an_interrupted_run_is_bitwise_the_uninterrupted_one(outcomes, undisturbed, name):
    run = outcomes[name].run
    uninterrupted = undisturbed[run.events("started")[0]["ranks"]]
    assert run.metrics == uninterrupted.metrics, run.story()
    ours, theirs = run.weights(), uninterrupted.weights()
    assert all(torch.equal(x, theirs[key]) for key, x in ours.items())
    (stopped,) = run.events("stopped")
    assert 0 < stopped["step"] < STEPS
    assert stopped["signal"].split()[0] == ("SIGUSR1" if name in ("time_limit", "chained") else "SIGTERM")
    assert [event["step"] for event in run.events("started")] == [0, stopped["step"]]
    assert [event["kind"] for event in run.events("ended")] == ["asked", "done"]


def test_slurm_counts_the_restarts_of_what_was_put_back(outcomes):
    restarts = {scenario.__name__: int(outcomes[scenario.__name__].job["Restarts"]) for scenario in INTERRUPTED}
    assert restarts == {"time_limit": 1, "requeued": 1, "preempted": 1, "cancelled": 0, "chained": 0}
    run = outcomes["time_limit"].run
    assert f"job {run.jobs[0]} goes back into the queue" in run.log()


def test_the_rest_of_a_chain_has_nothing_to_do(outcomes):
    log = outcomes["chained"].run.log()
    assert "the next job of the chain goes on" in log
    assert f"already at step {STEPS}: nothing to do" in log


def test_status_tells_what_happened(outcomes, project):
    out = project.bd3("status", outcomes["time_limit"].run.path).stdout
    assert "state       finished" in out
    assert f"{STEPS} of {STEPS}" in out
    assert "SIGUSR1 (the time limit is near): stopped at step" in out
    assert f"job {outcomes['time_limit'].run.jobs[0]}" in out
    assert "1 restart" in out
