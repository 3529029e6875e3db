"""The supervisor: exit reasons, restarts and requeues, and when it gives up."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_common.errors import ConfigError
from pretrain.commands.attempt import main
from pretrain.resilience import child_process, supervisor
from pretrain.resilience.exit_reason import ExitReason, SlurmLine, exit_reason, first_failure
from pretrain.resilience.progress import finished, starts_without_progress
from pretrain.resilience.slurm_job import SlurmJob, nodes_to_exclude
from pretrain.run_folder import events, layout
from slurm import client
from tests.polling import until
from tests.unit.slurm_fakes import FakeSlurm

ABORT = "srun: launch/slurm: _step_signal: Terminating StepId=17.0"


def words(*lines: str, seconds: float = 0.1) -> list[SlurmLine]:
    return [SlurmLine(seconds * number, line) for number, line in enumerate(lines)]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], (None, (), ())),
        (["srun: error: node1: tasks 0-1: Exited with exit code 75", ABORT], (75, (), ())),
        (
            ["srun: error: node1: task 0: Exited with exit code 2", ABORT, "srun: error: node2: task 1: Terminated"],
            (2, (), ()),
        ),
        (["srun: error: node[2-3]: tasks 2-5: Killed", ABORT], (None, ("node2", "node3"), ())),
        # The rank that feels the other's death may be the first to be told.
        (
            ["srun: error: node1: task 0: Exited with exit code 1", ABORT, "srun: error: node2: task 1: Killed"],
            (1, ("node2",), ()),
        ),
        (
            ["srun: error: node1: task 0: Exited with exit code 1", ABORT, "srun: error: Node failure on node2"],
            (1, (), ("node2",)),
        ),
        (["task 3: Killed", "srun: error: Unable to create step"], (None, (), ())),
    ],
)
def test_what_srun_tells_of_the_first_failure(lines, expected):
    assert first_failure(words(*lines)) == expected


def test_tasks_that_srun_kills_in_the_end_are_not_to_blame():
    told = words("srun: error: node1: task 0: Exited with exit code 1", ABORT)
    told.append(SlurmLine(8.0, "srun: error: node2: task 1: Killed"))
    assert first_failure(told) == (1, (), ())


STOPPED = {"event": "stopped", "signal": "SIGUSR1 (the time limit is near)", "step": 7}
HANG = {"event": "hang", "text": "rank 1 is silent: the job ends; stacks", "hosts": ["node2"]}
LOST = {"event": "lost", "rank": 0, "text": "rank 0: lost another rank"}
MISTAKE = {"event": "failed", "rank": 0, "text": "guard: 3 steps", "mistake": True}
BUG = {"event": "failed", "rank": 3, "text": "oops", "mistake": False}
KILLED = ("srun: error: node2: task 1: Killed", ABORT)


@pytest.mark.parametrize(
    ("code", "lines", "happened", "kind", "suspects"),
    [
        (0, (), [], "done", ()),
        (75, (), [STOPPED], "asked", ()),
        (143, ("srun: error: node1: task 0: Exited with exit code 75", ABORT), [STOPPED], "asked", ()),
        (143, ("srun: error: node1: task 0: Exited with exit code 75", ABORT), [], "asked", ()),
        (137, KILLED, [HANG, LOST], "hang", ("node2",)),
        (137, KILLED, [LOST], "failed", ("node2",)),
        (1, ("srun: error: Node failure on node3",), [LOST], "failed", ("node3",)),
        (143, (), [MISTAKE], "mistake", ()),
        (143, ("srun: error: node1: task 0: Exited with exit code 2", ABORT), [], "mistake", ()),
        (2, (), [], "mistake", ()),
        (1, (), [BUG, LOST], "failed", ()),
        # A disk that may be back at the next start; bd3 pretrain says it in one line, as of a mistake.
        (143, ("srun: error: node1: task 0: Exited with exit code 2", ABORT), [BUG], "failed", ()),
        (124, (), [], "hang", ()),
        (1, (), [], "failed", ()),
    ],
)
def test_exit_reasons(code, lines, happened, kind, suspects):
    reason = exit_reason(code, words(*lines), happened, None, "the last line")
    assert (reason.kind, reason.bad_hosts) == (kind, suspects)
    assert reason.cause
    assert reason.may_restart == (kind not in ("done", "mistake"))


def test_causes_are_told_with_what_is_known():
    assert exit_reason(143, [], [HANG]).cause == "rank 1 is silent"
    assert (
        exit_reason(143, words("srun: error: node1: task 0: Exited with exit code 2"), [], None, "x: no").cause
        == "x: no"
    )
    assert exit_reason(1, [], [BUG]).cause == "rank 3 failed: oops"
    assert exit_reason(76, [], [], {"node3": "slow"}) == ExitReason("bad node", "preflight: node3: slow", ("node3",))


def ended(lineage: str = "12", before: int = 0, step: int = 0, kind: str = "failed", cause: str = "x") -> dict:
    return {"event": "ended", "lineage": lineage, "before": before, "step": step, "kind": kind, "cause": cause}


@pytest.mark.parametrize(
    ("happened", "count"),
    [
        ([], 0),
        ([ended(), ended(), ended()], 3),
        ([ended(), ended(step=5), ended(before=5, step=5)], 1),
        ([ended("11"), ended()], 1),
        ([ended(), ended(kind="asked", cause="SIGTERM (preempted)"), ended()], 2),
        ([ended(kind="asked", cause="SIGUSR1 (the time limit is near): stopped at step 0")], 1),
        ([ended(kind="asked", cause="stopped by a signal")], 1),
        ([ended(), {"event": "launched", "jobs": ["12"]}, ended()], 2),
    ],
)
def test_starts_without_a_new_checkpoint_are_counted(happened, count):
    assert starts_without_progress(happened, "12") == count


def test_of_more_nodes_than_the_layout_fits_some_stay_idle(caplog):
    caplog.set_level(logging.INFO)
    job = SlurmJob("12", nodes=("n1", "n2", "n3"))
    command = ["srun", "--nodes=3", "bd3", "pretrain"]
    assert supervisor.fit_nodes(command, job, [1, 2, 4]) == ["srun", "--nodes=2", "bd3", "pretrain"]
    assert "n3 stay idle" in caplog.text
    assert (
        supervisor.fit_nodes(command, job, [])
        == supervisor.fit_nodes(command, job, [3])
        == supervisor.fit_nodes(command, job, [4])
        == command
    )


def test_a_warning_that_comes_to_it_alone_is_passed_on(tmp_path):
    run = tmp_path / "run"
    program = "import os, signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); "
    program += "os.kill(os.getppid(), signal.SIGUSR1); signal.pause()"
    done = run_attempt(run, program=program)
    assert done.returncode == 75, done.stderr
    assert [event["kind"] for event in events.read(run) if event["event"] == "ended"] == ["asked"]


def checkpoint(run: Path, step: int) -> None:
    path = run / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "complete.json").write_text("{}")


def run_attempt(run: Path, *args: str, program: str, **environ: str) -> subprocess.CompletedProcess:
    """`bd3 attempt` with a Python program as its command."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | environ
    command = [sys.executable, "-m", "pretrain.cli", "attempt", str(run), *args, "--", sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables, check=False)


