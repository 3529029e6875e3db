"""`bd3 launch` against a real cluster: runs, sweeps and data preparations, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint.reader import newest_checkpoint
from pretrain.commands.prep import main as prepare
from tests.cluster.cluster import until
from tests.cluster.product import RECIPE, START, Run

TINY = RECIPE.replace("steps: 30", "steps: 4").replace("every: 10,", "every: 2,")
LAYOUT = ("--parallel.tensor", 2)


@pytest.mark.slow
def test_a_run_on_two_nodes_is_the_one_that_torchrun_starts(project):
    run = project.run("two", "--nodes", 2, "--gpus-per-node", 2, "--parallel.backend", "gloo", *LAYOUT)
    expected = project.torchrun("torchrun", 4, "--parallel.backend", "gloo", *LAYOUT)
    job = run.finishes()
    assert (job["NumNodes"], job["NumTasks"], job["Restarts"]) == ("2", "4", "0")
    assert run.metrics == expected.metrics
    logs = sorted(path.name for path in (run.path / "logs" / f"{run.jobs[0]}.0").iterdir())
    assert logs == [f"rank-0000{rank}.log" for rank in range(4)]
    again = project.bd3("launch", "pretrain", "--config", project.folder / "two.yaml", "--data.path", project.data,
                        "--run", run.path, "--nodes", 2, "--tasks-per-node", 2, *LAYOUT)  # fmt: skip
    run.jobs.append(int(again.stdout.split()[1].rstrip(":")))
    run.finishes(job=1)
    assert run.metrics == expected.metrics
    assert "already at step 30: nothing to do" in run.log()


@pytest.mark.slow
def test_a_sweep_of_six_runs_two_at_a_time(project):
    config = project.folder / "sweep.yaml"
    config.write_text(TINY)
    folder = project.folder / "sweep"
    args = ("launch", "sweep", "--config", config, "--data.path", project.data, "--run", folder, "--at-once", 2,
            "--grid", "train.lr", "1e-3,3e-3", "train.seed", "0,1,2")  # fmt: skip
    first = project.bd3(*args).stdout
    assert "6 of 6 runs, 2 at a time" in first
    number = int(first.split()[1].rstrip(":"))
    cluster, most = project.cluster, 0

    def running() -> list[str]:
        return cluster.run("squeue", "-h", "-r", "-j", number, "-t", "R,CG", "-o", "%T", check=False).stdout.split()

    def over() -> bool:
        nonlocal most
        most = max(most, running().count("RUNNING"))
        return not cluster.run("squeue", "-h", "-r", "-j", number, check=False).stdout.strip()

    until(over, 4 * START, "the sweep is over", every=0.3)
    assert most == 2
    runs = sorted(path.parent for path in folder.glob("*/sweep.yaml"))
    assert len(runs) == 6
    assert [newest_checkpoint(run).step for run in runs] == [4] * 6
    assert len({Run(project, run).metrics for run in runs}) == 6
    assert "all 6 runs are done; nothing to submit" in project.bd3(*args).stdout
    shutil.rmtree(runs[3])
    assert "1 of 6 runs" in project.bd3(*args).stdout
    cluster.run("bash", "-c", "squeue -h -o %A | xargs -r scancel")
    states = [json.loads(line)["state"] for line in project.bd3("status", folder, "--json").stdout.splitlines()]
    assert states.count("finished") == 5


@pytest.mark.slow
def test_a_data_set_is_prepared_in_an_array(project, corpus, tmp_path):
    lines = corpus.read_text().splitlines(keepends=True)
    for part in range(3):
        (project.folder / f"text{part}.jsonl").write_text("".join(lines[part::3]))
    out = project.folder / "prepared"
    args = ("prep", project.folder / "text*.jsonl", "--out", out, "--length", 32, "--tokenizer", "bpe:300")
    started = project.bd3("launch", *args, "--tasks", 3, "--at-once", 2).stdout
    run = Run(project, out.with_name("prepared.launch"), [int(started.split()[1].rstrip(":"))])
    cluster = project.cluster
    until(lambda: not cluster.run("squeue", "-h", "-j", run.jobs[0], check=False).stdout.strip(), START, run.log)
    assert (out / "manifest.json").is_file(), run.log()
    alone = tmp_path / "alone"
    prepare([str(args[1]), "--out", str(alone), "--length", "32", "--tokenizer", "bpe:300"])
    assert _shards(out) == _shards(alone)
    again = project.bd3("launch", *args, "--tasks", 3)
    assert "job" not in again.stdout
    assert not (out.with_name("prepared.launch") / "launch" / "001").exists()


def _shards(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--partition", "nowhere"), "partition=nowhere: there is none of this name; use main, low, short"),
        (("--nodes", 9), "nodes=9: partition main has 8 nodes; use at most 8"),
        (("--partition", "short", "--time", 60), "time=60: the limit of partition short is 00:10:00; use that or less"),
        (("--gpus-per-node", 3), "sbatch: Batch job submission failed: Requested node configuration is not available"),
        (("--exclude", "nowhere"), "sbatch: Batch job submission failed: Invalid node name specified"),
        (("--run", "/proc/run"), "/proc/run: cannot read or write: No such file or directory"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(project, options, line):
    (project.folder / "tiny.yaml").write_text(TINY.replace("global_batch: 8", "global_batch: 144"))
    args = ("--config", "tiny.yaml", "--data.path", project.data, "--run", "refused", *options)
    done = project.bd3("launch", "pretrain", *args, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")
    assert not (project.folder / "refused").exists()
    assert not project.cluster.run("squeue", "-h").stdout


def test_without_sbatch_there_is_one_line(project):
    (project.folder / "tiny.yaml").write_text(TINY)
    args = ("launch", "pretrain", "--config", "tiny.yaml", "--data.path", project.data, "--run", "refused")
    scripts = project.environ["PATH"].split(":")[0]
    bare = ("env", f"PATH={scripts}", f"{scripts}/bd3")
    done = project.cluster.run(*bare, *args, check=False, env=project.environ, cwd=project.folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("sbatch: not found; ")
    assert not (project.folder / "refused").exists()
