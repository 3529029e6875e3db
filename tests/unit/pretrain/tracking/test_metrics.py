"""The record of a run: exact, whole, and the same whether or not the run was interrupted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_common.errors import ConfigError
from pretrain.run_folder.layout import METRICS, THROUGHPUT
from pretrain.tracking.metrics import MetricsWriter, plain, read_metrics, series


def write(run: Path, first: int, last: int) -> None:
    """Steps ``first`` to ``last`` of a run whose numbers depend on the step alone."""
    with MetricsWriter(run, resume_step=first - 1) as writer:
        for step in range(first, last + 1):
            writer.train(step, {"loss": 10 / step, "tokens": 512 * step})
            writer.throughput(step, {"seconds_per_step": 0.1 * first})
            if step % 3 == 0:
                writer.validation(step, {"nelbo": 9 / step})


@settings(deadline=None, max_examples=40)
@given(stops=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=4), torn=st.integers(0, 40))
def test_an_interrupted_run_writes_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, stops: list[tuple[int, int]], torn: int
) -> None:
    """Die at any step with a torn last line, and resume from any earlier checkpoint, any number of times."""
    whole, broken = (tmp_path_factory.mktemp(name) for name in ("whole", "broken"))
    write(whole, 1, 12)
    done = 0
    for stop, checkpoint in stops:
        write(broken, done + 1, max(stop, done))
        done = min(checkpoint, max(stop, done))
        for name in (METRICS, THROUGHPUT):
            with (broken / name).open("ab") as file:
                file.write(b'{"step": 99, "split": "train", "loss": 1.23456}'[:torn])
    write(broken, done + 1, 12)
    assert (broken / METRICS).read_bytes() == (whole / METRICS).read_bytes()
    assert [r["step"] for r in read_metrics(broken, THROUGHPUT)] == list(range(1, 13))
    assert {file.name for file in broken.iterdir()} == {METRICS, THROUGHPUT}


@settings(deadline=None)
@given(st.floats(allow_nan=False))
def test_floats_keep_every_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    line = json.dumps({"x": plain(value)})
    assert math.copysign(1, json.loads(line)["x"]) == math.copysign(1, value)
    assert json.loads(line)["x"] == value


def test_numbers_of_numpy_and_torch(tmp_path: Path) -> None:
    single = np.float32(0.1)
    with MetricsWriter(tmp_path) as writer:
        writer.train(1, {"a": single, "b": torch.tensor(0.1), "c": np.int64(3), "d": math.nan, "e": None})
    (record,) = read_metrics(tmp_path)
    assert record["a"] == record["b"] == float(single)
    assert record["c"] == 3
    assert isinstance(record["c"], int)
    assert math.isnan(record["d"])
    assert record["e"] is None


@pytest.mark.parametrize("value", ["0.1", True, [1.0], torch.zeros(2), 1j])
def test_only_numbers_are_metrics(value: object) -> None:
    with pytest.raises((TypeError, RuntimeError, ValueError)):
        plain(value)


def test_timings_stay_out_of_the_metrics(tmp_path: Path) -> None:
    write(tmp_path, 1, 3)
    assert "seconds" not in (tmp_path / METRICS).read_text()
    assert series(read_metrics(tmp_path, THROUGHPUT), "throughput", "seconds_per_step")[0] == [1, 2, 3]


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.train(1, {"loss": 2.5})
    assert read_metrics(tmp_path) == [{"step": 1, "split": "train", "loss": 2.5}]
    writer.close()


def test_reading(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    write(tmp_path, 1, 6)
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b'{"step": 7, "split": "train", "loss": 1.4}')  # whole, but its end of line is missing
    records = read_metrics(tmp_path)
    assert series(records, "train", "tokens") == ([1, 2, 3, 4, 5, 6], [512 * step for step in range(1, 7)])
    assert series(records, "validation", "nelbo") == ([3, 6], [3.0, 1.5])
    assert series(records, "train", "nelbo") == ([], [])


@pytest.mark.parametrize("damage", [b"\x00\x00\n", b"[1]\n", b'{"loss": 1}\n', b"\n"])
def test_damage_before_the_end_is_reported(tmp_path: Path, damage: bytes) -> None:
    write(tmp_path, 1, 2)
    path = tmp_path / METRICS
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + second)
    with pytest.raises(ConfigError) as caught:
        MetricsWriter(tmp_path, resume_step=2)
    assert str(caught.value) == f"{path}: line 2 is not a record; delete that line"
    assert path.read_bytes() == first + damage + second


def test_a_failed_truncation_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 4)
    before = (tmp_path / METRICS).read_bytes()

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bd3_common.atomic.os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        MetricsWriter(tmp_path, resume_step=2)
    assert (tmp_path / METRICS).read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {METRICS, THROUGHPUT}


def test_tensorboard_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, scale in ((1, 5, 1.0), (4, 6, 2.0)):
        with MetricsWriter(tmp_path, resume_step=first - 1, sinks=["tensorboard"]) as writer:
            for step in range(first, last + 1):
                writer.train(step, {"loss": scale * step})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    scalars = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert scalars == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 8.0), (5, 10.0), (6, 12.0)]


def short_writes(monkeypatch: pytest.MonkeyPatch, room: list[int]) -> None:
    """Writes that take at most 7 bytes at a time, and fail once ``room[0]`` bytes are written."""
    original = os.write

    def write(file: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        count = original(file, bytes(data)[: min(7, room[0])])
        room[0] -= count
        return count

    monkeypatch.setattr("bd3_common.lines.os.write", write)


def test_a_disk_that_is_full_for_a_moment_tears_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [1000]
    with MetricsWriter(tmp_path) as writer:
        short_writes(monkeypatch, room)
        writer.train(1, {"loss": 1.0})
        whole = (tmp_path / METRICS).read_bytes()
        assert whole == b'{"step": 1, "split": "train", "loss": 1.0}\n'
        room[0] = 20
        with pytest.raises(OSError, match="No space"):
            writer.train(2, {"loss": 2.0})
        assert (tmp_path / METRICS).read_bytes() == whole
        room[0] = 1000
        writer.train(2, {"loss": 2.0})
        assert writer.position() == {"records": 2, "record_bytes": 2 * len(whole)}
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "was removed, replaced, or moved with its folder": lambda path: path.unlink(),
    "was removed, replaced, or moved": lambda path: (path.rename(path.with_name("aside")), path.write_bytes(b"")),
    "has 0 bytes instead of 43: another process changed it": lambda path: os.truncate(path, 0),
    "has 44 bytes instead of 43: another process changed it": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_record_that_is_changed_under_the_run_ends_it(tmp_path: Path, problem: str) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.train(1, {"loss": 1.0})
        DAMAGES[problem](tmp_path / METRICS)
        with pytest.raises(ConfigError) as caught:
            writer.train(2, {"loss": 1.0})
    assert str(caught.value).startswith(f"{tmp_path / METRICS}: {problem}")
    assert str(caught.value).endswith("under the run, which ends; start it again from its last checkpoint")


def test_a_torn_line_and_missing_records_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1, 3)
    path = tmp_path / METRICS
    with MetricsWriter(tmp_path, 3) as writer:
        position = writer.sync()
    lines = path.read_bytes().splitlines(keepends=True)
    assert position == {"records": 4, "record_bytes": sum(map(len, lines))}
    with path.open("ab") as file:
        file.write(b'{"step": 4')
    MetricsWriter(tmp_path, 3, expected=position).close()
    path.write_bytes(lines[0] + lines[3])
    MetricsWriter(tmp_path, 3, expected=position).close()
    path.write_bytes(b"".join(lines).replace(b"512", b"52"))
    MetricsWriter(tmp_path, 3, expected=position).close()
    MetricsWriter(tmp_path, 3, expected={"records": "4", "record_bytes": None}).close()
    end = "up to step 3 are gone since its checkpoint was written; the run goes on without"
    assert [record.message for record in caplog.records] == [
        f"{path}: the last line was torn; its 10 bytes are cut off",
        f"{path}: 2 of 4 records {end}",
        f"{path}: 1 of {position['record_bytes']} bytes {end}",
    ]
