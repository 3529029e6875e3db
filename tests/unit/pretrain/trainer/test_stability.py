"""Steps that go wrong: batches that are left out, runs that go back, and kills that change nothing of it."""

from __future__ import annotations

import functools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_common.errors import ConfigError
from data_prep.read.reader import RowReader
from pretrain.checkpoint.reader import find_checkpoint, read_weights
from pretrain.config.command_line import parse_options
from pretrain.config.schema import CheckpointConfig, GuardConfig, RunConfig, check_run
from pretrain.tracking.metrics import MetricsWriter, read_metrics
from pretrain.trainer.stability import Range, SpikeDetector, check_skips, read_history, undone
from tests.unit.commands import Done, bd3, die_at, start

RECIPE = """
model: {layers: 1, hidden: 32, heads: 4, kv_heads: 2, length: 32, dropout: 0.1}
diffusion: {block_size: 4}
train: {steps: 12, global_batch: 6, micro_batch: 2, precision: fp32, warmup_steps: 2, lr: 0.003, ema_decay: 0.9}
eval: {every: 6, rows: 8}
checkpoint: {every: 2, keep: 4, asynchronous: false}
log: {tensorboard: false}
"""
# A spike that is complete at step 8, where the weights of the batches of steps 7 and 8 are multiplied by 1e3.
SPIKE = ("--guard.spike", 8, "--guard.spike-window", 4, "--guard.spike-patience", 2, "--guard.spike-after", 1)


def spoil(steps: dict[int, float], micro: int | None = None) -> None:
    """Multiply the weights of the batches of these steps (of one micro-batch of them) by a value."""
    from pretrain.trainer.batches import Batches

    original = Batches.at

    def at(self, step):
        made = original(self, step)
        if step + 1 in steps:
            for batch in made if micro is None else made[micro : micro + 1]:
                batch.weight *= steps[step + 1]
        return made

    Batches.at = at


def spoil_and_die(steps: dict[int, float], death: tuple[str, str, int]) -> None:
    spoil(steps)
    die_at(*death)


class Recipe:
    """A small run whose batches of some steps are spoiled."""

    def __init__(self, folder: Path, data_set: Path, steps: dict[int, float], *args: object):
        self.run, self.log, self.steps = folder / "run", folder / "log", steps
        (folder / "recipe.yaml").write_text(RECIPE)
        self.args = ("pretrain", "--config", folder / "recipe.yaml", "--data.path", data_set, "--run", self.run, *args)

    def finish(self, *args, before=None) -> Done:
        return bd3(*self.args, *args, log=self.log, before=before or functools.partial(spoil, self.steps))

    def die(self, death: tuple[str, str, int]) -> None:
        process = start(*self.args, log=self.log, before=functools.partial(spoil_and_die, self.steps, death))
        process.join()
        assert process.exitcode == -9, death

    @property
    def metrics(self) -> bytes:
        return (self.run / "metrics.jsonl").read_bytes()

    def trained(self) -> list[dict]:
        return [record for record in read_metrics(self.run) if record["split"] == "train"]

    def left_out(self) -> list[int]:
        return [record["step"] for record in self.trained() if record.get("skipped")]

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        found = find_checkpoint(self.run)
        return read_weights(found), {name: value for name, value in found.meta.items() if name != "run"}

    def files(self) -> dict[str, bytes]:
        names = ["skips.json", *(str(p.relative_to(self.run)) for p in self.run.glob("skipped/*"))]
        return {name: (self.run / name).read_bytes() for name in names if (self.run / name).exists()}


def assert_same(one: Recipe, other: Recipe) -> None:
    assert one.metrics == other.metrics
    (weights, meta), (expected, expected_meta) = one.state(), other.state()
    assert meta == expected_meta
    assert all(torch.equal(x, weights[name]) for name, x in expected.items())
    assert one.files() == other.files()


# ---- a loss that is not finite ----

