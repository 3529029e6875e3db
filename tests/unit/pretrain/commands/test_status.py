"""`bd3 status`: from the run folder and from Slurm's answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bd3_common.errors import ConfigError
from pretrain.commands.status import main
from pretrain.config.resolve import save_config
from pretrain.config.schema import RunConfig
from pretrain.jobs.run_status import run_status
from pretrain.run_folder import events
from tests.unit.slurm_fakes import FakeSlurm


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    fake.answers("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    fake.answers("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    for name, value in fake.environ.items():
        monkeypatch.setenv(name, value)
    return fake


def knows(slurm: FakeSlurm, *records: str) -> None:
    slurm.answers("scontrol", "\n".join(f'echo "{record}"' for record in records))


JOB = (
    "JobId=12 JobName=run JobState={state} Reason={reason} Restarts=1 RunTime=00:10:00 TimeLimit=1-00:00:00 "
    "NodeList=node[1-2] NumNodes=2"
)


def make_run(run: Path, name: str = "config.yaml") -> Path:
    run.mkdir(parents=True)
    config = RunConfig(run=str(run))
    save_config(config.model_copy(update={"train": config.train.model_copy(update={"steps": 40})}), run / name)
    return run


def trained(run: Path, step: int, checkpoint: int) -> None:
    records = [
        {"step": step - 1, "split": "validation", "perplexity": 33.25, "nelbo": 3.5},
        {"step": step, "split": "train", "loss": 3.25},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 9')
    speed = {"step": step, "split": "throughput", "seconds_per_step": 2.0, "tokens_per_second": 12345.0}
    (run / "throughput.jsonl").write_text(json.dumps(speed) + "\n")
    path = run / "checkpoints" / f"step-{checkpoint:08d}"
    path.mkdir(parents=True)
    (path / "complete.json").write_text("{}")
    (run / "checkpoints" / "step-00000099").mkdir()  # not complete


def test_a_running_job(tmp_path, slurm, capsys):
    run = make_run(tmp_path / "run")
    events.record(run, "launched", jobs=["12"], launch="000")
    events.record(run, "attempt", job="12", restart=0, nodes=["node1", "node2"], step=0, lineage="12")
    cause = "node failure: node3"
    events.record(run, "ended", job="12", restart=0, kind="failed", cause=cause, suspects=["node3"], before=0, step=5)
    events.record(run, "requeued", job="12", excluded=["node3"])
    events.record(run, "started", step=5, ranks=4)
    trained(run, 20, 15)
    knows(slurm, JOB.format(state="RUNNING", reason="None"))
    found = run_status(run)
    assert (found["state"], found["step"], found["steps"], found["checkpoint"]) == ("running", 20, 40, 15)
    assert (found["loss"], found["perplexity"], found["tokens_per_second"]) == (3.25, 33.25, 12345.0)
    assert found["seconds_left"] == 40
    assert [(end["step"], end["cause"]) for end in found["restarts"]] == [(5, cause)]
    (job,) = found["jobs"]
    assert (job["job"], job["state"], job["restarts"], job["nodes"]) == ("12", "RUNNING", 1, "node[1-2]")
    main([str(run)])
    out = capsys.readouterr().out
    for text in (
        "state       running",
        "job 12      RUNNING on node[1-2], 00:10:00 of 1-00:00:00, 1 restart",
        "20 of 40 | loss 3.25 | validation perplexity 33.25 | 12.3k tok/s | ETA 0:00:40",
        "checkpoint  step 15, 0:00:0",
        "step 5: node failure: node3",
        "excluded    node3",
    ):
        assert text in out
    main([str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["step"] == 20


@pytest.mark.parametrize(
    ("state", "reason", "expected"), [("PENDING", "Resources", "pending"), ("COMPLETED", "None", "not started")]
)
def test_a_job_that_has_not_begun(tmp_path, slurm, state, reason, expected):
    run = make_run(tmp_path / "run")
    events.record(run, "launched", jobs=["12"], launch="000")
    knows(slurm, JOB.format(state=state, reason=reason))
    found = run_status(run)
    assert found["state"] == expected
    assert found["jobs"][0]["reason"] == ("" if reason == "None" else reason)


def test_an_ended_job_that_the_controller_has_forgotten(tmp_path, slurm):
    run = make_run(tmp_path / "run")
    events.record(run, "launched", jobs=["12"], launch="000")
    events.record(run, "attempt", job="12", restart=0, nodes=[], step=0, lineage="12")
    events.record(run, "ended", job="12", restart=0, kind="mistake", cause="no data", suspects=[], before=0, step=0)
    found = run_status(run)
    assert (found["state"], found["jobs"]) == ("ended at step 0: no data", [])
    slurm.answers("sacct", "echo '12|FAILED|00:01:00|1-00:00:00|node1'")
    (job,) = run_status(run)["jobs"]
    assert (job["state"], job["run_time"], job["nodes"]) == ("FAILED", "00:01:00", "node1")


def test_a_run_without_slurm(tmp_path, slurm, capsys):
    run = make_run(tmp_path / "run")
    events.record(run, "started", step=0, ranks=1)
    trained(run, 40, 40)
    for name in ("scontrol", "sacct"):
        (slurm.folder / name).unlink()
    assert run_status(run)["state"] == "finished"
    events.record(run, "launched", jobs=["12"], launch="000")
    main([str(run)])
    assert "finished" in capsys.readouterr().out


def test_a_sweep_is_shown_run_by_run(tmp_path, slurm, capsys):
    folder = tmp_path / "sweep"
    for name in ("lr=1", "lr=2"):
        make_run(folder / name, "sweep.yaml")
    trained(folder / "lr=2", 40, 40)
    events.record(folder, "launched", jobs=["12"], launch="000")
    main([str(folder), "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(Path(run["run"]).name, run["state"]) for run in found] == [
        ("sweep", "not started"),
        ("lr=1", "not started"),
        ("lr=2", "finished"),
    ]


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        main([str(tmp_path)])


def test_an_evaluation_of_long_ago_is_found(tmp_path, slurm):
    run = make_run(tmp_path / "run")
    trained(run, 20, 15)
    steps = "".join(json.dumps({"step": n, "split": "train", "loss": 3.0}) + "\n" for n in range(20, 5000))
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + steps)
    assert (run / "metrics.jsonl").stat().st_size > 1 << 17
    found = run_status(run)
    assert (found["step"], found["perplexity"]) == (4999, 33.25)


def test_a_configuration_that_cannot_be_read_hides_nothing_else(tmp_path, slurm, capsys):
    run = make_run(tmp_path / "run")
    trained(run, 20, 15)
    (run / "config.yaml").write_text("later: 1\n")
    events.record(run, "ended", step=15)  # without the rest
    main([str(run)])
    out = capsys.readouterr().out
    assert "config      config.yaml: later: unknown key" in out
    assert "checkpoint  step 15" in out
