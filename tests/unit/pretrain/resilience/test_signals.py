"""Stop signals: a stopped run leaves a checkpoint and continues as if it had not been interrupted."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

import pytest

from pretrain.checkpoint.reader import find_checkpoint, newest_checkpoint, read_weights
from pretrain.resilience import signals
from pretrain.run_folder import events
from tests.polling import until
from tests.unit import commands
from tests.unit.commands import Done

RECIPE = """
model: {layers: 1, hidden: 32, heads: 4, kv_heads: 2, length: 32, dropout: 0.1}
diffusion: {block_size: 4}
train: {steps: 12, global_batch: 4, micro_batch: 2, precision: fp32, warmup_steps: 2, lr: 0.003, ema_decay: 0.9}
eval: {every: 5, rows: 8, micro_batch: 1}
checkpoint: {every: 6, keep: 2}
log: {tensorboard: false}
"""


class Run:
    def __init__(self, folder: Path, data_set: Path):
        folder.mkdir(exist_ok=True)
        self.folder, self.run = folder, folder / "run"
        config = folder / "recipe.yaml"
        config.write_text(RECIPE)
        self.args = ("pretrain", "--config", config, "--data.path", data_set, "--run", self.run)

    def go(self, **options) -> Done:
        return commands.bd3(*self.args, log=self.folder / "log", **options)

    def metrics(self) -> bytes:
        return (self.run / "metrics.jsonl").read_bytes()


def at_step(step: int, *numbers: int) -> None:
    """This process gets these signals while it prepares the batch of a step (1 is the first)."""
    from pretrain.trainer.batches import Batches

    original = Batches.at

    def at(self: Batches, number: int):
        if number + 1 == step:
            send(*numbers)
        return original(self, number)

    Batches.at = at


def at_evaluation(call: int, number: int) -> None:
    """This process gets a signal in the course of its ``call``-th evaluation."""
    from pretrain.trainer import loop as train

    original, count = train.evaluate, iter(range(1, 100))

    def evaluate(*args, **options):
        if next(count) == call:
            send(number)
        return original(*args, **options)

    train.evaluate = evaluate


def at_start(number: int) -> None:
    """This process gets a signal before it has begun anything."""
    from pretrain.trainer import loop as train

    original = train.read_ranks

    def read_ranks():
        send(number)
        return original()

    train.read_ranks = read_ranks


def send(*numbers: int) -> None:
    """Send signals to this process and wait until the first is noted."""
    for number in numbers:
        os.kill(os.getpid(), number)
    until(signals.received, what="the signal is noted")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_set) -> Run:
    run = Run(tmp_path_factory.mktemp("uninterrupted"), data_set)
    assert run.go().code == 0
    return run


@pytest.mark.parametrize(
    ("before", "code", "step", "name"),
    [
        pytest.param(functools.partial(at_step, 8, signal.SIGTERM), 75, 8, "SIGTERM", marks=pytest.mark.long),
        (functools.partial(at_step, 6, signal.SIGUSR1), 75, 6, "SIGUSR1"),  # where a checkpoint is due, too
        (functools.partial(at_step, 3, signal.SIGINT), 130, 3, "SIGINT"),
        pytest.param(functools.partial(at_step, 12, signal.SIGTERM), 75, 12, "SIGTERM", marks=pytest.mark.long),
        pytest.param(functools.partial(at_evaluation, 2, signal.SIGTERM), 75, 5, "SIGTERM", marks=pytest.mark.long),
        (functools.partial(at_start, signal.SIGUSR1), 75, 0, "SIGUSR1"),  # before there is anything
        # One signal that comes twice, from Slurm and from srun.
        pytest.param(
            functools.partial(at_step, 4, signal.SIGTERM, signal.SIGTERM), 75, 4, "SIGTERM", marks=pytest.mark.long
        ),
    ],
)
def test_a_stopped_run_continues_as_if_it_had_not_been_interrupted(
    tmp_path, data_set, uninterrupted, before, code, step, name
):
    run = Run(tmp_path, data_set)
    done = run.go(before=before)
    assert (done.code, "Traceback" in done.err) == (code, False), done.err
    assert f"stopped after step {step}; start it again to go on" in done.err
    found = newest_checkpoint(run.run)
    assert (found.step if found else 0) == step
    (stopped,) = [event for event in events.read(run.run) if event["event"] == "stopped"]
    assert stopped["step"] == step
    assert stopped["signal"].startswith(name)
    assert run.go().code == 0
    assert run.metrics() == uninterrupted.metrics()
    ours, theirs = (read_weights(find_checkpoint(r.run)) for r in (run, uninterrupted))
    assert all(ours[key].equal(value) for key, value in theirs.items())


def test_the_second_signal_ends_at_once_where_nothing_moves(tmp_path, data_set):
    run = Run(tmp_path, data_set)
    process = commands.start(*run.args, log=run.folder / "log", before=functools.partial(stuck_at, 3))
    err = run.folder / "log.err"
    until(err.exists, what="the command starts")
    until(lambda: "stuck" in err.read_text(), what=lambda: f"the command is stuck; {err.read_text()}")
    os.kill(process.pid, signal.SIGTERM)
    until(lambda: "SIGTERM" in err.read_text(), what="the first signal is noted")
    time.sleep(1.1 * signals._SAME_SIGNAL)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "the second signal, ends at once; the run goes on from its last checkpoint" in err.read_text()


def stuck_at(step: int) -> None:
    """In a step the main thread waits in C for what never comes."""
    from pretrain.trainer.batches import Batches

    original = Batches.at

    def at(self: Batches, number: int):
        if number + 1 == step:
            os.write(2, b"stuck\n")
            while True:
                time.sleep(1000)
        return original(self, number)

    Batches.at = at


def test_a_signal_to_a_forked_process_is_its_own():
    with signals.caught():
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, b"forked")
            while True:
                time.sleep(0.05)
        os.read(reading, 6)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(0.1)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert signals.received() == 0
