"""Jobs of two ranks that are killed or fail: they end with one line, lose no checkpoint, and resume exactly."""

from __future__ import annotations

import functools
import random
import re
import time
from pathlib import Path

import pytest
import torch

from pretrain import cli
from pretrain.checkpoint.reader import find_checkpoint, newest_checkpoint, read_weights
from pretrain.run_folder.layout import COMPLETE
from tests.distributed.launch import TIMEOUT, Job
from tests.polling import until
from tests.unit.commands import limit_files

RECIPE = """
model: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, length: 32, dropout: 0.1}
diffusion: {block_size: 4}
train: {steps: 40, global_batch: 4, micro_batch: 2, precision: fp32, warmup_steps: 2, lr: 0.003, ema_decay: 0.9}
eval: {every: 15, rows: 8}
checkpoint: {every: 1, keep: 2, keep_every: 20}
log: {tensorboard: false}
"""
LAYOUTS = {"DP2": (), "TP2": ("--parallel.tensor", 2)}
KILLS, MANY_KILLS = 2, 6  # in each run
LOST = re.compile(
    r"rank (\d): lost another rank (in step \d+|after step \d+|in the .+|before the first step) "
    r"\((Connection|Broken|Timed out).*\); "
    r"start the job again to go on from its last checkpoint"
)


class Run:
    """A small run of two ranks, to be started again and again into one folder."""

    def __init__(self, folder: Path, data_set: Path, layout: str = "DP2"):
        self.folder, self.run = folder, folder / "run"
        (folder / "recipe.yaml").write_text(RECIPE)
        config = folder / "recipe.yaml"
        self.args = ("pretrain", "--config", config, "--data.path", data_set, "--run", self.run, *LAYOUTS[layout])

    def start(self, *args, **options) -> Job:
        return Job([*self.args, *args], 2, self.folder, **options)

    @property
    def metrics(self) -> bytes:
        path = self.run / "metrics.jsonl"
        return path.read_bytes() if path.exists() else b""

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run / "checkpoints").glob("*"))

    def newest(self) -> int:
        found = newest_checkpoint(self.run)
        return found.step if found else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data_set) -> dict[str, Run]:
    """A finished run by layout."""
    runs = {layout: Run(tmp_path_factory.mktemp(layout), data_set, layout) for layout in LAYOUTS}
    for run in runs.values():
        for done in run.start().finish():
            assert done.code == 0, done.err
    return runs


def wait_for_a_moment(run: Run, job: Job, chance: random.Random) -> None:
    """A random moment after the job's first record; every other time while a checkpoint is written."""
    fewest, more = run.metrics.count(b"\n"), chance.randint(1, 3)

    def trained() -> bool:
        nonlocal fewest
        count = run.metrics.count(b"\n")
        fewest = min(fewest, count)  # records after the last checkpoint are dropped when a run goes on
        return count >= fewest + more or not job.running

    until(trained, TIMEOUT, every=1e-3)
    if chance.random() < 0.5:
        checkpoints = run.run / "checkpoints"
        until(lambda: any(checkpoints.glob(".step-*.partial")) or not job.running, TIMEOUT, every=1e-4)
        time.sleep(chance.uniform(0, 0.02))
    else:
        time.sleep(chance.uniform(0, 0.2))


def slow_steps() -> None:
    """Make steps long enough that a busy machine kills the job before its last one."""
    from pretrain.trainer.batches import Batches

    original = Batches.at

    def at(self: Batches, step: int):
        time.sleep(0.1)
        return original(self, step)

    Batches.at = at


def kill(job: Job, chance: random.Random) -> list[int]:
    """Kill one rank, or all in some order; returns the killed ones."""
    order = chance.sample(range(2), 2)
    victims = order[: chance.choice([1, 1, 2])]
    for rank in victims:
        job.ranks[rank].kill()
    return victims


