"""The command's front door: exit codes, one line per mistake, nothing heavy imported too early."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_common import errors
from bd3_common.errors import ConfigError
from data_prep.errors import DataError
from pretrain import cli
from pretrain.bench import BENCHMARKS

LEAVES = [
    *("prep", "check", "pretrain", "preflight", "eval", "compare", "sample", "config", "estimate", "status", "attempt"),
    *("convert export", "convert import", "launch pretrain", "launch sweep", "launch prep", "prep repack"),
]
HEAVY = {"torch", "numpy", "transformers", "megatron", "pydantic", "tyro", "rich", "yaml", "matplotlib"}


def bd3(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Installs a function as the command ``try``."""

    def install(function) -> None:
        monkeypatch.setitem(cli.COMMANDS, "try", (f"{__name__}:_try", "for this test"))
        monkeypatch.setattr(sys.modules[__name__], "_try", function, raising=False)

    return install


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_first_answers_import_nothing_heavy(flag: str) -> None:
    code = "import sys; from pretrain.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "pretrain" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("command", [*LEAVES, *(f"bench {name}" for name in BENCHMARKS)])
def test_help_and_a_mistyped_flag_do_not_wait_for_torch(command: str) -> None:
    code = (
        "import contextlib, io, sys; from pretrain.cli import main; out, err = io.StringIO(), io.StringIO()\n"
        "with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "    codes = main([*sys.argv[1:], '--help']), main([*sys.argv[1:], '--nonesuch'])\n"
        "assert codes == (0, 2), (codes, err.getvalue())\n"
        "assert '--plugin MODULE' in out.getvalue() and err.getvalue().count('\\n') == 1, err.getvalue()\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "megatron", "tokenizers", "transformers", "matplotlib"}


def test_every_command_is_among_them() -> None:
    assert {command.split()[0] for command in LEAVES} | {"bench"} == set(cli.COMMANDS)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed and text in listed for name, (_, text) in cli.COMMANDS.items())
    assert cli.main([]) == 2


@pytest.mark.parametrize("name", ["convert", "bench"])
def test_a_command_of_commands_alone_shows_them(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert [cli.main([name]), cli.main([name, "--help"])] == [2, 0]
    once, again = capsys.readouterr().out.splitlines()
    assert once == again
    assert once.startswith(f"usage: bd3 {name} ")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("pretrian", "pretrian: unknown command; did you mean pretrain?"),
        ("xyz", "xyz: unknown command; use prep, "),
    ],
)
def test_unknown_command(name: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name]) == 2
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("config --model.layrs 3", "--model.layrs: unknown option; did you mean --model.layers?"),
        ("config --model.layers x", "model.layers=x: not an integer"),
        ("config --config /nowhere.yaml", "/nowhere.yaml: no such configuration file; check the path"),
        (
            "config --preset tiny-cpu --parallel.tensor 3",
            "parallel.tensor=3: model.heads=4 is not divisible by 3; use 1 or 2",
        ),
        ("confg", "confg: unknown command; did you mean config?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args: str, line: str) -> None:
    done = bd3(*args.split())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")


def test_a_good_command_prints_to_stdout_alone() -> None:
    done = bd3("config", "--preset", "tiny-cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("run: ")


def test_help_of_a_command() -> None:
    done = bd3("config", "--help")
    assert done.returncode == 0
    assert "--model.layers" in done.stdout


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("model.x=1: no"), "model.x=1: no"),
        (DataError("a.jsonl: line 3 is not JSON"), "a.jsonl: line 3 is not JSON"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"),
            "/a/b: cannot read or write: No such file or directory",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "/a: cannot write: Read-only file system"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/no/x"),
            "/no/x: cannot write: Permission denied",
        ),
    ],
)
def test_errors_a_user_can_mend(command, error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: list[str]) -> None:
        raise error

    command(fail)
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == line + "\n"


def test_an_unreadable_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path))
    assert errors.user_line(error) == f"{tmp_path}: cannot read: Permission denied"


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), ConnectionResetError(104, "reset")])
def test_bugs_keep_their_traceback(command, error: Exception) -> None:
    def fail(_: list[str]) -> None:
        raise error

    command(fail)
    with pytest.raises(type(error)):
        cli.main(["try"])


def test_exit_codes(command, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: list[str]) -> None:
        raise KeyboardInterrupt

    command(interrupt)
    assert cli.main(["try"]) == 130
    command(lambda args: len(args))
    assert cli.main(["try", "a", "b", "c"]) == 3
    command(lambda args: None)
    assert cli.main(["try"]) == 0
    command(lambda args: sys.exit("stopped"))
    assert cli.main(["try"]) == 1
    assert capsys.readouterr().err.splitlines() == ["interrupted", "stopped"]


def test_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "pretrain.cli", "config", "--preset", "tiny-cpu"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_prep_prints_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    lines = [f'{{"id": "d{i}", "text": "{f"some words of document {i} " * 40}"}}' for i in range(40)]
    text.write_text("\n".join(lines))
    out = tmp_path / "rows"
    args = [str(text), "--out", str(out), "--length", "16", "--tokenizer", "bpe:300"]
    assert cli.main(["prep", *args]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"{out}: 16 tokens per row, vocabulary ")
    assert [line.split(":")[0].strip() for line in shown[1:3]] == ["train", "validation"]
    assert cli.main(["prep", "--out", str(out)]) == 2
    assert capsys.readouterr().err == "INPUTS is missing; usage: bd3 prep INPUTS... --out OUT [OPTIONS]\n"
    assert cli.main(["prep", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "x")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
