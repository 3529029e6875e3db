"""Console: progress lines, the bar, curves."""

from __future__ import annotations

import io
import logging
import math
from pathlib import Path

import pytest

from bd3_common import logs
from pretrain.tracking.console import Progress, Throughput, describe, duration, si
from pretrain.tracking.metrics import MetricsWriter
from pretrain.tracking.plots import ascii_curve, plot_curves, smooth

FIELDS = {
    "loss": 3.21456,
    "grad_norm": 0.5234,
    "lr": 1e-3,
    "tokens_per_second": 12_345.0,
    "mfu": 0.412,
    "mfu_6nd": 0.38,
    "seconds_per_step": 2.0,
}
LINE = "loss 3.215 | grad 0.523 | lr 1.0e-03 | 12.3k tok/s | MFU 41.2% (6ND 38.0%)"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_speed_is_of_the_window() -> None:
    clock = Clock()
    meter = Throughput(step=10, tokens=1000, window=2, clock=clock)
    speeds = []
    for step, seconds in ((11, 4.0), (12, 1.0), (13, 1.0), (14, 3.0)):
        clock.now += seconds
        speeds.append(meter.mark(step, step * 100)["tokens_per_second"])
    assert speeds == [25.0, 40.0, 100.0, 50.0]
    assert meter.mark(14, 1400) == {"seconds_per_step": 3.0, "tokens_per_second": pytest.approx(100 / 3)}


def test_mfu_counts_two_ways_and_pauses_do_not_count() -> None:
    clock = Clock()
    meter = Throughput(useful_flops=3e6, model_flops=2e6, peak_flops=1e9, clock=clock)
    assert meter.mark(0, 0) == {}
    clock.now += 1.0
    with meter.paused():
        clock.now += 60.0
    clock.now += 1.0
    assert meter.mark(4, 200) == {
        "seconds_per_step": 0.5,
        "tokens_per_second": 100.0,
        "mfu": pytest.approx(0.3),
        "mfu_6nd": pytest.approx(0.2),
    }


def test_lines_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pretrain")
    with Progress(total_steps=25, start_step=3, every=10, stream=io.StringIO()) as progress:
        for step in range(4, 26):
            progress.update(step, FIELDS)
    lines = caplog.messages
    assert [line.split(" | ")[0] for line in lines] == ["step 4/25", "step 10/25", "step 20/25", "step 25/25"]
    assert lines[1] == f"step 10/25 | {LINE} | ETA 0:00:30"


def test_fields_that_are_missing_are_not_shown() -> None:
    assert describe(1, 2, {}) == "step 1/2"
    assert describe(1, 2, {"loss": math.nan, "mfu": 0.5}) == "step 1/2 | loss nan | MFU 50.0%"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    stream = Terminal()
    logs.to_console()
    with Progress(total_steps=4, stream=stream) as progress:
        for step in range(1, 5):
            progress.update(step, FIELDS)
        logging.getLogger("pretrain.test").warning("perplexity [bold]")
    text = stream.getvalue()
    assert f"step 4/4 | {LINE} | ETA 0:00:00" in text
    assert "100%" in text
    assert "perplexity [bold]" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.50"), (9.994, "9.99"), (12345, "12.3k"), (999_499, "999k"), (1e6, "1.00M"), (2.5e12, "2500G")],
)
def test_si(value: float, text: str) -> None:
    assert si(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (200_000, "2 d 7:33:20")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_ascii_curve() -> None:
    assert ascii_curve([8, 7, 6, 5, 4, 3, 2, 1], "loss") == "loss  8 █▇▆▅▄▃▂▁ 1"
    assert ascii_curve([2.0, 2.0]) == "2 ▁▁ 2"
    assert ascii_curve([0.0, math.nan, math.inf, 1.0]) == "0 ▁  █ 1"
    assert ascii_curve([], "loss") == "loss  (no values)"
    long = ascii_curve([float(i) for i in range(1000)], width=8)
    assert long == "0 ▁▂▃▄▅▆▇█ 999"


def test_smooth() -> None:
    assert smooth([1, 2, 3, 4, 5], 3) == [1.5, 2, 3, 4, 4.5]
    assert smooth([1, math.nan, 3], 3) == [1, 2, 3]
    assert smooth([1, 5], 1) == [1, 5]


def run(tmp_path: Path) -> Path:
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 61):
            writer.train(step, {"loss": 8 / step})
        writer.validation(60, {"nelbo": 4.0, "nelbo_stderr": 0.1})
        writer.validation(61, {"nelbo": 1e9})
    return tmp_path


def test_plot(tmp_path: Path) -> None:
    path = plot_curves(run(tmp_path), reference={"unigram": 512.3})
    assert path == tmp_path / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.glob("*.png*")] == ["curves.png"]


def test_plot_of_a_run_without_records(tmp_path: Path) -> None:
    assert plot_curves(tmp_path, "empty.png").stat().st_size > 0


def test_a_failed_plot_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bd3_common.atomic.os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        plot_curves(run(tmp_path))
    assert {file.suffix for file in tmp_path.iterdir()} == {".jsonl"}
