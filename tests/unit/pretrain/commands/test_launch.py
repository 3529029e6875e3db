"""`bd3 launch`: the scripts it writes, what it keeps, what it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_common import plugins
from bd3_common.errors import ConfigError
from pretrain.commands import launch
from pretrain.config.resolve import load_saved
from pretrain.run_folder import events
from slurm import client, script
from slurm.environment import expand_hosts
from slurm.options import JobOptions, node_range, seconds_of
from tests.unit.slurm_fakes import FakeSlurm

TINY = """
model: {layers: 1, hidden: 32, heads: 4, kv_heads: 2, length: 32}
diffusion: {block_size: 4}
train: {steps: 4, global_batch: 8, micro_batch: 2, precision: fp32, ema_decay: 0}
eval: {every: 0, rows: 8}
"""
PARTITIONS = """
case "$1 $2" in
"show partition") echo "PartitionName=main Default=YES TotalNodes=4 MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP"
    echo "PartitionName=small Default=NO TotalNodes=4 MaxNodes=2 MaxTime=02:00:00 State=UP";;
"show job") echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;
esac
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    """A cluster that takes every job, in a folder of its own to start from."""
    fake = FakeSlurm(tmp_path / "bin")
    fake.answers("scontrol", PARTITIONS)
    fake.answers("sbatch", "echo 12")
    for name, value in fake.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("BD3_SITE", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("tiny.yaml").write_text(TINY)
    return fake


@pytest.fixture
def args(data_set) -> list[str]:
    return ["--config", "tiny.yaml", "--data.path", str(data_set), "--run", "run"]


def directives(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))


def submitted(folder: Path, number: int = 0) -> str:
    return (folder / "launch" / f"{number:03d}" / "job.sbatch").read_text()


@pytest.mark.parametrize("name", ["single_node", "multi_node", "sweep", "prep"])
def test_a_template_is_a_script_that_a_person_can_submit(name):
    text = script.template(name)
    assert text.startswith("#!/bin/bash\n")
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert text.index(script.BEGIN) < text.index(script.END)
    before = text[: text.index(script.BEGIN)]
    assert all(line.startswith("#") or not line for line in before.splitlines())  # Slurm reads on to the first command


def test_a_run_on_two_nodes(slurm, args, capsys):
    options = "--nodes 2 --gpus-per-node 4 --cpus-per-task 6 --partition main --account acc --qos high --time 1:30:00"
    more = "--exclude node3 --mem 0 --sbatch constraint=h100 --srun container-image=/i.sqsh --env A_B 'x'"
    launch.main(
        [
            "pretrain",
            *args,
            "--train.global-batch",
            "16",
            *options.split(),
            *more.split(),
            "--setup",
            "module load cuda",
            "ulimit -c 0",
        ]
    )
    run = Path("run").absolute()
    text = submitted(run)
    found = directives(text)
    assert found | {"output": ""} == {
        "job-name": "run",
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "cpus-per-task": "6",
        "partition": "main",
        "account": "acc",
        "qos": "high",
        "time": "1:30:00",
        "exclude": "node3",
        "mem": "0",
        "constraint": "h100",
        "signal": "USR1@300",
        "requeue": "",
        "open-mode": "append",
        "output": "",
    }
    for line in ("module load cuda", "ulimit -c 0", "CONTAINER=(--container-image=/i.sqsh)", "TASKS=4"):
        assert f"\n{line}\n" in text
    assert "srun --nodes" in text
    assert "scontrol show hostnames" in text
    assert subprocess.run(["bash", "-n", "run/launch/000/job.sbatch"], check=False).returncode == 0
    assert slurm.called()[-1] == f"sbatch --parsable {run}/launch/000/job.sbatch"
    out = capsys.readouterr().out
    assert "job 12: 2 nodes x 4 tasks" in out
    assert "bd3 status" in out
    assert [event["jobs"] for event in events.read(run)] == [["12"]]


def test_code_and_configuration_are_kept_as_they_are(slurm, args):
    launch.main(["pretrain", *args, "--train.lr", "0.5"])
    folder = Path("run/launch/000").absolute()
    assert load_saved(folder / "config.yaml").train.lr == 0.5
    assert load_saved(folder / "config.yaml").run == str(Path("run").absolute())
    environ = os.environ | {"PYTHONPATH": str(folder / "code")}
    where = "import pretrain.cli, slurm, data_prep, bd3_megatron; print(pretrain.cli.__file__, slurm.__file__)"
    done = subprocess.run([sys.executable, "-P", "-c", where], env=environ, text=True, capture_output=True, check=True)
    assert done.stdout.split() == [str(folder / "code" / name) for name in ("pretrain/cli.py", "slurm/__init__.py")]
    assert (folder / "code/slurm/multi_node.sbatch").is_file()
    assert f"torch=={__import__('torch').__version__.split('+')[0]}" in (folder / "environment.txt").read_text()