def test_without_slurm_a_failed_command_is_started_again_until_it_is_done(tmp_path):
    program = f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'count')!r}); "
    program += "n = p.read_text() if p.exists() else ''; p.write_text(n + 'x'); sys.exit(0 if n == 'xx' else 1)"
    done = run_attempt(tmp_path / "run", program=program)
    assert (done.returncode, (tmp_path / "count").read_text()) == (0, "xxx"), done.stderr
    kinds = [event["kind"] for event in events.read(tmp_path / "run") if event["event"] == "ended"]
    assert kinds == ["failed", "failed", "done"]


def test_it_gives_up_without_progress_and_not_with_it(tmp_path):
    run = tmp_path / "run"
    done = run_attempt(run, "--restarts", "2", program="raise SystemExit(1)")
    assert done.returncode == 1
    assert "3 starts in a row without a new checkpoint, at step 0; the last: exit code 1" in done.stderr
    assert sum(event["event"] == "attempt" for event in events.read(run)) == 3
    again = run_attempt(run, "--restarts", "2", program="raise SystemExit(1)")
    assert again.returncode == 1
    # Each of these leaves a checkpoint, so that it goes on; the last one is done.
    program = f"""
import pathlib, sys
folder = pathlib.Path({str(tmp_path / "other")!r}) / "checkpoints"
count = len(list(folder.glob("*"))) + 1
path = folder / f"step-{{count:08d}}"
path.mkdir(parents=True)
(path / "complete.json").write_text("{{}}")
sys.exit(0 if count == 5 else 1)
"""
    assert run_attempt(tmp_path / "other", "--restarts", "0", program=program).returncode == 0


