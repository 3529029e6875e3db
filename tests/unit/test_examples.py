"""The scripts of ``examples/`` run, on little data."""

from __future__ import annotations

import runpy

import numpy as np
import pytest

from bd3_common import ROOT
from data_prep.read.reader import RowReader
from tests.unit.commands import bd3

EXAMPLES = ROOT / "examples"


def main(name: str):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "add_schedule.py",
        "read_shards.py",
        "train_from_python.py",
    }


def test_train_from_python(corpus, tmp_path, capsys):
    main("train_from_python.py")(str(corpus), str(tmp_path), "2")
    out = capsys.readouterr().out
    assert "2 train" in out
    assert "2 validation" in out


def test_add_schedule(data_set, tmp_path):
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "length": 32}
    options = [word for name, value in sizes.items() for word in (f"--model.{name}", value)]
    options += ["--train.steps", 2, "--train.global-batch", 4, "--train.micro-batch", 4, "--eval.rows", 4]
    plugin = ["--plugin", EXAMPLES / "add_schedule.py"]
    run = ["pretrain", *options, "--diffusion.schedule", "early", "--data.path", data_set, "--run", tmp_path / "run"]
    done = bd3(*run, *plugin, log=tmp_path / "with")
    assert done.code == 0, done.err
    assert "schedule: early" in (tmp_path / "run" / "config.yaml").read_text()
    assert bd3(*run, log=tmp_path / "without").code == 2


def test_read_shards(data_set, capsys):
    pytest.importorskip("webdataset")
    ours = RowReader(data_set, "train")
    rows = runpy.run_path(str(EXAMPLES / "read_shards.py"))["rows"]
    assert np.array_equal(np.stack(list(rows(str(data_set)))), ours.rows(np.arange(len(ours))))
    main("read_shards.py")(str(data_set))
    assert len(capsys.readouterr().out) > 20