NONFINITE = {3: math.nan, 8: math.inf}


@pytest.fixture(scope="module")
def nonfinite(tmp_path_factory, data_set) -> Recipe:
    recipe = Recipe(tmp_path_factory.mktemp("nonfinite"), data_set, NONFINITE)
    done = recipe.finish()
    assert done.code == 0, done.err
    return recipe


def test_a_loss_that_is_not_finite_is_recorded_and_training_goes_on(nonfinite):
    records = nonfinite.trained()
    assert [record["step"] for record in records] == list(range(1, 13))
    assert nonfinite.left_out() == [3, 8]
    assert records[2] == {
        "step": 3,
        "split": "train",
        "loss": None,
        "grad_norm": None,
        "lr": 0.003,
        "tokens": 3 * 6 * 32,
        "skipped": 1,
    }
    assert all("skipped" not in record for record in records if record["step"] not in (3, 8))
    assert all(math.isfinite(record["loss"]) for record in records if record["step"] not in (3, 8))
    assert nonfinite.state()[1]["updates"] == 10
    err = nonfinite.log.with_suffix(".err").read_text()
    path = nonfinite.run / "skipped" / "step-00000003.json"
    line = (
        f"step 3: loss nan, gradient norm nan: no update (1 of guard.nonfinite=3 in 1000 steps); its batch is in {path}"
    )
    assert f" rank 0 WARNING: {line}\n" in err
    assert "| skipped 2 |" in err


def test_the_batch_that_was_left_out_can_be_looked_at(nonfinite, data_set):
    found = json.loads((nonfinite.run / "skipped" / "step-00000003.json").read_text())
    assert (found["step"], found["reason"], found["loss"], found["grad_norm"]) == (3, "loss", "nan", "nan")
    reader = RowReader(data_set, "train")
    assert len(found["rows"]) == 6
    assert {row["epoch"] for row in found["rows"]} == {0}
    for row in found["rows"]:
        assert row["data"] == str(data_set)
        shard = [shard.name for shard in reader.shards].index(row["shard"])
        assert row["row"] == row["number"] == sum(s.rows for s in reader.shards[:shard]) + row["row_in_shard"]
    from data_prep.read.stream import RowStream

    _, expected = RowStream([reader], seed=0).at(np.arange(12, 18))
    assert [row["row"] for row in found["rows"]] == expected.tolist()
    assert all(row.get("suspect") for row in found["rows"])


def test_the_micro_batch_to_blame_is_named(tmp_path, data_set):
    recipe = Recipe(tmp_path, data_set, {3: math.nan})
    assert recipe.finish("--train.steps", 3, before=functools.partial(spoil, {3: math.nan}, 1)).code == 0
    found = json.loads((recipe.run / "skipped" / "step-00000003.json").read_text())
    assert [row.get("suspect", False) for row in found["rows"]] == [False, False, True, True, False, False]


@pytest.mark.parametrize("call", [3, *(pytest.param(call, marks=pytest.mark.long) for call in (4, 8, 9, 10))])
def test_a_run_killed_around_skipped_steps_ends_as_if_it_never_was(tmp_path, data_set, nonfinite, call):
    recipe = Recipe(tmp_path, data_set, NONFINITE)
    recipe.die(("pretrain.trainer.loop", "Trainer._train_step", call))
    assert recipe.finish().code == 0
    assert_same(recipe, nonfinite)


def test_so_many_skipped_steps_end_the_run_and_a_restart_counts_them(tmp_path, data_set):
    spoiled = {3: math.nan, 4: math.nan, 8: math.nan}
    for folder in ("outside", "inside"):
        (tmp_path / folder).mkdir()
    recipe = Recipe(tmp_path / "outside", data_set, spoiled)
    recipe.die(("pretrain.trainer.loop", "Trainer._train_step", 6))
    done = recipe.finish("--guard.window", 5)
    assert done.code == 0, done.err  # step 3 lies outside of the 5 steps up to 8
    recipe = Recipe(tmp_path / "inside", data_set, spoiled)
    recipe.die(("pretrain.trainer.loop", "Trainer._train_step", 6))
    done = recipe.finish("--guard.window", 6)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("guard.nonfinite=3: no finite loss and gradient in steps 3 4 8 ")
    # The count allows it again, and the run goes on from the checkpoint before.
    assert recipe.finish("--guard.nonfinite", 4).code == 0
    assert recipe.left_out() == [3, 4, 8]


