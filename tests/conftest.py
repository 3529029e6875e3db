"""Fixtures shared by the tests: a world of one process, a small data set, and `bd3` as a process of its own."""

from __future__ import annotations

import atexit
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

# Before torch is imported, here and in the processes started below: the tests' tensors are too small to share out.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# Before transformers is imported: it would keep the code of the tests' exports in the home folder.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="bd3-test-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

# The one profile: a busy machine takes its time over an example.
settings.register_profile("bd3", deadline=None)
settings.load_profile("bd3")

CORPUS = Path(__file__).parents[1] / "corpora" / "austen.jsonl.gz"
LENGTH = 32


@pytest.fixture(scope="module")
def world():
    """A world of one process; left at the end, so that no module depends on another."""
    from bd3_megatron import parallel
    from bd3_megatron.config import ParallelConfig

    parallel.stop()
    yield parallel.start(ParallelConfig())
    parallel.stop()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """The beginnings of forty chapters, as plain JSONL."""
    path = tmp_path_factory.mktemp("corpus") / "chapters.jsonl"
    with gzip.open(CORPUS, "rt") as source, path.open("w") as out:
        for _, line in zip(range(40), source):
            chapter = json.loads(line)
            out.write(json.dumps({"id": chapter["id"], "text": chapter["text"][:600]}) + "\n")
    return path


@pytest.fixture(scope="session")
def data_set(corpus, tmp_path_factory) -> Path:
    """Rows of 32 tokens over a vocabulary of 300, made by the data room. To be read only."""
    from data_prep.build.prep import PrepConfig, prep

    out = tmp_path_factory.mktemp("data") / "austen"
    prep(PrepConfig(inputs=(str(corpus),), out=str(out), length=LENGTH, tokenizer="bpe:300", validation_fraction=0.3))
    return out


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape lone surrogates of captured texts: a worker of pytest-xdist could not send the report."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report
