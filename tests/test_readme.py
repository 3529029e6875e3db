"""The README's commands: light ones run, in order and in one folder; the others name what exists."""

from __future__ import annotations

import configparser
import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_common import ROOT
from pretrain.cli import COMMANDS
from tests.unit.commands import bd3

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What makes a command short enough for a test.
SHORT = {
    "pretrain": "--train.steps 4 --eval.rows 8 --checkpoint.every 4",
    "eval": "--rows 8",
    "sample": "--tokens 8",
    "launch": "--dry-run --model.length 128",  # that of the data which the README prepares
}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str = README) -> list[list[str]]:
    """Words of every command of the bash blocks, without comments."""
    joined = "\n".join(blocks("bash", text)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [part for line in lines for part in split(line, "&&") if part]


def split(words: list[str], separator: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the commands run, one after another."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "corpora").symlink_to(ROOT / "corpora")
    return folder


OURS = [words for words in commands() if words[0] == "bd3"]


@pytest.mark.parametrize("words", OURS, ids=lambda words: " ".join(words[:4]).replace("/", " "))
def test_commands_run(folder, words):
    short = shlex.split(SHORT.get(words[1], ""))
    chdir = functools.partial(os.chdir, folder)
    done = bd3(*words[1:], *short, log=folder / words[1], before=chdir, parent=True)
    assert done.code == 0, done.err


def test_the_export_is_used_as_shown(folder):
    (code,) = blocks("python")
    env = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HOME": str(folder / "hf")}
    code = code.replace("max_new_tokens=64", "max_new_tokens=4")
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, check=True)


def test_many_ranks_train_as_shown(folder):
    (words,) = [words for words in commands() if words[0] == "torchrun"]
    words[words.index("--nproc-per-node") + 1] = "2"
    scripts = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([*words, *shlex.split(SHORT["pretrain"])], cwd=folder, env=env, check=True)
    assert (folder / "run4" / "metrics.jsonl").is_file()


def test_targets_and_extras_exist():
    makefile = (ROOT / "Makefile").read_text()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for words in [words for page in PAGES for words in commands(page.read_text())]:
        if words[0] == "make":
            for word in words[1:]:
                name, equals, _ = word.partition("=")
                assert re.search(rf"^{re.escape(name)}{' [?:]?=' if equals else ':'}", makefile, re.MULTILINE), word
        elif words[:2] == ["pip", "install"]:
            extras = {name for word in words for group in re.findall(r"\[(.*)\]", word) for name in group.split(",")}
            assert extras <= set(setup["options.extras_require"]), words
        elif words[0] in ("bd3", "torchrun"):
            assert words[words.index("bd3") + 1] in COMMANDS, words
        else:
            assert words[0] in ("python", ".", "pre-commit", "sbatch", "pytest", "for", "export"), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_commands_that_exist(page):
    for name in re.findall(r"`bd3 ([a-z]\w*)", page.read_text()):
        assert name in COMMANDS
