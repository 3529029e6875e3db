"""One file from outside adds an entry of each kind: the examples of docs/extending.md, used by the commands."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_common import plugins
from bd3_common.registry import Registry
from bd3_megatron import parallel
from pretrain import cli

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```", re.MULTILINE | re.DOTALL)
REGISTRY = re.compile(r"registry\s+`([\w.]+)\.(\w+)`,\s+entry\s+points\s+`([\w.]+)`")

MODEL = ("--model.layers", "2", "--model.hidden", "32", "--model.heads", "2", "--model.length", "32")
SIZES = (*MODEL, "--diffusion.block-size", "4", "--train.precision", "fp32")
TRAIN = [f"--train.{name}" for name in ("global-batch=4", "micro-batch=2", "warmup-steps=0")]


def sections() -> dict[str, str]:
    return {title: text for title, text in SECTION.findall(DOCUMENT.read_text("utf-8")) if FILE.search(text)}


def registry(section: str) -> tuple[Registry, str]:
    """The registry that a section names, and its group of entry points."""
    module, name, group = REGISTRY.search(section).groups()
    return getattr(importlib.import_module(module), name), group


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> dict[str, str]:
    """Names of the added entries by kind; all examples are loaded, each from a file of its own."""
    folder = tmp_path_factory.mktemp("plugins")
    names, files = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "_loaded", set())
        patch.setenv(plugins.VARIABLE, "")
        for title, text in sections().items():
            patch.setattr(registry(text)[0], "_added", {})
            ((name, code),) = FILE.findall(text)
            files.append(folder / name)
            files[-1].write_text(code)
            names[title] = re.search(r'\.add\("(\w+)"', code)[1]
        plugins.add([str(file) for file in files])
        parallel.stop()
        yield names
    for file in files:
        sys.modules.pop(file.stem, None)


@pytest.fixture(scope="module")
def run(example, data_set, tmp_path_factory) -> Path:
    """A run of two steps in which every kind that training chooses is an added one."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(pretrain(example, data_set, folder, steps=2)) == 0
    return folder


def chosen(example: dict[str, str]) -> list[str]:
    flags = {
        "Noise schedule": "--diffusion.schedule",
        "Attention backend": "--kernels.attention",
        "Backbone": "--model.backbone",
        "Metric sink": "--log.sinks",
    }
    return [word for title, flag in flags.items() for word in (flag, example[title])]


def pretrain(example: dict[str, str], data_set: Path, folder: Path, steps: int) -> list[str]:
    ends = ["--train.steps", str(steps), "--eval.rows", "4", "--preflight.no-enabled", "--log.no-tensorboard"]
    return ["pretrain", "--run", str(folder), "--data.path", str(data_set), *SIZES, *TRAIN, *ends, *chosen(example)]


def test_each_kind_is_one_file_that_help_and_messages_list(example, capsys) -> None:
    for title, text in sections().items():
        found, group = registry(text)
        assert found.group == group, title
        entry = next(entry for entry in found.entries() if entry.name == example[title])
        assert entry.summary, title
        assert example[title] in found.remedy("none"), title
    assert cli.main(["config", "--help"]) == 0
    page = re.sub(r"[^\w,]", "", capsys.readouterr().out)
    assert all(f",{example[title]}" in page for title in ("Noise schedule", "Attention backend", "Backbone"))
    assert example["Metric sink"] in page
    assert cli.main(["bench", "attention", "--help"]) == 0
    assert example["Attention backend"] in capsys.readouterr().out


def test_a_run_trains_with_them_and_resumes(example, data_set, run) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2
    assert (run / "train-loss.csv").read_text() == "".join(f"{n},{loss}\n" for n, loss in enumerate(losses, 1))
    assert cli.main(pretrain(example, data_set, run, steps=3)) == 0
    assert (run / "train-loss.csv").read_text().splitlines()[2].startswith("3,")


def test_a_run_is_estimated_and_evaluated(example, run, capsys) -> None:
    assert cli.main(["estimate", *SIZES, *TRAIN, "--model.vocab-size", "300", *chosen(example), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 0
    assert cli.main(["eval", str(run), "--rows", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nelbo"] > 0


def test_a_sample_is_decoded_and_a_checkpoint_converted(example, run, tmp_path, capsys) -> None:
    sample = ["sample", str(run), "--tokens", "7", "--no-stop", "--json", "--method", example["Decoding algorithm"]]
    assert cli.main(sample) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["nfe"]) == (7, 7)  # one call for each token
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    assert cli.main(["convert", "export", str(run), str(exported), "--format", example["Checkpoint format"]]) == 0
    assert json.loads((exported / "config.json").read_text())["model_type"] == "bd3_plain"
    assert cli.main(["convert", "import", str(exported), str(imported)]) == 0
    assert (imported / "config.yaml").is_file()


def test_texts_are_prepared_by_worker_processes(example, corpus, tmp_path, capsys) -> None:
    records = [json.loads(line) for line in corpus.read_text("utf-8").splitlines()]
    for number in range(2):
        lines = [f"{record['id']}\t{' '.join(record['text'].split())}\n" for record in records[number::2]]
        (tmp_path / f"{number}.tsv").write_text("".join(lines), "utf-8")
    out = tmp_path / "rows"
    args = ["prep", str(tmp_path / "0.tsv"), str(tmp_path / "1.tsv"), "--out", str(out), "--length", "32"]
    assert cli.main([*args, "--tokenizer", "bpe:300", "--workers", "2", "--validation-fraction", "0.3"]) == 0
    assert cli.main(["check", str(out), "--json", "--workers", "1"]) == 0
    splits = json.loads(capsys.readouterr().out.splitlines()[-1])["splits"]
    assert sum(split["documents"] for split in splits.values()) == len(records)


def test_all_kinds_have_an_example() -> None:
    assert len(sections()) == 7


def test_an_installed_package_adds_by_an_entry_point(tmp_path) -> None:
    text = sections()["Noise schedule"]
    ((name, code),) = FILE.findall(text)
    (tmp_path / name).write_text(code.partition("SCHEDULES.add")[0])
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry(text)[1]}]\nthird_power = cubic:Cubic\n")
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "pretrain.cli", "config", "--diffusion.schedule", "third_power"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "schedule: third_power" in done.stdout