def test_plugins_travel_with_the_job(slurm, args, tmp_path, monkeypatch):
    plugin = tmp_path / "added.py"
    plugin.write_text("NAME = 'as submitted'\n")
    monkeypatch.setenv(plugins.VARIABLE, f"{plugin}{os.pathsep}wave")
    launch.main(["pretrain", *args])
    copy = Path("run/launch/000/plugins/added.py").absolute()
    assert copy.read_text() == "NAME = 'as submitted'\n"
    assert f"\nexport BD3_PLUGINS={copy}:wave\n" in submitted(Path("run"))


def test_a_dry_run_prints_the_script_and_needs_no_slurm(slurm, args, capsys):
    for name in ("sbatch", "scontrol"):
        (slurm.folder / name).unlink()
    launch.main(["pretrain", *args, "--nodes", "2", "--tasks-per-node", "2", "--dry-run"])
    assert directives(capsys.readouterr().out)["nodes"] == "2"
    assert not Path("run").exists()


def test_a_range_of_nodes_names_those_that_the_layout_fits(slurm, args):
    launch.main(["pretrain", *args, "--nodes", "1-4", "--tasks-per-node", "1"])
    text = submitted(Path("run"))
    assert "ATTEMPT=(--steps 4 --restarts 3 --fits 1 2 4)" in text  # 8 rows in micro-batches of 2: not over 3 ranks
    assert "exclusive" in directives(text)
    assert "ntasks-per-node" not in directives(text)


def test_a_chain_depends_link_by_link(slurm, args):
    slurm.answers("sbatch", f"wc -l < {slurm.folder / 'calls'}")
    launch.main(["pretrain", *args, "--chain", "3"])
    calls = [call for call in slurm.called() if call.startswith("sbatch")]
    (jobs,) = [event["jobs"] for event in events.read(Path("run"))]
    assert [re.findall(r"--dependency=(\S+)", call) for call in calls] == [
        [],
        [f"afterany:{jobs[0]}"],
        [f"afterany:{jobs[1]}"],
    ]
    assert [re.findall(r"BD3_CHAIN=(\d+ \d \d)", call) for call in calls] == [[f"000 {n} 3"] for n in (1, 2, 3)]


def test_a_site_file_has_defaults_that_flags_win_over(slurm, args, monkeypatch, capsys):
    Path("site.yaml").write_text("partition: small\naccount: acc\nsetup: [module load a, module load b]\nenv: {A: 1}\n")
    launch.main(["pretrain", *args, "--site", "site.yaml", "--account", "other", "--dry-run"])
    monkeypatch.setenv("BD3_SITE", "site.yaml")
    launch.main(["pretrain", *args, "--dry-run"])
    first, second = capsys.readouterr().out.split("#!/bin/bash")[1:]
    assert [directives(text)["account"] for text in (first, second)] == ["other", "acc"]
    for text in (first, second):
        assert directives(text)["partition"] == "small"
        assert "module load a\nmodule load b\nexport A=1\n" in text


REFUSED = [
    (["--partition", "gpu"], "partition=gpu: there is none of this name; use main, small"),
    (["--nodes", "5"], "nodes=5: partition main has 4 nodes; use at most 4"),
    (["--nodes", "4", "--partition", "small"], "nodes=4: partition small gives a job 2 nodes at most; use 2"),
    (["--nodes", "2-1"], "nodes=2-1: not a number of nodes or a range of them such as 2-4"),
    (["--time", "3:00:00", "--partition", "small"], "time=3:00:00: the limit of partition small is 02:00:00; use that"),
    (["--time", "soon"], "time=soon: not a time; use minutes (90), H:MM:SS or D-HH:MM:SS"),
    (
        ["--nodes", "3"],
        "train.global_batch=8: not a multiple of train.micro_batch=2 times 3 data-parallel ranks; "
        "use a multiple of 6 (3 nodes x 1 task)",
    ),
    (["--data.path", "nowhere"], "nowhere: "),
    (["--site", "none.yaml"], "site=none.yaml: no such file; give a YAML file with options of the job"),
    (["--env", "1A", "x"], "env=1A: not the name of a variable"),
    (["--partition", "main,gpu"], "partition=gpu: there is none of this name; use main, small"),
]