# ---- steps left out by hand ----


def test_steps_left_out_by_hand_are_not_trained_on(tmp_path, data_set):
    recipe = Recipe(tmp_path, data_set, {5: math.nan}, "--guard.skip", "4-6", "9")
    before = functools.partial(spoil_and_die, {5: math.nan}, ("pretrain.trainer.loop", "Trainer._train_step", 6))
    process = start(*recipe.args, log=recipe.log, before=before)
    process.join()
    done = recipe.finish()
    assert done.code == 0, done.err
    assert recipe.left_out() == [4, 5, 6, 9]
    (record,) = (record for record in recipe.trained() if record["step"] == 4)
    assert record == {"step": 4, "split": "train", "loss": None, "lr": 0.003, "tokens": 4 * 6 * 32, "skipped": 1}
    assert recipe.state()[1]["updates"] == 8
    assert not (recipe.run / "skipped").exists()


def test_a_range_over_trained_steps_is_refused_and_going_back_works(tmp_path, data_set):
    recipe = Recipe(tmp_path, data_set, {})
    assert recipe.finish("--train.steps", 8).code == 0
    done = recipe.finish("--guard.skip", "5-6")
    folder = recipe.run / "checkpoints"
    assert (done.code, done.err) == (
        2,
        "guard.skip=5-6: step 5 is trained already, and the run goes on from step 8; remove the checkpoints after "
        f"that of step 4 from {folder} to go back to it, or give steps from 9 on\n",
    )
    for step in (6, 8):
        (folder / f"step-{step:08d}").rename(tmp_path / str(step))
    assert recipe.finish("--guard.skip", "5-6").code == 0
    assert recipe.left_out() == [5, 6]
    assert recipe.finish("--guard.skip", "5-6", "--train.steps", 14).code == 0  # they are left out: no contradiction
    assert [record["step"] for record in recipe.trained()] == list(range(1, 15))


# ---- a loss that jumps ----


@pytest.fixture(scope="module")
def spiked(tmp_path_factory, data_set) -> Recipe:
    recipe = Recipe(tmp_path_factory.mktemp("spiked"), data_set, {7: 1e3, 8: 1e3}, *SPIKE)
    done = recipe.finish()
    assert done.code == 0, done.err
    return recipe


def test_a_spike_is_undone_and_its_batches_left_out(spiked, tmp_path, data_set):
    assert spiked.left_out() == [7, 8, 9]
    assert json.loads((spiked.run / "skips.json").read_text()) == {
        "ranges": [{"first": 7, "last": 9, "spike_first": 7, "spike_last": 8}]
    }
    err = spiked.log.with_suffix(".err").read_text()
    assert "going back to step 6 and leaving out steps 7 to 9 (1 of guard.spike_limit=3, " in err
    by_hand = Recipe(tmp_path, data_set, {}, "--guard.skip", "7-9")
    assert by_hand.finish().code == 0
    assert spiked.metrics == by_hand.metrics
    (weights, _), (expected, _) = spiked.state(), by_hand.state()
    assert all(torch.equal(x, weights[name]) for name, x in expected.items())


