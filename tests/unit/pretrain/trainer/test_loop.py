"""The loop: which rows make a step, the learning rate, and runs that are killed and started again."""

from __future__ import annotations

import fcntl
import functools
import itertools
import json
import math
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_megatron.config import DiffusionConfig
from data_prep.build.prep import PrepConfig, prep
from data_prep.format.manifest import load_manifest
from data_prep.read.reader import RowReader
from data_prep.read.stream import RowStream
from pretrain.checkpoint import writer
from pretrain.checkpoint.reader import find_checkpoint, read_weights
from pretrain.config.data_fit import resolve_model
from pretrain.config.schema import TrainConfig
from pretrain.run_folder.layout import COMPLETE
from pretrain.tracking.metrics import read_metrics
from pretrain.trainer.batches import Batches
from pretrain.trainer.learning_rate import learning_rate
from tests.unit import tiny
from tests.unit.commands import Done, bd3, die_at, limit_files, start

# ---- rows and noise of a step ----


def batches(data_set: Path, objective: DiffusionConfig, **options) -> Batches:
    reader = RowReader(data_set, "train")
    ids = {"vocab_size": None, "mask_id": None, "bos_id": None, "eos_id": None}
    model = resolve_model(tiny.shape(length=reader.length, **ids), reader.manifest, "data")
    return Batches(RowStream([reader], seed=5), model, objective, global_batch=12, noise_seed=6, **options)


