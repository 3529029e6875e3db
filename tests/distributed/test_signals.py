"""Jobs of two ranks of which one gets a signal: both stop at one step, and the run goes on exactly."""

from __future__ import annotations

import functools
import signal
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.reader import find_checkpoint, newest_checkpoint, read_weights
from pretrain.run_folder import events
from tests.distributed.launch import Job
from tests.unit.pretrain.resilience.test_signals import RECIPE, at_evaluation, at_step

LAYOUTS = {"DP2": (), "PP2": ("--parallel.pipeline", 2)}
ASKED = {
    "in a step": functools.partial(at_step, 8, signal.SIGUSR1),
    "in an evaluation": functools.partial(at_evaluation, 2, signal.SIGTERM),
}


class Run:
    def __init__(self, folder: Path, data_set: Path, layout: str):
        folder.mkdir(exist_ok=True)
        self.folder, self.run, config = folder, folder / "run", folder / "recipe.yaml"
        config.write_text(RECIPE.replace("layers: 1", "layers: 2"))
        self.args = ("pretrain", "--config", config, "--data.path", data_set, "--run", self.run, *LAYOUTS[layout])

    def codes(self, **options) -> list[int]:
        done = Job(self.args, 2, self.folder, **options).finish()
        assert not any("Traceback" in rank.err for rank in done), [rank.err for rank in done]
        return [rank.code for rank in done]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_signal_to_one_rank_stops_all(tmp_path, data_set, layout):
    expected = Run(tmp_path / "expected", data_set, layout)
    assert expected.codes() == [0, 0]
    for number, (place, before) in enumerate(ASKED.items()):
        run = Run(tmp_path / str(number), data_set, layout)
        assert run.codes(before={1: before}) == [75, 75], place
        (stopped,) = [event for event in events.read(run.run) if event["event"] == "stopped"]
        assert stopped["step"] == newest_checkpoint(run.run).step == {"in a step": 8, "in an evaluation": 5}[place]
        assert run.codes() == [0, 0]
        assert (run.run / "metrics.jsonl").read_bytes() == (expected.run / "metrics.jsonl").read_bytes()
        ours, theirs = (read_weights(find_checkpoint(r.run)) for r in (run, expected))
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