def test_a_mistake_is_not_repeated_and_a_finished_run_not_started(tmp_path):
    run = tmp_path / "run"
    done = run_attempt(run, program="import sys; sys.exit(2)")
    assert done.returncode == 2
    assert "not started again" in done.stderr
    assert sum(event["event"] == "attempt" for event in events.read(run)) == 1
    checkpoint(run, 40)
    done = run_attempt(run, "--steps", "40", program="raise SystemExit(5)")
    assert (done.returncode, "already at step 40" in done.stderr) == (0, True)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["run"], "no command; usage: bd3 attempt RUN"),
        (["run", "--"], "nothing after --"),
        (["run", "--restarts", "-1", "--", "true"], "restarts=-1: use 0 or more"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, args, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=line):
        main(args)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def slurm(tmp_path) -> FakeSlurm:
    environ = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_PARTITION": "main"}
    fake = FakeSlurm(tmp_path / "bin", environ)
    fake.answers("sinfo", "echo node1; echo node2; echo node3")
    return fake


def job(state: str, restarts: int = 0, reason: str = "None") -> str:
    record = f"JobId=12 JobName=x JobState={state} Reason={reason} Restarts={restarts} NumNodes=2 ExcNodeList=(null)"
    return f'case "$1 $2" in "show job") echo "{record}";; esac'


def test_a_task_of_an_array_speaks_of_itself_only(tmp_path, slurm):
    """The last task has the array's number as its own, by which scontrol shows and requeues all tasks."""
    other, mine = (f"JobId={n} ArrayJobId=12 ArrayTaskId={n - 7} JobState=" for n in (12, 13))
    both = f'echo "{other}COMPLETED Restarts=0"; echo "{mine}RUNNING Restarts=0"'
    slurm.answers("scontrol", f'case "$*" in *12_5) echo "{mine}RUNNING Restarts=0";; show*12) {both};; esac')
    array = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "5"}
    run_attempt(tmp_path / "run", program="raise SystemExit(1)", **slurm.environ, **array)
    assert [call for call in slurm.called() if "requeue" in call] == ["scontrol requeue 12_5"]
    assert {event["job"] for event in events.read(tmp_path / "run")} == {"12_5"}


def test_nodes_are_excluded_by_slurms_names_and_a_refusal_is_no_failure(tmp_path, slurm):
    slurm.answers("scontrol", job("RUNNING"))
    refuse = job("RUNNING") + '\nif [ "$1" = update ]; then echo "Invalid node name specified" >&2; exit 1; fi'
    slurm.answers("scontrol", refuse)
    done = run_attempt(tmp_path / "run", program=KILL, **slurm.environ)
    assert "node2: not excluded, although to blame: scontrol: Invalid node name specified" in done.stderr
    assert "cannot put job" not in done.stderr
    (event,) = [event for event in events.read(tmp_path / "run") if event["event"] == "requeued"]
    assert event["excluded"] == []


