"""Metric sinks: who opens them, what reaches them, and that a resumed run goes on in them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from bd3_common.errors import ConfigError
from pretrain.config.schema import LogConfig, RunConfig
from pretrain.config.values import validate
from pretrain.run_folder.layout import METRICS, THROUGHPUT
from pretrain.tracking.metrics import MetricsWriter
from pretrain.tracking.sinks import METRIC_SINKS, MetricSink


def test_names_are_listed_without_importing_the_packages() -> None:
    names = set(METRIC_SINKS.names())
    assert {"jsonl", "tensorboard", "wandb"} <= names
    assert all(entry.summary for entry in METRIC_SINKS.entries())


def test_the_old_switch_and_the_list_of_sinks() -> None:
    assert LogConfig().sink_names() == ("tensorboard",)
    assert LogConfig(tensorboard=False).sink_names() == ()
    assert LogConfig(tensorboard=False, sinks=("wandb",)).sink_names() == ("wandb",)
    with pytest.raises(ConfigError, match=r"^log.sinks=wandbb: unknown metric sink; did you mean wandb\? use jsonl, "):
        validate(RunConfig, {"log": {"sinks": ["wandbb"]}})


def test_jsonl_is_written_once_though_named(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, sinks=["jsonl", "jsonl"]) as writer:
        writer.train(1, {"loss": 2.5})
    assert (tmp_path / METRICS).read_text().count("\n") == 1
    assert {file.name for file in tmp_path.iterdir()} == {METRICS, THROUGHPUT}


def test_a_missing_package_is_one_line_and_leaves_no_file_open(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"^log.sinks=wandb: wandb cannot be imported .*") as caught:
        MetricsWriter(tmp_path, sinks=["wandb"])
    assert str(caught.value).endswith("; pip install 'bd3-megatron[track]', or leave the sink out")


def test_every_sink_gets_every_record(tmp_path: Path, monkeypatch) -> None:
    class Kept(MetricSink):
        """Keeps records."""

        records: list[tuple[Any, ...]] = []  # noqa: RUF012

        def record(self, split, step, values):
            self.records.append((split, step, dict(values)))

        def close(self):
            self.records.append(("closed", self.resume_step, self.config["run"]))

    monkeypatch.setattr(METRIC_SINKS, "_added", {})
    METRIC_SINKS.add("kept", Kept)
    with MetricsWriter(tmp_path, 4, ["kept"], {"run": "a"}) as writer:
        writer.train(5, {"loss": 1.0})
        writer.validation(5, {"nelbo": None})
        writer.checkpoint(5, {"bytes": 7})
    assert Kept.records == [
        ("train", 5, {"loss": 1.0}),
        ("validation", 5, {"nelbo": None}),
        ("checkpoint", 5, {"bytes": 7}),
        ("closed", 4, "a"),
    ]


def test_wandb_offline_goes_on_under_the_same_id(tmp_path: Path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "tests")
    for first, last in ((1, 3), (3, 4)):
        with MetricsWriter(tmp_path, first - 1, ["wandb"], {"train": {"lr": 0.5}}) as writer:
            for step in range(first, last + 1):
                writer.train(step, {"loss": 1 / step, "skipped": None})
    wandb.teardown()  # as at the end of a process: waits for what is being written
    name = (tmp_path / "wandb_id.txt").read_text().strip()
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert folders
    # two starts within one second: W&B numbers the second folder (…-ID-1); its log has the id
    assert [path.name for folder in folders for path in folder.glob("*.wandb")] == [f"run-{name}.wandb"] * len(folders)
    found = [record for folder in folders for record in offline_records(folder)]
    steps = [(float(row["step"]), float(row["train/loss"])) for row in found if "train/loss" in row]
    assert steps == [(1, 1), (2, 1 / 2), (3, 1 / 3), (3, 1 / 3), (4, 1 / 4)]
    assert not any("train/skipped" in row for row in found)


def offline_records(folder: Path) -> list[dict[str, str]]:
    """Rows of the history in the log of an offline W&B run, values as JSON."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (path,) = folder.glob("*.wandb")
    store = DataStore()
    store.open_for_scan(str(path))
    rows = []
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): item.value_json for item in items})
    return rows