@pytest.mark.parametrize(("more", "line"), REFUSED)
def test_what_is_refused_leaves_nothing(slurm, args, more, line):
    with pytest.raises(Exception, match=re.escape(line)) as error:
        launch.main(["pretrain", *args, *more])
    assert len(str(error.value).splitlines()) == 1
    assert not Path("run").exists()
    assert not any(call.startswith("sbatch") for call in slurm.called())


def test_data_that_do_not_fit_the_model_are_refused(slurm, args):
    """A job that waits for days and ends in its first second is a day lost."""
    for more, line in (
        (["--model.length", "64"], r"^model.length=64: the rows of .* have 32 tokens; use model.length=32"),
        (["--model.vocab-size", "8"], r"^model.vocab_size=8: .* has \d+ ids; use \d+ or more"),
    ):
        with pytest.raises(ConfigError, match=line):
            launch.main(["pretrain", *args, *more])
        assert not Path("run").exists()


def test_slurms_own_refusal_is_one_line_and_leaves_nothing(slurm, args):
    slurm.answers(
        "sbatch",
        "echo 'sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified'"
        " >&2; exit 1",
    )
    with pytest.raises(client.SlurmError, match=r"^sbatch: Batch job submission failed: Invalid account [^\n]*$"):
        launch.main(["pretrain", *args])
    assert not Path("run").exists()


def test_without_sbatch_and_without_a_writable_folder(slurm, args, monkeypatch, tmp_path):
    (slurm.folder / "sbatch").unlink()
    monkeypatch.setenv("PATH", f"{slurm.folder}:{tmp_path}")  # there may be a real one elsewhere
    (tmp_path / "bash").symlink_to("/bin/bash")
    with pytest.raises(client.SlurmError, match=r"^sbatch: not found; "):
        launch.main(["pretrain", *args])
    assert not Path("run").exists()
    slurm.answers("sbatch", "echo 12")
    Path("file").write_text("")
    with pytest.raises(OSError, match="file/run"):
        launch.main(["pretrain", *args, "--run", "file/run"])


def test_a_folder_with_a_job_in_it_is_refused(slurm, args):
    launch.main(["pretrain", *args])
    running = 'if [ "$2" = job ]; then echo "JobId=12 JobState=RUNNING Reason=None"; exit; fi'
    slurm.answers("scontrol", running + PARTITIONS)
    with pytest.raises(ConfigError, match="job 12 is RUNNING in it; wait for it, or end it with: scancel 12"):
        launch.main(["pretrain", *args])
    slurm.answers("scontrol", running.replace("RUNNING", "COMPLETED") + PARTITIONS)
    launch.main(["pretrain", *args])
    assert submitted(Path("run"), 1)


def test_a_sweep_submits_what_is_not_done(slurm, args, capsys):
    grid = ["--grid", "train.lr", "1e-3,3e-3", "train.seed", "0,1,2", "--at-once", "2"]
    launch.main(["sweep", *args, *grid])
    runs = Path("run/launch/000/runs.txt").read_text().splitlines()
    assert [Path(run).name for run in runs] == [f"lr={lr},seed={seed}" for lr in ("1e-3", "3e-3") for seed in range(3)]
    assert directives(submitted(Path("run")))["array"] == "0-5%2"
    config = load_saved(Path(runs[4]) / "sweep.yaml")
    assert (config.train.lr, config.train.seed, config.run) == (3e-3, 1, runs[4])
    for number in (0, 1, 3):
        done = Path(runs[number]) / "checkpoints" / "step-00000004"
        done.mkdir(parents=True)
        (done / "complete.json").write_text("{}")
    launch.main(["sweep", *args, *grid])
    assert directives(submitted(Path("run"), 1))["array"] == "2,4-5%2"
    for number in (2, 4, 5):
        done = Path(runs[number]) / "checkpoints" / "step-00000004"
        done.mkdir(parents=True)
        (done / "complete.json").write_text("{}")
    capsys.readouterr()
    launch.main(["sweep", *args, *grid])
    assert "all 6 runs are done; nothing to submit" in capsys.readouterr().out
    assert not Path("run/launch/002").exists()


