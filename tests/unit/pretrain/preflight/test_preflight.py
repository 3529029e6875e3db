"""Findings of a preflight on invented clusters of many nodes, and its cost for a run of one process."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import fsspec
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from data_prep.errors import DataError
from pretrain.preflight import findings, probes
from pretrain.preflight.findings import GIB, Clock, Gpu, Place, Report, flops, gigabytes, links, partners, rates, spread
from tests.unit.commands import bd3

H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 78 * GIB, 8)


def cluster(nodes: int, per_node: int = 8, gpu: Gpu | None = H100) -> list[Report]:
    versions = {"torch": "2.11.0", "numpy": "2.4.6"}
    return [Report(f"node{n + 1}", rank, versions, gpu, 6e14) for n in range(nodes) for rank in range(per_node)]


def measured_links(
    reports: list[Report], rate: float, slow: dict[int, float] | None = None, slow_pairs: dict | None = None
) -> list[dict[int, float]]:
    """What :func:`pretrain.preflight.probes.link_rates` measures if a pair is as fast as its slower rank."""
    hosts = list(findings.hosts_of(reports).values())
    slow, slow_pairs = slow or {}, slow_pairs or {}
    measured: list[dict[int, float]] = [{} for _ in reports]
    for ranks in hosts:
        for place, rank in enumerate(ranks):
            across = [other[place] for other in hosts if len(other) > place]
            for members in (ranks, across):
                for meets in partners(len(members)):
                    if (found := meets.get(members.index(rank))) is not None:
                        other = members[found]
                        pair = slow_pairs.get((min(rank, other), max(rank, other)), rate)
                        measured[rank][other] = min(pair, slow.get(rank, rate), slow.get(other, rate))
    return measured


# ---- who meets whom ----


@given(st.integers(0, 70), st.integers(1, 5))
def test_partners_meet_in_pairs_and_never_twice(members, rounds):
    met = set()
    made = partners(members, rounds)
    assert len(made) == min(rounds, max(0, members + members % 2 - 1))
    for meets in made:
        assert all(meets[other] == one != other for one, other in meets.items())
        assert members - len(meets) == members % 2
        pairs = {tuple(sorted(pair)) for pair in meets.items()}
        assert not met & pairs
        met |= pairs


# ---- stragglers ----


@given(st.integers(3, 64), st.integers(1, 8), st.data())
def test_of_equals_none_is_slow_and_a_single_slow_rank_is_always_named(nodes, per_node, data):
    reports = cluster(nodes, per_node)
    scores = dict.fromkeys(range(len(reports)), 6e14)
    assert rates(scores, reports, 0.7, "matmul", flops) == []
    culprit = data.draw(st.sampled_from(range(len(reports))))
    (found,) = rates(scores | {culprit: 2e14}, reports, 0.7, "matmul", flops)
    assert found.hosts == (reports[culprit].host,)
    assert f"rank {culprit} (GPU {culprit % per_node}) 200 TFLOP/s, median 600 TFLOP/s" in found.line


@given(st.integers(3, 64), st.integers(1, 8), st.data())
def test_a_single_slow_network_is_always_named_and_no_partner_of_it(nodes, per_node, data):
    reports = cluster(nodes, per_node)
    assert links(measured_links(reports, 45e9), reports, 0.7, between=True) == []
    host = data.draw(st.integers(0, nodes - 1))
    ranks = range(host * per_node, (host + 1) * per_node)
    port = data.draw(st.sampled_from([ranks, [data.draw(st.sampled_from(ranks))]]))  # all of the node's, or one
    found = links(measured_links(reports, 45e9, dict.fromkeys(port, 5e9)), reports, 0.7, between=True)
    assert [finding.hosts for finding in found] == [(f"node{host + 1}",)]
    assert f"rank {port[0]} (GPU {port[0] % per_node}) 5.00 GB/s" in found[0].line


@given(st.integers(2, 16), st.integers(4, 8), st.data())
def test_a_single_slow_link_inside_a_node_is_named(nodes, per_node, data):
    reports = cluster(nodes, per_node)
    culprit = data.draw(st.integers(0, len(reports) - 1))
    measured = measured_links(reports, 4e11, {culprit: 2e10})
    (found,) = links(measured, reports, 0.7, between=False)
    assert found.hosts == (reports[culprit].host,)
    assert f"rank {culprit} (GPU {culprit % per_node}) 20.0 GB/s, median 400 GB/s" in found.line


@given(st.integers(4, 32), st.data())
def test_a_slow_link_between_two_good_nodes_blames_neither(nodes, data):
    reports = cluster(nodes, 1)
    one = data.draw(st.integers(0, nodes - 1))
    other = data.draw(st.sampled_from(list(measured_links(reports, 1.0)[one])))
    assume(min(len(pairs) for pairs in (measured_links(reports, 1.0)[rank] for rank in (one, other))) > 1)
    low, high = sorted((one, other))
    (found,) = links(measured_links(reports, 45e9, slow_pairs={(low, high): 1e9}), reports, 0.7, between=True)
    assert found.hosts == ()
    assert f"node{low + 1} rank {low} (GPU 0) to node{high + 1} rank {high} (GPU 0) 1.00 GB/s" in found.line


def test_two_nodes_cannot_tell_whose_port_it_is():
    reports = cluster(2)
    found = links(measured_links(reports, 45e9, {3: 5e9}), reports, 0.7, between=True)
    assert [finding.hosts for finding in found] == [("node1",), ("node2",)]


# ---- versions and GPUs ----


@given(st.integers(2, 64), st.integers(1, 8), st.data())
def test_a_node_with_another_version_is_named(nodes, per_node, data):
    reports = cluster(nodes, per_node)
    assert findings.versions(reports) == []
    odd = f"node{data.draw(st.integers(2, nodes))}"
    reports = [replace(r, versions=r.versions | {"torch": "2.12.0"}) if r.host == odd else r for r in reports]
    (found,) = findings.versions(reports)
    assert found.fatal
    assert found.line.startswith("torch: 2.11.0 on node")
    assert f"2.12.0 on {odd};" in found.line


def test_versions_in_words():
    reports = cluster(4, 2)
    reports[6:] = [replace(report, versions=report.versions | {"torch": "2.12.0"}) for report in reports[6:]]
    reports[0] = replace(reports[0], versions=reports[0].versions | {"numpy": "1.26.0"})
    assert [found.line for found in findings.versions(reports)] == [
        "torch: 2.11.0 on node[1-3], 2.12.0 on node4; all nodes must have the same",
        "numpy: 2.4.6 on node[2-4] and rank 1, 1.26.0 on rank 0; all nodes must have the same",
    ]


def test_what_only_first_ranks_looked_at_is_compared_among_them():
    reports = cluster(3, 4)
    for rank, digest in [(0, "aaa"), (4, "aaa"), (8, "bbb")]:
        reports[rank] = replace(reports[rank], versions=reports[rank].versions | {"sources": digest})
    (found,) = findings.versions(reports)
    assert found.line.startswith("sources: aaa on node[1-2], bbb on node3;")


def test_gpus_that_are_occupied_or_of_another_kind_or_too_few():
    reports = cluster(4)
    assert findings.gpus(reports, 0.9) == []
    assert findings.gpus(cluster(4, gpu=None), 0.9) == []
    reports[13] = replace(reports[13], gpu=H100._replace(free=41 * GIB))
    (found,) = findings.gpus(reports, 0.9)
    assert (found.hosts, found.fatal) == (("node2",), False)
    assert found.line.startswith("node2: rank 13 (GPU 5) has 41.0 of 80.0 GiB free (preflight.free_gpu_memory=0.9)")
    reports = [replace(r, gpu=Gpu("A100", 40 * GIB, 39 * GIB, 8)) if r.host == "node4" else r for r in cluster(4)]
    (found,) = findings.gpus(reports, 0.9)
    assert found.hosts == ("node4",)
    assert found.line.startswith("GPU: NVIDIA H100 80GB HBM3 (80 GiB) on node[1-3], A100 (40 GiB) on node4;")
    reports = [replace(r, gpu=H100._replace(seen=4)) if r.host == "node3" else r for r in cluster(4)]
    (found,) = findings.gpus(reports, 0.9)
    assert found.fatal
    assert found.line == "node3: 4 GPUs for 8 ranks; start one rank per GPU"


def test_a_gpu_without_memory_for_a_matmul_is_named_once():
    reports = cluster(3, 2)
    reports[2] = replace(reports[2], gpu=H100._replace(free=GIB // 4), matmul=0.0)
    assert [(found.hosts, found.fatal) for found in findings.gpus(reports, 0.0)] == [(("node2",), True)]
    assert rates({rank: r.matmul for rank, r in enumerate(reports)}, reports, 0.7, "matmul", flops) == []


# ---- clocks ----


@given(st.integers(3, 64), st.data())
def test_a_wrong_clock_is_named_even_if_it_is_the_first_nodes(nodes, data):
    reports = cluster(nodes, 2)
    odd, ahead = data.draw(st.integers(0, nodes - 1)), data.draw(st.sampled_from([-60.0, 7.0]))
    true = [ahead if rank // 2 == odd else 0.0 for rank in range(2 * nodes)]
    clocks = [Clock(offset - true[0], 0.001) for offset in true]
    (found,), apart = findings.clocks(clocks, reports, 5.0)
    assert found.hosts == (f"node{odd + 1}",)
    assert f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} node" in found.line
    assert apart == pytest.approx(abs(ahead), abs=0.003)


def test_clocks_that_may_be_right_are_not_named():
    reports = cluster(3, 1)
    assert findings.clocks([Clock(0, 0), Clock(0.002, 0.001), Clock(6, 2)], reports, 5.0) == ([], 8.0)
    (found,), _ = findings.clocks([Clock(0, 0), Clock(9, 0.1)], reports[:2], 5.0)
    assert found.hosts == ("node1", "node2")  # nobody knows which


# ---- folders and failures ----


def test_folders_that_are_not_shared_or_cannot_be_written():
    places = {f"node{n}": Place(True, "", 10**12) for n in range(1, 6)}
    assert findings.folders("run=runs/a", places, 1e11) == []
    (found,) = findings.folders("run=runs/a", places | {"node2": Place(False)})
    assert (found.hosts, found.fatal) == (("node2",), True)
    assert found.line == (
        "run=runs/a: node2 does not see what node1 wrote; the folder must be on a file system that all nodes share"
    )
    (found,) = findings.folders("run=a", {host: place._replace(sees=host == "node1") for host, place in places.items()})
    assert found.hosts == ()  # the folder is to blame
    (found,) = findings.folders("run=a", places | {"node4": Place(True, "Read-only file system")})
    assert found.line.startswith("run=a: node4 cannot write there (Read-only file system);")
    (found,) = findings.folders("run=a", places, 2e12)
    assert (found.fatal, found.hosts) == (False, ())
    assert found.line.startswith("run=a: 1000.0 GB are free, the checkpoints to come take 2000.0 GB")


def test_failures_name_the_nodes_that_have_them():
    reports = cluster(4, 2)
    (found,) = findings.failures(["x: missing" if rank in (2, 3) else None for rank in range(8)], reports)
    assert found == findings.Finding("x: missing (on node2, 1 of 4 nodes)", ("node2",), True)
    (found,) = findings.failures(["x: missing"] * 8, reports)
    assert (found.line, found.hosts) == ("x: missing", ())


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (6.12e14, 6.55e14, "612 to 655 TFLOP/s"),
        (6.551e14, 6.554e14, "655 TFLOP/s"),
        (4.5e10, 1.2e12, "45.0 GFLOP/s to 1.20 TFLOP/s"),
        (9.996e13, 1.1e14, "100 to 110 TFLOP/s"),
        (0.0, 0.0, "0 GFLOP/s"),
    ],
)
def test_rates_in_words(low, high, text):
    assert spread(low, high, flops) == text


def test_bandwidth_in_words():
    assert [gigabytes(rate) for rate in (1.8e11, 2.5e9, 1.23e8)] == ["180 GB/s", "2.50 GB/s", "0.123 GB/s"]


# ---- measuring, alone ----


def test_measuring_leaves_the_random_state_alone(world):
    before = torch.get_rng_state()
    found = probes.report(0, world.device)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.matmul > 0
    assert found.versions["torch"] == torch.__version__
    assert len(found.versions["sources"]) == 12


def test_the_sources_differ_where_a_file_does(tmp_path, monkeypatch):
    for room in ("bd3_megatron", "pretrain"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(probes, "ROOT", tmp_path)
    first = probes.source_digest()
    (tmp_path / "pretrain" / "notes.txt").write_text("not a source")
    assert probes.source_digest() == first
    (tmp_path / "pretrain" / "a.py").write_text("x = 2\n")
    assert probes.source_digest() != first


def test_slurms_name_of_a_node_wins(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert probes.host_name() == "node7"


def test_a_folder_that_cannot_be_written(tmp_path):
    assert probes.place(tmp_path, None).error == ""
    assert list(tmp_path.iterdir()) == []
    assert probes.place(tmp_path / "absent", None).error == "No such file or directory"


def test_marks_of_killed_jobs_go_with_the_next_one(tmp_path):
    (tmp_path / f"{probes.MARK}old").touch()
    with probes.mark(tmp_path) as name:
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert probes.place(tmp_path, name).sees
    assert list(tmp_path.iterdir()) == []


def test_remote_shards_are_looked_up(fresh_fsspec):
    files = fsspec.filesystem("memory")
    shards = [SimpleNamespace(name=f"train-{n}.tar", bytes=n + 1) for n in range(6)]
    for shard in shards:
        files.pipe(f"/data/train/{shard.name}", b"x" * shard.bytes)
    reader = SimpleNamespace(remote=True, folder="memory://data", split="train", shards=shards)
    stream = SimpleNamespace(readers=[reader])
    probes.look_up_shards(stream, 1, 3)
    files.rm("/data/train/train-4.tar")
    probes.look_up_shards(stream, 0, 3)
    with pytest.raises(DataError, match=r"memory://data/train/train-4\.tar: no such file"):
        probes.look_up_shards(stream, 1, 3)
    files.pipe("/data/train/train-2.tar", b"cut")
    reader.shards[2].bytes = 100
    with pytest.raises(DataError, match=r"train-2\.tar: 3 bytes, the manifest says 100;"):
        probes.look_up_shards(stream, 2, 3)


def test_the_command_checks_and_starts_nothing(tmp_path, data_set):
    run = tmp_path / "run"
    done = bd3("preflight", "--data.path", data_set, "--model.length", 32, "--run", run, log=tmp_path / "log")
    assert done.code == 0, done.err
    assert done.messages[0].startswith("preflight: 1 rank on 1 node, matmul ")
    assert [path.name for path in run.iterdir()] == ["preflight.json"]
    record = json.loads((run / "preflight.json").read_text())
    assert record["ranks"] == 1
    assert record["findings"] == []
    (host,) = record["hosts"].values()
    assert host["ranks"] == [0]
    assert host["matmul"][0] > 0


def test_too_little_space_is_a_warning(tmp_path, data_set):
    run = tmp_path / "run"
    # 10^9 checkpoints do not fit anywhere.
    options = ("--data.path", data_set, "--model.length", 32, "--checkpoint.keep", 10**9, "--run", run)
    done = bd3("preflight", *options, log=tmp_path / "log")
    assert done.code == 0
    assert "GB are free, the checkpoints to come take " in done.err


def test_it_can_be_left_out(tmp_path, data_set):
    run = tmp_path / "run"
    options = ("--data.path", data_set, "--model.length", 32, "--run", run, "--preflight.no-enabled")
    done = bd3("preflight", *options, log=tmp_path / "log")
    assert (done.code, done.err) == (0, "")
    assert list(run.iterdir()) == []
