"""Hostile inputs and places: no stranger's code runs, nothing is deleted, kept or shown raw; a mistake is one line."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_common.atomic import atomic_folder
from bd3_common.errors import ConfigError, UserError
from bd3_common.text import printable
from pretrain import cli
from pretrain.config.resolve import load_run_config
from pretrain.run_folder import events
from pretrain.run_folder.place import check_place
from tests.unit.slurm_fakes import FakeSlurm

ESCAPES = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202e"
PARTITION = '[ "$2" = partition ] && echo "PartitionName=gpu Default=YES TotalNodes=4 MaxTime=1-0 State=UP"; true'
TINY = ["--model.layers", "1", "--model.hidden", "32", "--model.heads", "2", "--model.length", "32"]
TINY += ["--train.steps", "2", "--train.global-batch", "4", "--train.micro-batch", "4", "--diffusion.block-size", "4"]


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    """A cluster that takes every job; the current folder is ``tmp_path``."""
    fake = FakeSlurm(tmp_path / "bin")
    fake.answers("scontrol", PARTITION)
    fake.answers("sbatch", "echo 4711")
    monkeypatch.setenv("PATH", fake.environ["PATH"])
    monkeypatch.delenv("BD3_SITE", raising=False)
    monkeypatch.chdir(tmp_path)
    return fake


def launched(data_set: Path, *more: str) -> int:
    return cli.main(["launch", "pretrain", *TINY, "--data.path", str(data_set), "--run", "run", *more])


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    assert cli.main([str(arg) for arg in args]) == 2
    line = capsys.readouterr().err.removesuffix("\n")
    assert line
    assert printable(line) == line  # a single one
    return line


def test_modules_in_the_current_folder_are_not_imported_by_workers(tmp_path):
    for name in ("signal", "socket", "pickle", "json", "random", "struct", "threading"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise ImportError")
    script = tmp_path / "elsewhere" / "command"
    script.parent.mkdir()
    code = "import os\nfrom data_prep.build import pool\nif __name__ == '__main__':\n"
    code += "    print([n for _, n in pool.run(os.path.basename, ['a/b', 'c/d', 'e/f'], 2, lambda _: None)])\n"
    code += "    print(os.environ.get('PYTHONSAFEPATH'))\n"
    script.write_text(code)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    words = [sys.executable, script]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    names, variable = done.stdout.splitlines()
    assert sorted(eval(names)) == ["b", "d", "f"]
    assert variable == "None"  # of the process itself nothing is changed
    assert not (tmp_path / "ran").exists()


def test_a_plugin_is_not_taken_from_the_current_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BD3_PLUGINS", "")  # restored afterwards
    monkeypatch.syspath_prepend(str(tmp_path))  # as after `python -m`
    line = refused(capsys, "--plugin", "stranger", "config")
    assert "the current folder is not searched for modules; for its file write --plugin ./stranger.py" in line
    assert not (tmp_path / "ran").exists()


def test_a_launch_keeps_no_secrets_and_only_its_owner_reads_it(slurm, data_set, monkeypatch):
    secrets = {
        "SLURM_JWT": "eyJhbGciSWORDFISH",
        "BD3_S3_SECRET_KEY": "SWORDFISH2",
        "NCCL_API_TOKEN": "SWORDFISH3",
        "SLURM_JOB_NAME": "hf_" + "SWORDFISH4" * 5,
        "CUDA_VISIBLE_DEVICES": "SWORDFISH5" * 8,
        "MASTER_ADDR": "http://me:SWORDFISH6@host",
        "PYTHON_KEYRING_PASSWORD": "SWORDFISH7",
    }
    for name, value in (secrets | {"NCCL_DEBUG": "INFO"}).items():
        monkeypatch.setenv(name, value)
    assert launched(data_set) == 0
    folder = Path("run/launch/000")
    texts = [path.read_bytes() for path in Path("run").rglob("*") if path.is_file()]
    assert len(texts) > 50
    assert not [text for text in texts if b"SWORDFISH" in text]
    assert "\nNCCL_DEBUG=INFO\n" in (folder / "environment.txt").read_text()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent, *folder.glob("*.*"))}
    assert modes == {"000": 0o700, "launch": 0o700} | dict.fromkeys(
        ("config.yaml", "environment.txt", "job.sbatch"), 0o600
    )


SWORDFISH = [
    ["--env", "WANDB_API_KEY", "SWORDFISH"],
    ["--setup", "export HF_TOKEN=SWORDFISH"],
    ["--srun", "export=ALL,MY_PASSWORD=SWORDFISH"],
    ["--data.path", "https://me:SWORDFISH@host/data"],
    ["--data.mix", "https://host/data?X-Amz-Signature=SWORDFISH", "1"],
]


@pytest.mark.parametrize("words", SWORDFISH, ids=lambda words: words[0])
def test_a_secret_in_an_option_is_refused_and_not_shown(slurm, data_set, capsys, words):
    line = refused(capsys, "launch", "pretrain", *TINY, "--run", "run", *words)
    assert "SWORDFISH" not in line
    assert not Path("run").exists()


LINE_ENDS = [
    *(["--" + name, "a\ntouch x\n#"] for name in ("partition", "account", "qos", "mem", "exclude", "dependency")),
    ["--job-name", "a\rb"],
    ["--env", "A", "1\ntouch x"],
    ["--sbatch", "constraint=a\n#SBATCH --wrap=x"],
    ["--sbatch", "exclusive --wrap=x"],
    ["--srun", "container-image=a\x1b[2J"],
    ["--setup", "module load a\ntouch x"],
    ["--time", "1:00\n"],
    ["--nodes", "1\n"],
    ["--run", "r\nun"],
    ["--run", "r\x85un"],
]


@pytest.mark.parametrize("words", LINE_ENDS, ids=repr)
def test_a_line_end_in_a_value_of_a_job_is_refused(slurm, data_set, capsys, words):
    args = [*TINY, "--data.path", str(data_set), "--run", "run", "--dry-run", *words]
    refused(capsys, "launch", "pretrain", *args)


def test_a_line_end_in_a_site_file_a_grid_or_an_input_is_refused(slurm, data_set, capsys, corpus):
    Path("site.yaml").write_text('partition: "gpu\\ntouch x"\n')
    args = [*TINY, "--data.path", str(data_set), "--run", "run"]
    refused(capsys, "launch", "pretrain", *args, "--site", "site.yaml")
    refused(capsys, "launch", "sweep", *args, "--grid", "data.cache", "a,b\nc")
    refused(capsys, "launch", "prep", f"{corpus}\ntouch x", "--out", "out", "--dry-run")
    refused(capsys, "launch", "prep", corpus, "--out", "o\nut")
    huge = [
        "--grid",
        "train.seed",
        ",".join(map(str, range(101))),
        "train.lr",
        ",".join(f"{n}e-9" for n in range(1, 101)),
    ]
    assert "10100 combinations" in refused(capsys, "launch", "sweep", *args, *huge)
    assert os.listdir(".") in (["bin", "site.yaml"], ["site.yaml", "bin"])


def test_escape_sequences_of_a_run_do_not_reach_the_terminal(tmp_path, slurm, capsys):
    run = tmp_path / "run"
    run.mkdir()
    events.record(run, "failed", text=ESCAPES)
    events.record(run, "ended", kind="x", step=1, cause=ESCAPES + "\nfinished")
    assert cli.main(["status", str(run)]) == 0
    assert cli.main(["status", str(run), "--json"]) == 0
    out = capsys.readouterr().out
    assert "red" in out
    assert printable(out, keep="\n") == out
    assert not [line for line in out.splitlines() if line.startswith("finished")]


def test_escape_sequences_of_documents_do_not_reach_the_terminal(tmp_path, capsys):
    lines = [f'{{"id": "{n}", "text": "\\u001b]0;owned\\u0007\\u001b[31mred words of {n} "}}\n' * 3 for n in range(40)]
    source = tmp_path / f"e{ESCAPES}.jsonl"
    source.write_text("".join(lines) + '{"text": 1}\n')
    out = tmp_path / f"d{ESCAPES}"
    assert cli.main(["prep", str(source), "--out", str(out), "--length", "16", "--tokenizer", "bpe:280"]) == 0
    assert cli.main(["check", str(out), "--workers", "1"]) == 0
    assert cli.main(["check", str(out), "--workers", "1", "--json"]) == 0
    shown = capsys.readouterr()
    assert "red" in shown.out
    for text in shown:
        assert printable(text, keep="\n\t") == text


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "run", "--prompt", "ab\udcff\udcfe"],
        ["sample", "run", "--prompt=\udcff"],
        ["prep", "x.jsonl", "--out", "o", "--bos", "\udcff"],
        ["sample", "\udcff"],
    ],
    ids=repr,
)
def test_words_that_are_not_utf8_are_one_line(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert "is not UTF-8; write it in UTF-8" in refused(capsys, *words)


def test_a_run_folder_is_a_place_of_its_own(tmp_path, data_set):
    (tmp_path / "link").symlink_to(data_set)
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "file").touch()
    data, wrong = str(tmp_path / "data"), "lies in "
    for run, path, words in [
        (data, data, wrong),
        (f"{data}/train/../run", f"{tmp_path}/up/data", wrong),
        (data, f"file://{data}", wrong),
        (str(tmp_path), data, wrong),
        (str(tmp_path / "up" / "link"), data, "is a link to"),
        (str(tmp_path / "file"), data, "is not a folder"),
    ]:
        with pytest.raises(ConfigError, match=words):
            check_place(load_run_config(["--run", run, "--data.path", path]))
    check_place(load_run_config(["--run", str(tmp_path / "up" / "run"), "--data.path", str(tmp_path / "link")]))


def test_a_linked_run_folder_is_refused_by_what_writes_into_it(tmp_path, capsys):
    (tmp_path / "real" / "checkpoints").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    for words in (["attempt", link, "--", "true"], ["convert", "upgrade", link]):
        assert f"run={link}: is a link to {tmp_path / 'real'}" in refused(capsys, *words)
    assert [path.name for path in (tmp_path / "real").rglob("*")] == ["checkpoints"]


def test_a_run_in_the_data_set_is_refused_by_the_commands(slurm, data_set, capsys):
    before = sorted(data_set.iterdir())
    args = [*TINY, "--data.path", data_set]
    assert "lies in the data set" in refused(capsys, "pretrain", *args, "--run", data_set)
    assert "lies in the data set" in refused(capsys, "launch", "pretrain", *args, "--run", data_set / "run")
    assert refused(capsys, "pretrain", *args, "--run", "") == "--run: empty; give a value"
    Path("empty.yaml").write_text("run: ''\n")
    assert "run=: empty; give a folder" in refused(capsys, "pretrain", *args, "--config", "empty.yaml")
    assert sorted(data_set.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        ["status", ""],
        ["check", ""],
        ["eval", "", "--rows", "2"],
        ["prep", "", "--out", "o"],
        ["prep", "x", "--out", ""],
        ["convert", "export", "", "o"],
        ["sample", "run", "--count", "1" + "0" * 12],
        ["sample", "run", "--steps", "1" + "0" * 12],
        ["sample", "run", "--tokens", "1" + "0" * 30],
        ["eval", "run", "--draws", "1" + "0" * 12],
        ["check", "run", "--samples", "1" + "0" * 12],
        ["launch", "prep", "x", "--out", "o", "--tasks", "1" + "0" * 12],
        ["launch", "pretrain", "--chain", "1" + "0" * 12],
        ["launch", "pretrain", "--nodes", "1-999999999"],
    ],
    ids=repr,
)
def test_empty_words_and_huge_numbers_are_one_line(slurm, capsys, words):
    refused(capsys, *words)
    assert os.listdir(".") == ["bin"]


def test_more_workers_than_a_machine_can_hold_are_refused():
    from data_prep.build import pool

    with pytest.raises(UserError, match="workers=100000: too many for the cores of this machine"):
        next(pool.run(os.path.basename, ["a", "b"], 100_000, lambda _: None))


@pytest.mark.parametrize("what", ["a file", "a data set", "garbage", "nothing"])
def test_status_of_what_is_no_run_is_one_line(tmp_path, data_set, capsys, what):
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "config.txt").write_bytes(os.urandom(100))
    (tmp_path / "a file").touch()
    folders = {"a file": tmp_path / "a file", "a data set": data_set, "garbage": garbage, "nothing": tmp_path / "no"}
    assert "not a run folder" in refused(capsys, "status", folders[what])


def test_a_killed_export_leaves_nothing_after_the_next(tmp_path):
    code = "import os, sys\nfrom pathlib import Path\nfrom bd3_common.atomic import atomic_folder\n"
    code += (
        "with atomic_folder(Path(sys.argv[1])) as f:\n    (f / 'model').write_text('x')\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "e24"], check=False)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".e24.")]
    with atomic_folder(tmp_path / "e24"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["e24"]
