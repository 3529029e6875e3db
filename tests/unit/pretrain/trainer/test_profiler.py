"""Traces of steps, and what a run says and leaves when memory runs out."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path

import pytest
import torch

from bd3_common.errors import ConfigError
from pretrain.config.resolve import load_run_config
from pretrain.config.schema import ProfileConfig, RunConfig, check_profile
from pretrain.trainer.profiler import Profiler, out_of_memory
from tests.conftest import LENGTH
from tests.unit.commands import Done, bd3

SHAPE = ("--model.layers", 1, "--model.hidden", 32, "--model.heads", 4, "--model.length", LENGTH)
TRAIN = ("--train.global-batch", 4, "--train.micro-batch", 4, "--train.precision", "fp32", "--eval.rows", 4)
SAYS = (
    "Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free. Including "
    "non-PyTorch memory, this process has 78.00 GiB memory in use."
)


def pretrain(folder: Path, data_set: Path, *args: object, **options) -> Done:
    run = ("--data.path", data_set, "--run", folder / "run", "--log.tensorboard", "false")
    return bd3("pretrain", *run, *SHAPE, *TRAIN, *args, log=folder / "log", **options)


def events(path: Path) -> list[dict]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


# ---- traces ----


def test_a_trace_shows_the_steps_with_their_forward_and_backward_pass(tmp_path, data_set):
    done = pretrain(tmp_path, data_set, "--train.steps", 4, "--profile", "--profile.steps", 2)
    assert done.code == 0, done.err
    path = tmp_path / "run" / "profile" / "steps-3-4.rank-0.json.gz"
    assert list(path.parent.iterdir()) == [path]
    assert f"trace of steps 3 to 4: {path}" in done.messages
    found = [event for event in events(path) if event.get("ph") == "X"]
    steps = {event["name"]: event for event in found if event["name"].startswith("step ")}
    assert sorted(steps) == ["step 3", "step 4"]
    for step in steps.values():
        inside = {e["name"] for e in found if step["ts"] <= e["ts"] and e["ts"] + e["dur"] <= step["ts"] + step["dur"]}
        assert "aten::mm" in inside
        assert any(name.startswith("autograd::engine::evaluate_function") for name in inside)
    assert not any("Input Dims" in event.get("args", {}) for event in found)

    # The same folder, gone on with: a step behind it leaves no trace, and the run's end cuts one short.
    done = pretrain(tmp_path, data_set, "--train.steps", 5, "--profile.start", 2)
    assert "profile.start=2: the run goes on after step 4; use 0 or a later step for a trace" in done.err
    assert "no trace" not in done.err
    done = pretrain(tmp_path, data_set, "--train.steps", 6, "--profile", 6, "--profile.shapes", "true")
    assert done.code == 0, done.err
    assert sorted(found.name for found in path.parent.iterdir()) == [path.name, "steps-6-6.rank-0.json.gz"]
    assert any("Input Dims" in event.get("args", {}) for event in events(path.with_name("steps-6-6.rank-0.json.gz")))


def test_a_trace_that_never_began_is_missed(tmp_path, caplog):
    profiler = Profiler(ProfileConfig(start=0), tmp_path, 0, 4)
    for number in (5, 6):
        with profiler.step(number):
            pass
    profiler.close()
    assert caplog.messages == ["profile.start=0: no trace, because the run ended before step 7"]
    Profiler(ProfileConfig(), tmp_path, 0, 4).close()
    assert len(caplog.messages) == 1


def test_ranks_that_write_a_trace_exist():
    check_profile(ProfileConfig(start=0, ranks=(0, 3)), 4)
    check_profile(ProfileConfig(ranks=(7,)), 1)
    with pytest.raises(ConfigError, match=r"^profile.ranks=0 4: there is no rank 4 among 4; use 0 to 3$"):
        check_profile(ProfileConfig(start=9, ranks=(0, 4)), 4)


@pytest.mark.parametrize(
    ("args", "start"),
    [
        ([], None),
        (["--profile"], 0),
        (["--profile", "--train.steps", "8"], 0),
        (["--profile", "7"], 7),
        (["--profile=7"], 7),
        (["--profile.start", "4"], 4),
        (["--profile.start", "null"], None),
    ],
)
def test_ways_to_ask_for_a_trace(args, start):
    config = load_run_config(args)
    assert config.profile.start == start
    assert config.train.steps == (8 if "8" in args else 1000)


def test_other_ranks_than_those_asked_for_leave_no_trace(tmp_path, caplog):
    caplog.set_level("INFO", "pretrain")
    for rank in range(3):
        profiler = Profiler(ProfileConfig(start=5, steps=1, ranks=(0, 2)), tmp_path, rank, 4)
        with profiler.step(5):
            torch.ones(2) + 1
        profiler.close()
    names = [f"steps-5-5.rank-{rank}.json.gz" for rank in (0, 2)]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == names
    assert len(caplog.messages) == 2


def test_a_step_that_fails_ends_the_trace_with_the_steps_before_it(tmp_path):
    profiler = Profiler(ProfileConfig(start=1), tmp_path, 0, 0)
    with profiler.step(1):
        torch.ones(2) + 1
    with pytest.raises(ValueError, match="no"), profiler.step(2):
        raise ValueError("no")
    profiler.close()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps-1-1.rank-0.json.gz"]
    profiler = Profiler(ProfileConfig(start=1), tmp_path / "other", 0, 0)
    with pytest.raises(ValueError, match="no"), profiler.step(1):
        raise ValueError("no")
    profiler.close()
    assert not (tmp_path / "other").exists()


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file where the folder should be")
    profiler = Profiler(ProfileConfig(start=1, steps=1), tmp_path, 0, 0)
    with profiler.step(1):
        torch.ones(2) + 1
    with profiler.step(2):
        pass
    assert caplog.messages == [f"no trace in {tmp_path / 'profile'}: [Errno 17] File exists: '{tmp_path / 'profile'}'"]


# ---- out of memory ----


def _runs_out(step: int) -> None:
    """From the ``step``-th on, steps need more memory than there is."""
    from bd3_megatron.engine.megatron import MegatronEngine

    original, calls = MegatronEngine.train_step, []

    def train_step(self, *args):
        calls.append(1)
        if len(calls) >= step:
            raise torch.OutOfMemoryError(SAYS)
        return original(self, *args)

    MegatronEngine.train_step = train_step


def test_a_run_out_of_memory_ends_in_one_line(tmp_path, data_set):
    done = pretrain(tmp_path, data_set, "--train.steps", 3, before=functools.partial(_runs_out, 2))
    assert done.code == 2
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1] == (
        "train.micro_batch=4: in step 2 rank 0 ran out of memory when it asked for 2.50 GiB; use train.micro_batch=2 "
        "or parallel.recompute=selective; there is no snapshot without CUDA"
    )


def line(config: RunConfig, phase: str = "in step 12", text: str = SAYS, **options) -> str:
    with pytest.raises(ConfigError) as caught, out_of_memory(config, 3, lambda: phase, **options):
        raise torch.OutOfMemoryError(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_snapshot_lies_in_the_run_folder(tmp_path):
    config = RunConfig(run=str(tmp_path / "run"))
    path = tmp_path / "run" / "oom" / "rank-3.pickle"
    said = line(config, dump=lambda to: Path(to).write_bytes(b"blocks"))
    assert said.endswith(f"; pytorch.org/memory_viz shows what was allocated from {path}")
    assert path.read_bytes() == b"blocks"


def test_a_snapshot_that_cannot_be_written_does_not_hide_the_line(tmp_path):
    def full(path: str) -> None:
        raise OSError(28, "No space left on device")

    said = line(RunConfig(run=str(tmp_path)), dump=full)
    assert said.startswith("train.micro_batch=8: in step 12 rank 3 ran out of memory when it asked for 2.50 GiB; use ")
    assert said.endswith("; no snapshot could be written: [Errno 28] No space left on device")


@pytest.mark.parametrize(
    ("changes", "phase", "expected"),
    [
        ({}, "in step 1", "train.micro_batch=8: in step 1 rank 3 ran out of memory; use train.micro_batch=4 or "),
        (
            {"train": {"micro_batch": 1}, "parallel": {"recompute": "selective"}},
            "in step 1",
            "train.micro_batch=1: in step 1 rank 3 ran out of memory; use parallel.recompute=full or "
            "parallel.distributed_optimizer=true on more ranks; ",
        ),
        (
            {"train": {"micro_batch": 1}, "parallel": {"recompute": "full", "distributed_optimizer": True}},
            "in step 1",
            "train.micro_batch=1: in step 1 rank 3 ran out of memory; use parallel.tensor=2; ",
        ),
        (
            {"eval": {"micro_batch": 32}},
            "in the evaluation after step 0",
            "eval.micro_batch=32: in the evaluation after step 0 rank 3 ran out of memory; use eval.micro_batch=16 or ",
        ),
    ],
)
def test_the_remedy_fits_the_configuration(changes, phase, expected):
    assert line(RunConfig(**changes), phase, "out of memory").startswith(expected)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="else"), out_of_memory(RunConfig(), 0, lambda: "in step 1"):
        raise RuntimeError("something else")
