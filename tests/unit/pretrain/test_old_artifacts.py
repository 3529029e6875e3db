"""Artifacts written before the packages were divided into rooms still open: a run folder, its data set, its export.

``tests/data/before_rooms`` holds them: 2 layers of 16, rows of 32 tokens, 8 steps of which the checkpoint of step 4 is
kept. ``run/metrics.jsonl`` has the records of all 8 steps.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from tests.unit.commands import bd3

OLD = Path(__file__).parents[2] / "data" / "before_rooms"


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """A copy that may be written to."""
    copy = tmp_path_factory.mktemp("old")
    shutil.copytree(OLD, copy, dirs_exist_ok=True)
    return copy


def test_the_run_resumes_with_the_metrics_it_had(old):
    expected = (old / "run" / "metrics.jsonl").read_text()
    run = ["--run", old / "run", "--config", old / "run" / "config.yaml", "--data.path", old / "data"]
    done = bd3("pretrain", *run, log=old / "pretrain")
    assert done.code == 0, done.err
    found = (old / "run" / "metrics.jsonl").read_text()
    # Bitwise on the kind of CPU that wrote them; another kind sums in another order.
    if found != expected:
        for ours, theirs in zip(records(found), records(expected), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
    assert (old / "run" / "checkpoints" / "step-00000008" / "complete.json").is_file()


def test_the_data_set_passes_the_check(old):
    done = bd3("check", old / "data", log=old / "check")
    assert done.code == 0, done.err


def test_the_export_loads_and_imports(old):
    model = AutoModelForMaskedLM.from_pretrained(old / "export", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(old / "export", trust_remote_code=True)
    with torch.no_grad():
        ids = model.generate(max_new_tokens=4)
    assert tokenizer.decode(ids[0])
    done = bd3("convert", "import", old / "export", old / "imported", log=old / "import")
    assert done.code == 0, done.err
    assert (old / "imported" / "config.yaml").is_file()


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]
