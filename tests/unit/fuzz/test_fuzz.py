"""Fuzzing of every file that is read: the outcome is success, or one line for a person; nothing else happens.

``BD3_FUZZ_SECONDS=3600 pytest -m long tests/unit/fuzz`` goes on for an hour. A fault names its seed: the test
``test_one_seed`` repeats it with ``BD3_FUZZ_SEED=config/17``.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.unit.fuzz.mutations import Mutator
from tests.unit.fuzz.sandbox import Watch, outcome
from tests.unit.fuzz.targets import TARGETS, Target

MUTATIONS = 2000
BATCH = 50
BY_NAME = {target.name: target for target in TARGETS}
SHARES = sum(target.share for target in TARGETS)


class Bench:
    """The sample of one target: mutated, read and put back."""

    def __init__(self, target: Target, folder: Path, watch: Watch):
        self.target, self.watch = target, watch
        self.sample, self.root, self.outside = folder / "sample", folder / "root", folder / "outside"
        self.sample.mkdir(parents=True)
        self.outside.mkdir()
        (self.outside / "secret.tar").write_bytes(b"secret" * 1000)
        target.make(self.sample)

    def fault(self, seed: str) -> str | None:
        """The fault of one mutation, if any."""
        mutator = Mutator(seed, self.outside)
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.sample, self.root)
        matching = [(sorted(self.root.glob(pattern)), form) for pattern, form in self.target.files.items()]
        paths, form = mutator.random.choice([pair for pair in matching if pair[0]])
        path = mutator.random.choice([path for path in paths if path.is_file()])
        mutator.mutate(path, form)
        if mutator.random.random() < 0.5 and path.is_file() and not path.is_symlink():
            self.target.restamp(self.root)
        with self.watch.over(self.root, self.outside) as seen:
            problem = outcome(lambda: self.target.call(self.root))
        if seen:
            problem = f"{problem or ''}; touched {seen[:3]}"
        return None if problem is None else f"{seed}: {path.relative_to(self.root)}: {problem}"


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", BY_NAME)
def test_damaged_files_are_one_line(name, tmp_path, watch):
    bench = Bench(BY_NAME[name], tmp_path, watch)
    target = BY_NAME[name]
    assert outcome(lambda: target.call(bench.sample)) is None, "the sample itself"
    count = -(-MUTATIONS * target.share // SHARES)
    faults = [fault for number in range(count) if (fault := bench.fault(f"{name}/{number}")) is not None]
    assert not faults, "\n".join(faults[:20])


@pytest.mark.skipif("BD3_FUZZ_SEED" not in os.environ, reason="BD3_FUZZ_SEED names no seed")
def test_one_seed(tmp_path, watch):
    seed = os.environ["BD3_FUZZ_SEED"]
    assert Bench(BY_NAME[seed.partition("/")[0]], tmp_path, watch).fault(seed) is None


def test_a_module_imported_for_the_first_time_is_no_file_touched(watch, tmp_path, monkeypatch):
    (tmp_path / "late_import_for_test.py").write_text("")
    (tmp_path / "inside").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    with watch.over(tmp_path / "inside", tmp_path / "outside") as seen:
        importlib.import_module("late_import_for_test")
    assert not seen
    assert sys.dont_write_bytecode is False


@pytest.mark.long
def test_for_an_hour(tmp_path, watch, capsys):
    seconds = float(os.environ.get("BD3_FUZZ_SECONDS", "3600"))
    benches = {name: Bench(target, tmp_path / name, watch) for name, target in BY_NAME.items()}
    begin, done, faults = time.monotonic(), 0, list[str]()
    first = time.time_ns()
    while time.monotonic() - begin < seconds:
        for name, bench in benches.items():
            seeds = [f"{name}/{first + done + number}" for number in range(BATCH)]
            faults += [fault for seed in seeds if (fault := bench.fault(seed)) is not None]
            done += BATCH
    with capsys.disabled():
        print(f"\n{done} mutations in {time.monotonic() - begin:.0f} s, {len(faults)} faults")
    assert not faults, "\n".join(faults[:20])