DEATHS = [
    ("pretrain.trainer.loop", "Trainer._train_step", 8),  # the spike has begun
    ("pretrain.trainer.loop", "Trainer._go_back", 1),  # seen, nothing decided
    ("pretrain.trainer.stability", "write_text", 1),  # about to be remembered
    ("pretrain.trainer.stability", "_remove_undone", 2),  # remembered, nothing undone
    ("pretrain.trainer.loop", "restore", 1),
    ("pretrain.trainer.loop", "Trainer._open_metrics", 2),  # records of the spike still there
    ("pretrain.trainer.loop", "Trainer._train_step", 10),  # in the range
]
OFTEN = ("Trainer._go_back", "_remove_undone", "Trainer._open_metrics")  # the others are long


@pytest.mark.parametrize(
    "death",
    [
        pytest.param(death, id=f"{death[1]} {death[2]}", marks=() if death[1] in OFTEN else pytest.mark.long)
        for death in DEATHS
    ],
)
def test_a_run_killed_while_it_goes_back_ends_as_if_it_never_was(tmp_path, data_set, spiked, death):
    recipe = Recipe(tmp_path, data_set, {7: 1e3, 8: 1e3}, *SPIKE)
    recipe.die(death)
    done = recipe.finish()
    assert done.code == 0, done.err
    assert_same(recipe, spiked)


def test_a_checkpoint_inside_a_spike_is_not_taken_again(tmp_path, data_set):
    """Patience 3: the checkpoint of step 8 is written in the spike, and must be gone when step 9 completes it."""
    steps = dict.fromkeys((7, 8, 9), 1e3)
    args = (*SPIKE, "--guard.spike-patience", 3, "--guard.spike-window", 5)
    whole = Recipe(tmp_path, data_set, steps, *args)
    assert whole.finish().code == 0
    assert whole.left_out() == [7, 8, 9, 10]
    (tmp_path / "killed").mkdir()
    recipe = Recipe(tmp_path / "killed", data_set, steps, *args)
    recipe.die(("pretrain.trainer.stability", "_remove_undone", 2))
    assert (recipe.run / "checkpoints" / "step-00000008").is_dir()
    done = recipe.finish()
    assert done.code == 0, done.err
    assert "going on from step 6" in done.err
    assert_same(recipe, whole)


def test_a_spike_that_comes_again_ends_the_run_after_the_limit(tmp_path, data_set):
    recipe = Recipe(tmp_path, data_set, dict.fromkeys(range(7, 13), 1e3), *SPIKE, "--guard.spike-limit", 1)
    done = recipe.finish()
    assert done.code == 2
    line = done.err.splitlines()[-1]
    assert line.startswith("guard.spike_limit=1: the losses of steps 10 to 11 are a spike (last ")
    assert line.endswith("lower train.lr=0.003 in another --run, or raise guard.spike_limit")
    again = recipe.finish()
    assert again.code == 2
    assert again.err.splitlines()[-1] == line


def test_a_spike_without_a_checkpoint_from_before_ends_the_run(tmp_path, data_set):
    recipe = Recipe(tmp_path, data_set, {7: 1e3, 8: 1e3}, *SPIKE, "--checkpoint.every", 0)
    done = recipe.finish()
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith(
        "there is no checkpoint from before step 7; start another --run with --guard.skip 7-9 or a lower "
        "train.lr, or a smaller checkpoint.every"
    )
    assert not (recipe.run / "skips.json").exists()


# ---- detection ----

CONFIG = GuardConfig(spike=3.0, spike_window=5, spike_patience=2)


def observe(losses: list[float], config: GuardConfig = CONFIG) -> list[tuple[int, int] | None]:
    detector = SpikeDetector(config)
    return [detector.observe(step, loss) for step, loss in enumerate(losses, start=1)]


def test_a_spike_by_hand():
    calm = [1.0, 2.0, 3.0, 4.0, 5.0]  # median 3, MAD 1: high above 3 + 3 * 1.4826
    assert observe([*calm, 7.4, 7.4]) == [None] * 7
    assert observe([*calm, 7.5, 9.0]) == [None] * 6 + [(6, 7)]
    assert observe([*calm, 7.5, 3.0, 9.0]) == [None] * 8
    assert observe([*calm[1:], 99.0, 99.0]) == [None] * 6  # too few are known


