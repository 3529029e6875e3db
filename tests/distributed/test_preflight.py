"""Preflights of real ranks that pretend to be on nodes of their own, some of them with a fault."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from data_prep.errors import DataError
from pretrain.preflight import probes
from pretrain.preflight import run as preflight_run
from tests.distributed.launch import Job
from tests.unit.commands import Done

PAUSE = 0.2  # seconds: far more than any measurement here takes
# Only ranks slowed down on purpose count as slow: the tests' processes share few cores.
TOLERANT = ("--preflight.slowest", 0.05)
MODEL = ("--model.length", 32)
TINY = """
model: {layers: 1, hidden: 32, heads: 4, kv_heads: 2, length: 32}
diffusion: {block_size: 4}
train: {steps: 2, global_batch: 4, micro_batch: 2, precision: fp32, warmup_steps: 2, ema_decay: 0}
eval: {every: 0, rows: 8}
log: {tensorboard: false}
"""


def node(number: int, fault: Callable[[], None] | None = None) -> None:
    """This process is on a node of its own."""
    os.environ["SLURMD_NODENAME"] = f"node{number}"
    if fault is not None:
        fault()


def late(name: str) -> None:
    """``pretrain.preflight.probes.name`` takes longer."""
    original = getattr(probes, name)

    def slow(*args):
        found = original(*args)
        time.sleep(PAUSE)
        return found if found is None else found + PAUSE

    setattr(probes, name, slow)


def wrong_clock() -> None:
    probes.now = lambda: time.time_ns() + 100 * 10**9


def other_numpy() -> None:
    probes._installed = lambda name, original=probes._installed: "1.26.0" if name == "numpy" else original(name)


def fails(module: str, name: str, error: Exception) -> None:
    """``module.name`` raises an error."""

    def failing(*args, **options):
        raise error

    setattr(importlib.import_module(module), name, failing)


def own_folder(folder: Path) -> None:
    """This node has a folder of its own under the name of the run's."""
    probes.SEEN_WITHIN = 0.3
    probes.place = lambda _, name, original=probes.place: original(folder, name)


def other_data() -> None:
    preflight_run.data_identity = lambda *manifests, original=preflight_run.data_identity: original(*manifests)[::-1]


def ended(
    folder: Path, *args: object, size: int = 2, faults: dict[int, Callable[[], None]] | None = None
) -> list[Done]:
    """A job of ``size`` ranks on as many nodes, to its end; ``faults`` by rank."""
    before = {rank: functools.partial(node, rank + 1, (faults or {}).get(rank)) for rank in range(size)}
    return Job([*args, "--run", folder / "run", *TOLERANT], size, folder, before=before).finish()


def preflight(folder: Path, *args: object, **options) -> list[Done]:
    return ended(folder, "preflight", *MODEL, *args, **options)


def codes(done: list[Done]) -> list[int]:
    return [rank.code for rank in done]


def messages(done: list[Done]) -> list[str]:
    """Messages of rank 0, without a traceback; other ranks have none."""
    assert all(rank.err == "" for rank in done[1:]), [rank.err for rank in done]
    assert "Traceback" not in done[0].err
    return done[0].messages


def suspects(folder: Path) -> dict:
    return json.loads((folder / "run" / "suspects.json").read_text())


def test_good_nodes(tmp_path, data_set):
    done = preflight(tmp_path, "--data.path", data_set)
    assert codes(done) == [0, 0]
    rate = r"[\d.]+( [GT]FLOP/s)?( to [\d.]+)? [GT]FLOP/s"
    (line,) = messages(done)
    pattern = (
        rf"preflight: 2 ranks on 2 nodes, matmul {rate}, all-reduce [\d.]+ GB/s, clocks within [\d.]+ ms, [\d.]+ s"
    )
    assert re.fullmatch(pattern, line), line
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["preflight.json"]
    hosts = json.loads((tmp_path / "run" / "preflight.json").read_text())["hosts"]
    assert list(hosts) == ["node1", "node2"]
    for number, host in enumerate(hosts.values()):
        assert host["ranks"] == [number]
        assert list(host["links"][0]) == [str(1 - number)]
        assert host["links"][0][str(1 - number)] > 0
        assert abs(host["clock"]["offset"]) <= host["clock"]["uncertainty"] < 5


def test_another_version_ends_the_run(tmp_path):
    done = preflight(tmp_path, faults={1: other_numpy})
    assert codes(done) == [2, 2]
    (line,) = messages(done)
    assert re.fullmatch(r"numpy: \S+ on node1, 1\.26\.0 on node2; all nodes must have the same", line), line
    assert not (tmp_path / "run").exists()


