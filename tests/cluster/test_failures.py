"""Runs on a real cluster whose nodes, ranks or batches fail: they end as they should, by themselves."""

from __future__ import annotations

import pytest

from pretrain.tracking.metrics import read_metrics, series
from tests.cluster.product import Run
from tests.cluster.scenarios import FEWER


def losses(run: Run) -> list[float]:
    steps, found = series(read_metrics(run.path), "train", "loss")
    assert steps == list(range(1, len(steps) + 1))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["node_lost", "ranks_killed"])
def test_a_run_that_loses_a_node_goes_on_with_fewer_ranks_over_the_same_rows(outcomes, undisturbed, name):
    run = outcomes[name].run
    assert outcomes[name].job["Restarts"] == "1"
    assert outcomes[name].job["NumNodes"] == "1"
    first, second = run.events("started")
    assert [event["ranks"] for event in (first, second)] == [2, 1]
    assert second["step"] >= 10
    # The same rows with the same noise give the same losses; their order in the sum is another.
    assert len(losses(run)) == FEWER
    assert losses(run) == pytest.approx(losses(undisturbed[1])[:FEWER], rel=1e-5)
    (ended, done) = run.events("ended")
    assert (ended["kind"], done["kind"]) == ("failed", "done")
    (bad,) = {"node5", "node6"} - set(run.events("attempt")[1]["nodes"]) if name == "node_lost" else {"node8"}
    assert ended["suspects"] == [bad]
    assert bad in ended["cause"]


def test_a_node_whose_ranks_were_killed_is_excluded(outcomes):
    assert outcomes["ranks_killed"].job["ExcNodeList"] == "node1,node2,node3,node4,node5,node6,node8"
    assert outcomes["ranks_killed"].run.events("attempt")[1]["nodes"] == ["node7"]


@pytest.mark.slow
def test_a_stopped_rank_is_found_and_the_job_started_again(outcomes, undisturbed):
    found = outcomes["rank_stopped"]
    run = found.run
    assert found.job["Restarts"] == "1"
    (hang,) = run.events("hang")
    assert hang["hosts"] == ["node2"]
    assert "given no sign of life" in hang["text"]
    assert losses(run) == pytest.approx(losses(undisturbed[1])[:FEWER], rel=1e-5)
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