@pytest.mark.parametrize("kills", [KILLS, pytest.param(MANY_KILLS, marks=pytest.mark.long)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_loses_ranks_at_any_moment_ends_as_if_it_never_had(tmp_path, data_set, undisturbed, layout, kills):
    run, expected = Run(tmp_path, data_set, layout), undisturbed[layout]
    came_from = 0
    for seed in range(kills):
        chance = random.Random(f"{layout} {seed}")
        job = run.start(before=dict.fromkeys(range(2), slow_steps))
        wait_for_a_moment(run, job, chance)
        complete = max([0, *(int(name.removeprefix("step-")) for name in run.checkpoints() if name[0] != ".")])
        assert job.running, job.finish()
        victims = kill(job, chance)
        ended = job.finish()
        for rank, done in enumerate(ended):
            if rank not in victims:
                assert (done.code, "Traceback" in done.err) == (1, False), done.err
                assert LOST.fullmatch(done.err.splitlines()[-1]), done.err
                assert done.err.splitlines()[-1].startswith(f"rank {rank}: ")
        assert came_from == 0 or f"going on from step {came_from}\n" in ended[0].err
        came_from = run.newest()
        assert came_from >= complete
    for done in run.start().finish():
        assert done.code == 0, done.err
    assert run.metrics == expected.metrics
    assert run.checkpoints() == expected.checkpoints() == ["step-00000020", "step-00000039", "step-00000040"]
    ours, theirs = (read_weights(find_checkpoint(r.run)) for r in (run, expected))
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def _quick(then=None) -> None:
    """Shorten the time that silent ranks wait for rank 0's message: no launcher here ends them."""
    cli.RANK_0_PRINTS = 0.1
    if then is not None:
        then()


def test_a_disk_that_fills_up_under_one_rank_ends_all_with_one_line(tmp_path, data_set):
    run = Run(tmp_path, data_set)
    for done in run.start("--train.steps", 2).finish():
        assert done.code == 0, done.err
    before = run.checkpoints()
    full = {1: functools.partial(_quick, functools.partial(limit_files, 100_000))}
    first, second = run.start(before=full).finish()
    path = run.run / "checkpoints" / "step-00000003"
    assert (first.code, second.code) == (2, 2)
    assert first.err.splitlines()[-1] == f"{path}: cannot write: File too large"
    assert second.err == ""
    assert "Traceback" not in first.err
    assert run.checkpoints() == before
    for done in run.start("--train.steps", 4).finish():
        assert done.code == 0, done.err


def _full(self) -> None:
    raise OSError(28, "No space left on device", "metrics.jsonl")


def _no_room_for_metrics() -> None:
    from pretrain.tracking.metrics import MetricsWriter

    MetricsWriter.sync = _full


def _damaged_shard() -> None:
    from pretrain.trainer.batches import Batches

    whole = Batches.at
    Batches.at = lambda self, step: _full(self) if step == 2 else whole(self, step)


def test_what_only_the_first_rank_writes_ends_all_with_its_line(tmp_path, data_set):
    run = Run(tmp_path, data_set)
    first, second = run.start(before={0: _no_room_for_metrics, 1: _quick}).finish()
    assert (first.code, second.code, second.err) == (2, 2, "")
    assert first.err.splitlines()[-1] == "metrics.jsonl: cannot write: No space left on device"


def test_a_rank_that_fails_alone_says_why_and_the_others_end(tmp_path, data_set):
    run = Run(tmp_path, data_set)
    first, second = run.start(before={1: _damaged_shard}).finish()  # earlier than parallel.timeout_minutes
    assert second.code == 2
    assert second.err.splitlines()[-1] == "rank 1: metrics.jsonl: cannot write: No space left on device"
    last = first.err.splitlines()[-1]
    assert first.code == 1
    assert LOST.fullmatch(last) or last == "rank 0: ends because rank 1 failed (OSError)"
    assert "Traceback" not in first.err + second.err


def test_what_all_ranks_find_wrong_is_told_once(tmp_path, data_set):
    run = Run(tmp_path, data_set)
    quick = dict.fromkeys(range(2), _quick)
    for args, line in [
        (("--train.micro-batch", 3), "train.micro_batch=3: train.global_batch=4 is not divisible by 3; use 2"),
        (("--data.path", tmp_path), None),
    ]:
        first, second = run.start(*args, before=quick).finish()
        assert (first.code, second.code, second.err) == (2, 2, "")
        assert len(first.err.splitlines()) == 1
        assert line is None or first.err == line + "\n"


def test_a_damaged_newest_checkpoint_is_passed_over_by_all_ranks_with_one_warning(tmp_path, data_set):
    run = Run(tmp_path, data_set)
    for done in run.start("--train.steps", 3).finish():
        assert done.code == 0, done.err
    newest = run.run / "checkpoints" / "step-00000003"
    file = newest / "rank-00001.safetensors"  # written by rank 1, and checked by one rank only
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    first, second = run.start("--train.steps", 4).finish()
    assert (first.code, second.code, second.err) == (0, 0, "")
    assert first.err.count(f"{newest}: rank-00001.safetensors has another checksum than listed; skipped\n") == 1
    assert "going on from step 2\n" in first.err
    for path in (run.run / "checkpoints").glob("step-*"):
        (path / COMPLETE).unlink()
    first, second = run.start("--train.steps", 5, before={1: _quick}).finish()
    assert (first.code, second.code, second.err) == (2, 2, "")
    assert first.err.splitlines()[-1].endswith("none is complete; put one back, or start again with another --run")