@pytest.mark.parametrize(
    ("grid", "line"),
    [
        ([], "grid: empty"),
        (["--grid", "train.rl", "1"], "grid=train.rl: no key of the configuration"),
        (["--grid", "train.lr", "1,1"], "grid=train.lr 1,1: give different values"),
        (["--grid", "train.lr", "x"], "train.lr=x: not a number"),
    ],
)
def test_a_wrong_grid_is_one_line(slurm, args, grid, line):
    with pytest.raises(ConfigError, match=line):
        launch.main(["sweep", *args, *grid])
    assert not Path("run").exists()


def test_a_data_set_is_prepared_by_an_array_that_is_not_repeated(slurm, corpus, capsys):
    args = ["prep", str(corpus), "--out", "data", "--length", "32", "--tokenizer", "bpe:300"]
    launch.main([*args, "--tasks", "4", "--at-once", "3", "--cpus-per-task", "2"])
    text = submitted(Path("data.launch"))
    found = directives(text)
    assert (found["array"], found["cpus-per-task"], found["ntasks"]) == ("0-3%3", "2", "1")
    assert f"SHARES=4\nPREP=(bd3 prep {corpus} --out data --length 32 --tokenizer bpe:300)\n" in text
    # What a task of the array does, one after another.
    (last,) = [line for line in text.splitlines() if line.startswith("exec ")]
    body = text[text.index(script.BEGIN) : text.index("echo ")]
    environ = {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "1"}
    for share in range(4):
        task = environ | {"SLURM_ARRAY_TASK_ID": str(share)}
        lines = f"set -e\n{body}\n{last}"
        done = subprocess.run(["bash", "-c", lines], env=os.environ | task, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert Path("data/manifest.json").is_file()
    capsys.readouterr()
    launch.main([*args, "--tasks", "4"])
    assert not Path("data.launch/launch/001").exists()


def test_a_sweep_that_slurm_refuses_leaves_nothing(slurm, args):
    slurm.answers("sbatch", "echo 'sbatch: error: Invalid job array specification' >&2; exit 1")
    grid = ["--grid", "train.lr", "1e-3,3e-3"]
    with pytest.raises(client.SlurmError, match="Invalid job array"):
        launch.main(["sweep", *args, *grid])
    assert not Path("run").exists()


def test_a_chain_of_which_a_later_job_is_refused_is_cancelled(slurm, args):
    slurm.answers("sbatch", 'case "$*" in *afterany*) echo "sbatch: error: no" >&2; exit 1;; esac; echo 12')
    slurm.answers("scancel", "")
    with pytest.raises(client.SlurmError, match="no"):
        launch.main(["pretrain", *args, "--chain", "3"])
    assert [call for call in slurm.called() if "scancel" in call] == ["scancel 12"]
    assert not Path("run").exists()


def test_a_launch_leaves_that_of_another_alone(slurm, args, monkeypatch):
    launch.main(["pretrain", *args])
    monkeypatch.setattr(launch.Path, "glob", lambda *_: iter(()))  # both have looked before one was there
    with pytest.raises(ConfigError, match="launch/000: another bd3 launch is making it"):
        launch.main(["pretrain", *args])
    assert submitted(Path("run"))


def test_what_a_killed_launch_left_the_next_one_removes(slurm, args):
    words = ["pretrain", *args]
    code = "import os, sys\nfrom pretrain.commands import launch\nfrom pretrain.run_folder import launch_snapshot\n"
    code += "launch_snapshot._environment_text = lambda: os.kill(os.getpid(), 9)\nlaunch.main(sys.argv[1:])\n"
    env = os.environ | {"PYTHONPATH": str(Path(launch.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, *words], env=env, check=False)
    assert [path.name[:13] for path in Path("run/launch").iterdir()] == [".000.partial-"]
    launch.main(words)
    assert [path.name for path in Path("run/launch").iterdir()] == ["000"]
    assert submitted(Path("run"))


def test_names_with_spaces_and_quotes_reach_slurm_and_the_shell_whole(slurm, args):
    run = Path("it's a $run #1").absolute()
    more = ["--sbatch", 'comment=say "a b"', "--env", "A", "x 'y' $z", "--run", str(run)]
    launch.main(["pretrain", *args[:-2], *more])
    text = submitted(run)
    lines = dict(
        line.removeprefix("#SBATCH --").split("=", 1) for line in text.splitlines() if "SBATCH" in line and "=" in line
    )
    assert lines["output"] == f'"{run}/logs/%x-%j.log"'
    assert lines["job-name"] == f'"{run.name}"'
    assert lines["comment"] == r'"say \"a b\""'
    body = text[text.index(script.BEGIN) : text.index("echo ")]
    show = f'{body}\nprintf "%s\\n" "$RUN" "$A" "${{BD3[@]: -2}}"'
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(run), "x 'y' $z", "--run", str(run)]


def test_what_slurm_would_replace_in_a_path_is_refused(slurm, args):
    with pytest.raises(ConfigError, match="50%: has '%', which Slurm replaces"):
        launch.main(["pretrain", *args[:-2], "--run", "50%"])


def test_a_site_file_is_taken_as_written_and_leaves_positional_words_alone(slurm, corpus, args, capsys):
    site = "time: 1:30:00\naccount: null\nqos:\nsbatch: [--exclusive]\nenv: {A: yes, B: '1'}\nsetup: [module load a]\n"
    Path("site.yaml").write_text(site)
    prep = [str(corpus), "--out", "data", "--length", "32", "--tokenizer", "bpe:300"]
    launch.main(["prep", "--site", "site.yaml", "--dry-run", *prep])
    launch.main(["prep", *prep, "--site", "site.yaml", "--dry-run"])
    first, second = capsys.readouterr().out.split("#!/bin/bash")[1:]
    assert first == second
    found = directives(first)
    assert (found["time"], "exclusive" in found) == ("1:30:00", True)
    assert not {"account", "qos"} & set(found)
    assert "\nmodule load a\nexport A=yes\nexport B=1\n" in first
    assert f"PREP=(bd3 prep {corpus} --out data" in first


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--overwrite"], "overwrite=true: each task of the array would begin anew; remove "),
        (["--workers", "3"], "--workers=3: one for each core of a task; give --cpus-per-task"),
        (["--part", "0/2"], "--part=0/2: set by the array"),
    ],
)
def test_options_of_prep_that_an_array_cannot_have(slurm, corpus, more, line):
    with pytest.raises(ConfigError, match=line):
        launch.main(["prep", str(corpus), "--out", "data", *more])
    assert not Path("data.launch").exists()