def test_a_whole_name_of_a_host_is_slurms_node(monkeypatch):
    monkeypatch.setattr(client, "working_nodes", lambda _: ["node1", "node2", "node3"])
    reason = ExitReason("hang", "x", ("node2.cluster.org", "elsewhere"))
    assert nodes_to_exclude(SlurmJob("12", 0, ("node1", "node2"), "main"), reason, {"NumNodes": "2"}) == ["node2"]


def test_a_call_is_retried_while_the_controller_is_away(monkeypatch, caplog):
    answers = iter(["Unable to contact slurm controller (connect failure)", "no answer within 60 s", None])

    def ask() -> str:
        if (error := next(answers)) is not None:
            raise client.SlurmError(f"scontrol: {error}")
        return "there"

    monkeypatch.setattr(client, "_PAUSE", 0.0)
    assert client.retry_while_away(ask, 60) == "there"
    assert caplog.text.count("retrying for") == 2
    answers = iter(["Requested operation is presently disabled for job 8"])
    with pytest.raises(client.SlurmError, match="disabled"):
        client.retry_while_away(ask, 60)
    answers = iter(["Unable to contact slurm controller"])
    with pytest.raises(client.SlurmError, match="Unable"):
        client.retry_while_away(ask, -1)


def test_a_job_that_may_not_be_requeued_says_so(tmp_path, slurm):
    refuse = job("RUNNING") + '\nif [ "$1" = requeue ]; then echo "operation is disabled for job 12" >&2; exit 1; fi'
    slurm.answers("scontrol", refuse)
    done = run_attempt(tmp_path / "run", program=KILL, **slurm.environ)
    assert "cannot put job 12 back: scontrol: operation is disabled for job 12; submit its script again" in done.stderr
    assert not any(event["event"] == "requeued" for event in events.read(tmp_path / "run"))


def test_a_second_job_does_not_start_where_one_is_running(tmp_path, slurm):
    slurm.answers("scontrol", job("RUNNING"))
    run = tmp_path / "run"
    run.mkdir()
    events.record(run, "attempt", job="11", restart=0, nodes=["node3"], step=0, lineage="11")
    done = run_attempt(run, program="", **slurm.environ)
    assert done.returncode == 1
    assert "job 11 is RUNNING in it; wait for it, or end it with: scancel 11" in done.stderr
    assert len(events.read(run)) == 1


def test_a_run_stopped_in_its_last_evaluation_has_that_to_do(tmp_path):
    checkpoint(tmp_path, 40)
    assert finished(tmp_path, 40)
    events.record(tmp_path, "stopped", step=40, signal="SIGUSR1")
    events.record(tmp_path, "ended", kind="asked")
    assert not finished(tmp_path, 40)
    events.record(tmp_path, "ended", kind="done")
    assert finished(tmp_path, 40)
    assert not finished(tmp_path, 41)


def test_what_the_command_leaves_running_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(child_process, "_DRAIN", 0.1)
    program = f"echo srun: a >&2; echo b >&2; sleep 1000 & echo $! > {tmp_path}/pid; exit 3"
    code, told = child_process.run_command(["bash", "-c", program], tmp_path)
    assert (code, [word.line for word in told]) == (3, ["srun: a"])
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # it is still there


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_without_slurm_who_is_told_to_end_does(tmp_path, number):
    ready = tmp_path / "ready"
    program = f"import pathlib, time; pathlib.Path({str(ready)!r}).touch(); time.sleep(1000)"
    command = [sys.executable, "-m", "pretrain.cli", "attempt", tmp_path / "run", "--", sys.executable, "-c", program]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ, process_group=0)
    until(lambda: ready.exists() or process.poll() is not None)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=600)
    assert process.returncode == (143 if number == signal.SIGTERM else 130), err
    assert "; ended at step 0" in err
    assert sum(event["event"] == "attempt" for event in events.read(tmp_path / "run")) == 1