def streams_of(parts: list, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[S, rows, L]`` and weights ``[K, rows, L]`` of micro-batches, joined."""
    ids = [part.input_ids.unflatten(0, (draws + 1, -1)) for part in parts]
    weights = [part.weight.unflatten(0, (draws, -1)) for part in parts]
    return torch.cat(ids, 1), torch.cat(weights, 1)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize(("size", "micro"), [(1, 5), (2, 6), (3, 2), (4, 1), (12, 1)])
def test_a_step_is_the_same_under_every_layout(data_set, size, micro, draws):
    diffusion = DiffusionConfig(block_size=4, draws=draws)
    for step in (0, 3, 50):
        alone = streams_of(batches(data_set, diffusion, micro_batch=12).at(step), draws)
        ranks = [batches(data_set, diffusion, micro_batch=micro, rank=rank, size=size).at(step) for rank in range(size)]
        spread = streams_of([part for parts in ranks for part in parts], draws)
        for one, other in zip(alone, spread):
            assert torch.equal(one, other)


def test_an_epoch_shows_every_row_once_with_noise_of_its_own(data_set):
    made = batches(data_set, DiffusionConfig(block_size=4), micro_batch=12)
    rows = len(made.stream)
    assert rows % 12 == 0
    steps = rows // 12
    epochs = [
        streams_of([part for step in range(*ends) for part in made.at(step)], 1)[0]
        for ends in ((0, steps), (steps, 2 * steps))
    ]
    every = made.stream.rows(np.arange(rows))
    orders = []
    for _noisy, clean in epochs:
        assert np.array_equal(np.unique(clean, axis=0), np.unique(every, axis=0))
        orders.append(clean)
    assert not torch.equal(*orders)
    # The same row is masked elsewhere in the second epoch.
    masks = [dict(zip(map(bytes, clean.numpy()), (noisy != clean).numpy())) for noisy, clean in epochs]
    same = [np.array_equal(mask, masks[1][row]) for row, mask in masks[0].items()]
    assert np.mean(same) < 0.02


# ---- learning rate ----


@settings(max_examples=100, deadline=None)
@given(
    warmup=st.integers(0, 50),
    steps=st.integers(1, 200),
    decay=st.sampled_from(["constant", "cosine", "linear"]),
    share=st.floats(0, 1),
)
def test_learning_rate_warms_up_linearly_then_falls_to_its_end(warmup, steps, decay, share):
    lr = 3e-4
    train = TrainConfig(steps=steps, warmup_steps=warmup, decay=decay, lr=lr, min_lr=share * lr)
    rates = [learning_rate(train, step) for step in range(steps)]
    for step, rate in enumerate(rates[:warmup]):
        assert rate == pytest.approx(lr * (step + 1) / warmup)
    after = rates[warmup:]
    assert all(share * lr * (1 - 1e-9) <= rate <= lr for rate in after)
    assert all(later <= earlier for earlier, later in itertools.pairwise(after))
    if decay == "constant":
        assert set(after) <= {lr}
    elif after:
        assert after[-1] == pytest.approx(share * lr)


def test_learning_rate_by_hand():
    train = TrainConfig(steps=10, warmup_steps=2, decay="cosine", lr=1.0, min_lr=0.2)
    assert learning_rate(train, 5) == pytest.approx(0.2 + 0.8 * 0.5)  # half of the eight steps after warm-up
    assert learning_rate(train, 3) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    linear = train.model_copy(update={"decay": "linear"})
    assert learning_rate(linear, 3) == pytest.approx(0.2 + 0.8 * 6 / 8)


# ---- killed and started again ----

RECIPE = """
model: {layers: 1, hidden: 32, heads: 4, kv_heads: 2, length: 32, dropout: 0.1}
diffusion: {block_size: 4}
train: {steps: 6, global_batch: 6, micro_batch: 2, precision: fp32, warmup_steps: 2, lr: 0.003, ema_decay: 0.9}
eval: {every: 3, rows: 8}
checkpoint: {every: 1, keep: 2}
log: {tensorboard: false}
"""


class Recipe:
    """A small run, to be started again and again into one folder."""

    def __init__(self, folder: Path, data_set: Path):
        self.run, self.log = folder / "run", folder / "log"
        config = folder / "recipe.yaml"
        config.write_text(RECIPE)
        self.args = ("pretrain", "--config", config, "--data.path", data_set, "--run", self.run)

    def start(self, *args, **options):
        return start(*self.args, *args, log=self.log, **options)

    def finish(self, *args, **options) -> Done:
        return bd3(*self.args, *args, log=self.log, **options)

    @property
    def metrics(self) -> bytes:
        path = self.run / "metrics.jsonl"
        return path.read_bytes() if path.exists() else b""

    def weights(self) -> dict[str, torch.Tensor]:
        return read_weights(find_checkpoint(self.run))

    def files(self) -> dict[str, bytes]:
        """Contents by path, without the measurements that every start writes."""
        found = (path for path in self.run.rglob("*") if path.is_file() and path.name != "preflight.json")
        return {str(path.relative_to(self.run)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_set) -> Recipe:
    recipe = Recipe(tmp_path_factory.mktemp("uninterrupted"), data_set)
    done = recipe.finish()
    assert done.code == 0, done.err
    return recipe


@pytest.fixture
def recipe(tmp_path, data_set) -> Recipe:
    return Recipe(tmp_path, data_set)


def assert_as_uninterrupted(recipe: Recipe, uninterrupted: Recipe) -> None:
    done = recipe.finish()
    assert done.code == 0, done.err
    assert recipe.metrics == uninterrupted.metrics
    expected = uninterrupted.weights()
    assert all(torch.equal(x, expected[name]) for name, x in recipe.weights().items())
    kept = sorted(path.name for path in (recipe.run / "checkpoints").iterdir())
    assert kept == ["step-00000005", "step-00000006"]


def test_what_an_uninterrupted_run_records(uninterrupted):
    records = [(record["step"], record["split"]) for record in read_metrics(uninterrupted.run)]
    assert records == [
        (0, "validation"),
        *((step, "train") for step in (1, 2, 3)),
        (3, "validation"),
        *((step, "train") for step in (4, 5, 6)),
        (6, "validation"),
    ]
    losses = [record["loss"] for record in read_metrics(uninterrupted.run) if record["split"] == "train"]
    assert len(set(losses)) == 6


def test_what_the_clock_says_about_checkpoints_is_kept_apart(uninterrupted):
    records = [r for r in read_metrics(uninterrupted.run, "throughput.jsonl") if r["split"] == "checkpoint"]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert record.keys() == {"step", "split", "stall_seconds", "write_seconds", "bytes"}
        assert record["stall_seconds"] > 0
        assert record["write_seconds"] > 0
        folder = uninterrupted.run / "checkpoints" / "step-00000006"
        files = sum(path.stat().st_size for path in folder.iterdir() if path.name != COMPLETE)
        assert record["bytes"] == pytest.approx(files, rel=0.01)


def test_a_run_that_waits_for_its_checkpoints_computes_the_same(recipe, uninterrupted):
    done = recipe.finish("--checkpoint.asynchronous", "false")
    assert done.code == 0, done.err
    assert recipe.metrics == uninterrupted.metrics


def test_a_checkpoint_of_another_position_is_refused(recipe, uninterrupted):
    shutil.copytree(uninterrupted.run, recipe.run)
    meta = find_checkpoint(recipe.run).meta
    assert {name: meta[name] for name in ("rows", "seed", "order_seed", "beta", "omega", "tokens")} == {
        "rows": 36,
        "seed": 0,
        "order_seed": 0,
        "beta": 0.001,
        "omega": 1.0,
        "tokens": 36 * 32,
    }
    path = recipe.run / "checkpoints" / "step-00000006"
    listing = json.loads((path / COMPLETE).read_text())
    listing["meta"]["omega"] = 0.5
    (path / COMPLETE).write_text(json.dumps(listing))
    done = recipe.finish()
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"{path}: written with omega 0.5, the configuration gives 1.0; use the configuration the run was started with\n"
    )


# Where a run is killed, in the order in which the starts of one run die. Checkpoints are written in the background, so
# that a start may go on from the step that the one before was about to save, or from the one after.
DEATHS = [
    ("pretrain.trainer.loop", "prepare", 1),  # before anything is written
    ("pretrain.run_folder.prepare", "save_config", 1),  # a folder without a configuration
    ("pretrain.tracking.metrics", "MetricsWriter._record", 1),
    ("pretrain.trainer.loop", "Trainer._train_step", 1),  # evaluated at step 0, nothing else
    ("pretrain.trainer.loop", "Trainer._save", 1),  # step 1 recorded, not saved
    ("pretrain.checkpoint.tensor_file", "write_tensors", 1),  # an empty folder
    ("pretrain.checkpoint.writer", "write_index", 1),  # tensors written, their index not
    ("pretrain.checkpoint.folder", "publish", 1),  # all written but the list
    ("pretrain.checkpoint.folder", "_rename", 1),  # the list written, the checkpoint of step 1 about to appear
    ("pretrain.checkpoint.folder", "sync", 1),  # it has appeared
    ("pretrain.trainer.loop", "Trainer._evaluate", 1),  # before the validation of step 3
    ("pretrain.checkpoint.folder", "retire", 1),  # the next one complete, the one before not yet removed
    ("pretrain.trainer.loop", "Trainer._save", 1),
    ("pretrain.checkpoint.folder", "_rename", 1),
    ("pretrain.trainer.loop", "Trainer._finish", 1),  # all done but the curves
]


def test_a_run_killed_at_every_delicate_point_ends_as_if_it_never_was(recipe, uninterrupted):
    for death in DEATHS:
        process = recipe.start(before=functools.partial(die_at, *death))
        process.join()
        assert process.exitcode == -9, death
    assert_as_uninterrupted(recipe, uninterrupted)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(recipe, uninterrupted, seed):
    chance = random.Random(seed)
    for records in sorted(chance.sample(range(1, 9), 3)):
        process = recipe.start()
        while process.exitcode is None and recipe.metrics.count(b"\n") < records:
            process.join(1e-3)
        process.kill()
        process.join()
    assert_as_uninterrupted(recipe, uninterrupted)


def hold_writer(folder: Path, partial: str) -> None:
    """The background writer stays inside the folder of this checkpoint, while training goes on."""
    original = writer.write_index

    def held(*args, **options):
        while any(folder.glob(partial)):
            time.sleep(0.1)
        return original(*args, **options)

    writer.write_index = held


@pytest.mark.long
def test_a_run_killed_while_it_writes_checkpoints_ends_as_if_it_never_was(recipe, uninterrupted):
    for step in (1, 4):
        folder, partial = recipe.run / "checkpoints", f".step-{step:08d}.*.partial"
        process = recipe.start(before=functools.partial(hold_writer, folder, partial))
        while process.exitcode is None and not any(folder.glob(partial)):
            process.join(1e-3)
        process.kill()
        process.join()
        assert process.exitcode == -9
    assert_as_uninterrupted(recipe, uninterrupted)


def test_damage_costs_steps_and_nothing_else(recipe, uninterrupted):
    assert recipe.finish("--train.steps", 4).code == 0
    newest = recipe.run / "checkpoints" / "step-00000004"
    (newest / "index.json").unlink()
    with (recipe.run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "spl')  # a torn line
    # The evaluation at the end of the shorter run is of step 4, which lies behind the checkpoint of step 3.
    assert_as_uninterrupted(recipe, uninterrupted)
    assert f"{newest}: index.json is missing; skipped" in (recipe.log.with_suffix(".err")).read_text()


def test_a_finished_run_started_again_does_nothing(uninterrupted):
    before = uninterrupted.files()
    done = uninterrupted.finish()
    assert done.code == 0
    assert "already at step 6 of 6" in done.err
    log = "logs/rank-00000.log"
    after = uninterrupted.files()
    assert after.pop(log).startswith(before.pop(log))
    assert after == before


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            ("--train.lr", "0.1"),
            "train.lr=0.1: the run in {run} was started with 0.003; use that, another --run, or "
            "--resume.allow train.lr",
        ),
        (("--model.layers", "2"), "model.layers=2: the run in {run} was started with 1; use that, or another --run"),
        (
            ("--diffusion.block-size", "8"),
            "diffusion.block_size=8: the run in {run} was started with 4; use that, or another --run",
        ),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(uninterrupted, change, line):
    before = uninterrupted.files()
    done = uninterrupted.finish(*change)
    assert (done.code, done.out, done.err) == (2, "", line.format(run=uninterrupted.run) + "\n")
    assert uninterrupted.files() == before


def test_other_data_are_refused_and_the_run_stays_as_it_was(uninterrupted, data_set, tmp_path):
    other = tmp_path / "other"
    manifest = load_manifest(data_set)
    texts = [json.dumps({"id": str(n), "text": f"word{n} " * 400}) for n in range(20)]
    (tmp_path / "other.jsonl").write_text("\n".join(texts))
    tokenizer = str(data_set / manifest.tokenizer)
    prep(
        PrepConfig(inputs=(str(tmp_path / "other.jsonl"),), out=str(other), length=manifest.length, tokenizer=tokenizer)
    )
    before = {path: path.read_bytes() for path in uninterrupted.run.rglob("*") if path.is_file()}
    done = uninterrupted.finish("--data.path", other)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(f"data.path={other}: not the data ")
    assert {path: path.read_bytes() for path in uninterrupted.run.rglob("*") if path.is_file()} == before


def test_a_folder_in_use_is_refused(recipe):
    recipe.run.mkdir(parents=True)
    holder = os.open(recipe.run, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        done = recipe.finish()
    finally:
        os.close(holder)
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith("another process is training in it; wait for it or use another --run")
    assert list(recipe.run.iterdir()) == []


def test_a_loss_that_is_no_number_ends_the_run_with_its_last_checkpoint(recipe):
    done = recipe.finish("--train.lr", "1e30", "--train.clip-norm", "0", "--train.warmup-steps", "0")
    assert done.code == 2
    assert done.err.splitlines()[-1] == (
        f"guard.nonfinite=3: no finite loss and gradient in steps 2 3 4 (batches in {recipe.run / 'skipped'}); "
        f"lower train.lr=1e+30 in another --run, or go on with --guard.skip 2-4, or raise guard.nonfinite"
    )
    assert "Traceback" not in done.err
    assert find_checkpoint(recipe.run).step == 3
    records = [record for record in read_metrics(recipe.run) if record["split"] == "train"]
    assert [(record["loss"] is None, record.get("skipped")) for record in records] == [(False, None), *[(True, 1)] * 3]


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(recipe, uninterrupted):
    assert recipe.finish("--train.steps", 2).code == 0
    before = sorted((recipe.run / "checkpoints").iterdir())
    done = recipe.finish(before=functools.partial(limit_files, 100_000))
    assert done.code == 2
    path = recipe.run / "checkpoints" / "step-00000003"
    assert done.err.splitlines()[-1] == f"{path}: cannot write: File too large"
    assert "Traceback" not in done.err
    assert sorted((recipe.run / "checkpoints").iterdir()) == before