def test_two_combinations_in_one_folder_are_refused(slurm, args):
    with pytest.raises(ConfigError, match="grid: two combinations would train in"):
        launch.main(["sweep", *args, "--grid", "data.path", f"{args[3]},{args[3].replace('/', '_')}"])


def test_the_kinds_of_job(capsys):
    assert launch.main(["--help"]) == 0
    assert "  sweep " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="launch train: unknown kind of job; did you mean pretrain"):
        launch.main(["train"])


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("5:30", 330), ("1:02:03", 3723), ("2-3", 183600), ("1-0:30", 88200), ("1-1:1:1", 90061)],
)
def test_time_limits_are_read_as_slurm_does(time, seconds):
    assert seconds_of(time) == seconds


def test_the_warning_fits_the_limit():
    assert JobOptions().warning == JobOptions(time="1-0").warning == 300
    assert JobOptions(time="5").warning == 60
    assert JobOptions(time="5", warn_seconds=7).warning == 7


@given(st.integers(1, 500), st.integers(0, 500))
def test_ranges_of_nodes(low, more):
    assert node_range(f"{low}-{low + more}") == (low, low + more)
    assert node_range(str(low)) == (low, low)
    assert len(JobOptions(nodes=f"{low}-{low + more}").node_counts) == more + 1


def test_what_slurm_says_of_jobs_is_read(slurm):
    line = "JobId=7 JobName=a b JobState=RUNNING Reason=None NodeList=node[1-2] Socks/Node=* NtasksPerN:B:S:C=2:0:*:*"
    slurm.answers("scontrol", f'echo "{line}"')
    found = client.job(7)
    assert (found["JobName"], found["JobState"]) == ("a b", "RUNNING")
    assert client.hosts(found["NodeList"]) == expand_hosts("node[1-2]") == ["node1", "node2"]
    slurm.answers("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert client.job(7) is None
    slurm.answers("scontrol", "sleep 5")
    with pytest.raises(client.SlurmError, match=r"no answer within 0\.5 s"):
        client.call("scontrol", timeout=0.5)


def test_an_index_is_no_job(tmp_path):
    args = ["prep", "text.jsonl", "--out", str(tmp_path / "out"), "--index", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"--index=.*: not a job of its own; call bd3 prep --index"):
        launch.main(args)