KILL = "import sys; print('srun: error: node2: task 1: Killed', file=sys.stderr); sys.exit(137)"


def test_a_failed_job_goes_back_into_the_queue_without_the_node_to_blame(tmp_path, slurm):
    slurm.answers("scontrol", job("RUNNING"))
    done = run_attempt(tmp_path / "run", program=KILL, **slurm.environ)
    assert "job 12 goes back into the queue without node2" in done.stderr
    assert [call for call in slurm.called() if "show" not in call and "sinfo" not in call] == [
        "scontrol requeue 12",
        "scontrol update JobId=12 ExcNodeList=node2",
    ]


def test_a_node_that_cannot_be_spared_is_not_excluded(tmp_path, slurm):
    slurm.answers("scontrol", job("RUNNING"))
    slurm.answers("sinfo", "echo node1; echo node2")
    done = run_attempt(tmp_path / "run", program=KILL, **slurm.environ)
    assert "node2: not excluded" in done.stderr
    assert "scontrol requeue 12" in slurm.called()
    assert not any("ExcNodeList" in call for call in slurm.called())


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", "TIMEOUT"])
def test_a_job_that_somebody_has_ended_is_left_alone(tmp_path, slurm, state):
    slurm.answers("scontrol", job(state))
    done = run_attempt(tmp_path / "run", program=KILL, **slurm.environ)
    assert f"job 12 is {state}, and stays so" in done.stderr
    assert not any("requeue" in call or "update" in call for call in slurm.called())
    assert done.returncode == 137


def test_the_jobs_of_a_chain_hand_over_at_the_limit_but_not_after_a_failure(tmp_path, slurm):
    slurm.answers("scontrol", job("RUNNING"))
    asked = "import sys; sys.exit(75)"
    done = run_attempt(tmp_path / "a", program=asked, BD3_CHAIN="000 1 2", **slurm.environ)
    assert (done.returncode, "the next job of the chain goes on" in done.stderr) == (0, True)
    assert "scontrol requeue 12" not in slurm.called()
    run_attempt(tmp_path / "b", program=KILL, BD3_CHAIN="000 1 2", **slurm.environ)
    assert slurm.called().count("scontrol requeue 12") == 1
    run_attempt(tmp_path / "c", program=asked, BD3_CHAIN="000 2 2", **slurm.environ)
    assert slurm.called().count("scontrol requeue 12") == 2


def test_an_attempt_that_died_with_its_node_is_counted_at_the_next_start(tmp_path, slurm):
    slurm.answers("scontrol", job("RUNNING", restarts=1))
    slurm.answers("sinfo", 'echo "node1 idle"; echo "node2 down*"')
    run = tmp_path / "run"
    run.mkdir()
    for restarts, code in (("0", 1), ("1", 0)):
        events.record(run, "attempt", job="12", restart=0, nodes=["node1", "node2"], step=0, lineage="12")
        done = run_attempt(run, "--restarts", restarts, program="", SLURM_RESTART_COUNT="1", **slurm.environ)
        assert done.returncode == code, done.stderr
        found = next(event for event in events.read(run) if event["event"] == "ended")
        assert (found["cause"], found["suspects"]) == ("node failure: node2 is down*", ["node2"])
        (run / layout.EVENTS).unlink()


def test_suspects_of_the_preflight_are_taken_once(tmp_path):
    (tmp_path / "suspects.json").write_text(json.dumps({"hosts": ["node3"], "reasons": {"node3": "slow"}}))
    assert supervisor.take_bad_nodes(tmp_path, 76) == {"node3": "slow"}
    assert supervisor.take_bad_nodes(tmp_path, 76) is None
    (tmp_path / "suspects.json").write_text("{")
    assert supervisor.take_bad_nodes(tmp_path, 76) is None