FAULTS = {
    1: functools.partial(late, "_multiply"),
    2: wrong_clock,
    3: functools.partial(late, "_exchange"),
}


def test_slow_nodes_and_wrong_clocks_are_warned_of(tmp_path):
    done = preflight(tmp_path, size=4, faults=FAULTS)
    assert codes(done) == [0] * 4
    *warnings, summary = messages(done)
    assert summary.startswith("preflight: 4 ranks on 4 nodes, ")
    assert len(warnings) == 3, warnings
    for warning, start in zip(
        warnings,
        [
            "preflight: node2: matmul is slow: rank 1 ",
            "preflight: node3: its clock is 100.0 s ahead of node",
            "preflight: node4: network to other nodes is slow: rank 3 ",
        ],
    ):
        assert warning.startswith(start), warning
    assert not (tmp_path / "run" / "suspects.json").exists()


def test_strictly_they_end_the_run_to_be_started_elsewhere(tmp_path):
    done = preflight(tmp_path, "--preflight.strict", size=4, faults=FAULTS)
    assert codes(done) == [76] * 4
    (line,) = messages(done)
    assert line.endswith("; preflight.strict=true: start again without node2, node3, node4")
    named = suspects(tmp_path)
    assert sorted(named["hosts"]) == ["node2", "node3", "node4"]
    assert named["reasons"]["node2"].startswith("node2: matmul is slow")
    assert len(json.loads((tmp_path / "run" / "preflight.json").read_text())["findings"]) == 3


def test_a_folder_that_is_not_shared(tmp_path):
    (tmp_path / "local").mkdir()
    done = preflight(tmp_path, faults={1: functools.partial(own_folder, tmp_path / "local")})
    assert codes(done) == [2, 2]
    (line,) = messages(done)
    assert line == (
        f"run={tmp_path / 'run'}: node2 does not see what node1 wrote; the folder must be on a file system that all "
        "nodes share"
    )
    assert not list((tmp_path / "run").glob(".preflight*"))


def test_a_node_that_cannot_write(tmp_path):
    fault = functools.partial(fails, "pretrain.preflight.probes", "_write", OSError(30, "Read-only file system"))
    done = preflight(tmp_path, size=3, faults={2: fault})
    assert codes(done) == [2, 2, 2]
    assert messages(done)[0].startswith(f"run={tmp_path / 'run'}: node3 cannot write there (Read-only file system); ")
    done = preflight(tmp_path, "--preflight.strict", size=3, faults={2: fault})
    assert codes(done) == [76, 76, 76]
    assert suspects(tmp_path)["hosts"] == ["node3"]


def test_data_that_one_node_lacks_or_has_otherwise(tmp_path, data_set):
    fault = functools.partial(
        fails, "pretrain.run_folder.data", "open_stream", DataError("data/train-000000.tar: this shard is missing")
    )
    done = preflight(tmp_path, "--data.path", data_set, faults={1: fault})
    assert codes(done) == [2, 2]
    assert messages(done) == ["data/train-000000.tar: this shard is missing (on node2, 1 of 2 nodes)"]
    done = preflight(tmp_path, "--data.path", data_set, faults={1: other_data})
    assert codes(done) == [2, 2]
    (line,) = messages(done)
    assert re.match(r"data set \(digest of its shards\): [\w:]{12} on node1, [\w:]{12} on node2; give all", line), line


def test_a_rank_that_fails_alone_ends_all(tmp_path):
    done = preflight(
        tmp_path, faults={1: functools.partial(fails, "pretrain.preflight.probes", "report", ValueError("a bug"))}
    )
    assert codes(done) == [1, 1]
    assert all(rank.err.endswith("ValueError: a bug\n") for rank in done)


def test_a_run_ends_with_its_preflight(tmp_path, data_set):
    (tmp_path / "recipe.yaml").write_text(TINY)
    args = ("pretrain", "--config", tmp_path / "recipe.yaml", "--data.path", data_set)
    done = ended(tmp_path, *args, "--preflight.strict", faults={1: wrong_clock})
    assert codes(done) == [76, 76]
    assert "100.0 s ahead of node1's" in messages(done)[0]
    assert suspects(tmp_path)["hosts"] == ["node1", "node2"]  # either may be wrong
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    done = ended(tmp_path, *args, faults={1: wrong_clock})
    assert codes(done) == [0, 0]
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("grad_norm") == 2
