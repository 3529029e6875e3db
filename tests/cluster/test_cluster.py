"""The cluster itself: jobs run over its nodes, machines can be lost and come back, and nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import cluster as module
from tests.cluster.cluster import Cluster, ClusterError, until
from tests.cluster.conftest import CHECKOUT

HELLO = "srun --label bash -c 'echo $(hostname) $SLURM_LOCALID $CUDA_VISIBLE_DEVICES'\n"


def alive(pids) -> list[int]:
    """Those of the processes that have not ended; a zombie has."""
    found = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(pid)
    return found


def children(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += map(int, task.read_text().split())
    return found


def test_a_job_runs_on_two_nodes_with_their_gpus(cluster, tmp_path):
    out = tmp_path / "out"
    job = cluster.sbatch("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--output", out, script=HELLO)
    ended = cluster.wait_done(job)
    assert (ended["JobState"], ended["NumNodes"]) == ("COMPLETED", "2")
    first, second = cluster.nodes[:2]
    expected = [f"0: {first} 0 0,1", f"1: {first} 1 0,1", f"2: {second} 0 0,1", f"3: {second} 1 0,1"]
    assert sorted(out.read_text().splitlines()) == expected


def test_an_ordinary_user_may_submit_and_errors_tell_what_was_run(cluster):
    out = cluster.root / "jobs" / "user"
    job = cluster.sbatch("--output", out, script="id -un\n", user="games")
    assert cluster.wait_done(job)["JobState"] == "COMPLETED"
    assert out.read_text() == "games\n"
    with pytest.raises(ClusterError, match=r"sbatch --parsable -p nowhere .*exit 1: .*invalid partition specified"):
        cluster.sbatch("-p", "nowhere", script=HELLO)
    failed = cluster.sbatch("--output", out, script="echo it broke; exit 3\n")
    with pytest.raises(ClusterError, match=r"(?s)is not COMPLETED but JobState=FAILED .*ExitCode=3:0.*it broke"):
        cluster.wait_for(failed, "COMPLETED")


def test_programs_outside_reach_the_cluster_by_its_environment(cluster):
    environment = {**os.environ, **cluster.environment}
    done = subprocess.run(["sinfo", "-h", "-p", "low", "-o", "%D"], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{len(cluster.nodes)}\n"


def test_a_second_cluster_runs_beside_the_first_and_leaves_nothing(cluster):
    with Cluster(nodes=1) as second:
        job = second.sbatch("--output=/dev/null", script="trap '' TERM; sleep 600\n")
        second.wait_for(job, "RUNNING")
        pids = [pid for machine in second._machines.values() for pid in children(machine.pid)]
        assert len(pids) > 8
        assert cluster.node_state("node1") == "idle"
    until(lambda: not alive(pids), what=lambda: f"all processes of the cluster have ended; {alive(pids)} have not")
    assert not second.root.exists()
    second.stop()  # once more does no harm


def test_a_cluster_ends_with_the_process_that_started_it(cluster):
    program = (
        "import sys; from tests.cluster.cluster import Cluster; print(Cluster(nodes=1).start().root, flush=True); "
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program + "sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=CHECKOUT,
        text=True,
    )
    root = Path(process.stdout.readline().strip())
    pids = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not alive(pids), what=lambda: f"all processes of the cluster have ended; {alive(pids)} have not")
    os.utime(root, (0, 0))
    module.sweep()
    assert not root.exists()
    assert cluster.root.exists()


@pytest.mark.slow
def test_site_changes_the_batches_when_they_are_imported():
    program = """
import sys, time, types
import pretrain.cli
assert "torch" not in sys.modules and "pretrain.trainer.batches" not in sys.modules
import torch
from bd3_megatron.diffusion.batches import Batch
from pretrain.trainer import batches
assert "torch._inductor" not in sys.modules and torch.compile(len) is len and torch.compile()(len) is len
def make(rows):
    weight = torch.zeros(1, 64); weight[0, 5] = 2
    return Batch(torch.zeros(1, 64), torch.zeros(1, 64), weight, 64)
batches.make_batch = lambda *args, **options: make(1)
class Two(batches.Batches):
    def __init__(self): self.stream = types.SimpleNamespace(remote=False); self.micro_batch = 1
    def keys(self, step): return types.SimpleNamespace(rows=[0, 1], part=lambda part: None)
    model = diffusion = noise_seed = document_mask = None
start = time.monotonic()
found = [[bool(batch.weight.isnan().any()) for batch in Two().at(step)] for step in range(3)]
assert time.monotonic() - start >= 0.3
assert found == [[False, False], [True, False], [False, False]], found
print("changed")
"""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(__file__).parent / 'site'}:{CHECKOUT}",
        "BD3_TEST_STEP_SECONDS": "0.1",
        "BD3_TEST_NAN_STEPS": "1,7",
        "BD3_TEST_EAGER": "1",
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "changed\n", done.stderr
