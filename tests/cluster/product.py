"""Runs of `bd3` on the cluster: launched, waited for, disturbed, and compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.checkpoint.reader import find_checkpoint, read_weights
from pretrain.run_folder import events
from tests.cluster.cluster import DONE, Cluster, until

RECIPE = """
model: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, length: 32}
diffusion: {block_size: 4}
train: {steps: 30, global_batch: 8, micro_batch: 2, precision: fp32, warmup_steps: 2, lr: 0.003, ema_decay: 0.9}
eval: {every: 20, rows: 8}
checkpoint: {every: 10, keep: 2}
log: {tensorboard: false}
"""
START = 300.0  # seconds that ranks may take to start on a busy machine


@dataclass
class Project:
    """The cluster with a data set and a recipe, in ``folder``.

    Attributes:
        environ: variables with which `bd3` and its jobs run.
    """

    cluster: Cluster
    data: Path
    folder: Path
    environ: dict[str, str]

    def bd3(self, *args: object, check: bool = True, **environ: str) -> subprocess.CompletedProcess:
        """Run `bd3` on the login node."""
        return self.cluster.run("bd3", *args, check=check, env=self.environ | environ, cwd=self.folder, timeout=START)

    def run(self, name: str, *options: object, recipe: str = RECIPE, **environ: str) -> Run:
        """Launch `bd3 pretrain` with a recipe into the run folder ``name``."""
        run = Run(self, self.folder / name)
        config = self.folder / f"{name}.yaml"
        config.write_text(recipe)
        done = self.bd3(
            *("launch", "pretrain", "--config", config, "--data.path", self.data, "--run", run.path),
            *options,
            **environ,
        )
        run.jobs = [int(number) for number in re.match(r"job ([\d, ]+):", done.stdout)[1].split(", ")]
        return run

    def torchrun(self, name: str, ranks: int, *options: object, recipe: str = RECIPE) -> Run:
        """The same on this machine, started by torchrun and waited for."""
        run = Run(self, self.folder / name)
        config = self.folder / f"{name}.yaml"
        config.write_text(recipe)
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--no-python",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
        command = [*start, "--", "bd3", "pretrain", "--config", config, "--data.path", self.data, "--run", run.path]
        done = subprocess.run(
            [str(word) for word in (*command, *options)],
            env=os.environ | self.environ,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=2 * START,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return run


@dataclass
class Run:
    """A run folder and the jobs that work in it."""

    project: Project
    path: Path
    jobs: list[int] = field(default_factory=list)

    @property
    def metrics(self) -> bytes:
        return (self.path / "metrics.jsonl").read_bytes()

    def rows(self) -> int:
        """Steps that have a record."""
        try:
            return self.metrics.count(b'"train"')
        except FileNotFoundError:
            return 0

    def reaches(self, step: int, timeout: float = START) -> None:
        until(lambda: self.rows() >= step, timeout, lambda: f"{self.path.name} reaches step {step}; {self.story()}")

    def ends(self, timeout: float = 2 * START, job: int = 0) -> dict[str, str]:
        """Wait for the end of a job in whatever state, and return what Slurm says of it."""
        seen: dict[str, str] = {}

        def ended() -> bool:
            seen.update(self.project.cluster.job(self.jobs[job]))
            return seen["JobState"] in DONE

        until(ended, timeout, lambda: f"{self.path.name} ends; {seen}; {self.story()}", every=0.3)
        return seen

    def finishes(self, timeout: float = 2 * START, job: int = 0) -> dict[str, str]:
        """Wait until a job is done."""
        seen = self.ends(timeout, job)
        assert seen["JobState"] == "COMPLETED", (seen, self.story())
        return seen

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in events.read(self.path) if event["event"] == kind]

    def log(self) -> str:
        """Of the batch script, all starts."""
        return "".join(path.read_text() for path in sorted((self.path / "logs").glob("*.log")))

    def ranks(self) -> str:
        """What the ranks of all starts have printed."""
        return "".join(path.read_text() for path in sorted((self.path / "logs").glob("*/rank-*.log")))

    def story(self) -> str:
        return f"{self.log()[-2000:]}\n{self.ranks()[-2000:]}"

    def weights(self) -> Mapping[str, Any]:
        return read_weights(find_checkpoint(self.path))

    def pids(self, node: str) -> list[int]:
        """Numbers, seen from here, of the ranks' processes on a node."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
                environ = (path / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            line = " ".join(words)
            mine = "pretrain" in words and str(self.path) in line and "srun" not in line and "attempt" not in words
            if mine and f"SLURMD_NODENAME={node}" in environ:
                found.append(int(path.name))
        return sorted(found)