@settings(max_examples=100, deadline=None)
@given(losses=st.lists(st.floats(0, 100), max_size=40), window=st.integers(2, 8), patience=st.integers(1, 4))
def test_detection_is_that_of_the_definition_and_of_the_last_losses_alone(losses, window, patience):
    config = GuardConfig(spike=2.0, spike_window=window, spike_patience=patience)

    def high(at: int) -> bool:
        if at < window:
            return False
        before = losses[at - window : at]
        median = statistics.median(before)
        return losses[at] > median + 2.0 * 1.4826 * statistics.median(abs(x - median) for x in before)

    found = observe(losses, config)
    for at in range(len(losses)):
        expected = at + 1 >= patience and all(high(n) for n in range(at - patience + 1, at + 1))
        assert (found[at] is not None) == expected
    if losses:
        last = SpikeDetector(config)
        for step, loss in list(enumerate(losses, start=1))[-(window + patience + 1) : -1]:
            last.observe(step, loss)
        assert (last.observe(len(losses), losses[-1]) is not None) == (found[-1] is not None)


def test_what_records_say(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 21):
            if step in (4, 15):
                writer.train(step, {"loss": None, "grad_norm": None, "skipped": 1})
            elif step == 10:
                writer.train(step, {"loss": None, "skipped": 1})
            else:
                writer.train(step, {"loss": float(step), "grad_norm": 1.0})
    options = GuardConfig(spike=1.0, spike_window=3, spike_patience=1, window=10)
    history = read_history(tmp_path, 16, options)
    assert (history.skipped, history.nonfinite) == (3, [15])
    assert history.losses == [(12, 12.0), (13, 13.0), (14, 14.0), (16, 16.0)]
    assert read_history(tmp_path, 14, options).nonfinite == []
    assert read_history(tmp_path, 13, options).nonfinite == [4]
    assert read_history(tmp_path, 16, GuardConfig()).losses == []
    check_skips(tmp_path, GuardConfig(skip=("4", "10", "15", "17-30")), 16)
    with pytest.raises(ConfigError, match=r"^guard\.skip=3-4: step 3 is trained already, .* no checkpoint from before"):
        check_skips(tmp_path, GuardConfig(skip=("3-4",)), 16)


def test_which_checkpoints_are_taken_again():
    ranges = [Range(10, 20, 10, 12), Range(30, 40, 31, 32)]
    assert not undone(ranges, 9, {})
    assert undone(ranges, 10, {})
    assert not undone(ranges, 29, {"skips": 1})
    assert undone(ranges, 30, {"skips": 1})
    assert not undone(ranges, 50, {"skips": 2})


# ---- configuration ----


@pytest.mark.parametrize("text", ["a", "0", "5-4", "3-", "-3", "1-2-3"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(
        ConfigError, match=rf"^guard\.skip={text}: not a range of steps; write FIRST-LAST as in 120-170"
    ):
        parse_options(RunConfig, [f"--guard.skip={text}"], "bd3 pretrain")


def test_ranges_are_read():
    config = parse_options(RunConfig, ["--guard.skip", "120-170", "300"], "bd3 pretrain")
    assert config.guard.ranges() == [(120, 170), (300, 300)]


def test_too_few_checkpoints_for_a_spike_are_told():
    spike = GuardConfig(spike=6.0, spike_patience=3)
    with pytest.raises(ConfigError, match=r"^checkpoint\.keep=2: with one every 1 steps .*; use 3 or more$"):
        check_run(RunConfig(guard=spike, checkpoint=CheckpointConfig(every=1, keep=2)), 1)
    check_run(RunConfig(guard=spike, checkpoint=CheckpointConfig(every=1, keep=3)), 1)
    check_run(RunConfig(guard=spike), 1)
