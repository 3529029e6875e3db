"""Gradient noise scale and statistics over blocks in the metrics of a run."""

from __future__ import annotations

import numpy as np
import pytest

from bd3_megatron.engine.base import StepResult
from pretrain.config.schema import RunConfig
from pretrain.tracking.metrics import read_metrics
from pretrain.trainer.noise_scale import NoiseScale
from tests.unit.pretrain.trainer.test_loop import Recipe


def test_signal_and_noise_of_gradients_that_are_known():
    """Rows with gradients of mean (.3, .4) and covariance of trace 8: means over 5000 draws."""
    config = RunConfig(train={"global_batch": 8, "micro_batch": 8}, log={"noise_scale_every": 1})
    measured = NoiseScale(config)
    measured.rows = 4
    chance = np.random.default_rng(0)
    found = []
    for _ in range(5000):
        rows = np.array([0.3, 0.4]) + 2 * chance.standard_normal((8, 2))
        half, whole = (float(np.linalg.norm(rows[:n].mean(0))) for n in (4, 8))
        values = measured.fields(half, StepResult(1.0, whole))
        found.append((values["gradient_signal"], values["gradient_noise"]))
    signal, noise = np.mean(found, axis=0)
    assert signal == pytest.approx(0.25, abs=0.05)
    assert noise == pytest.approx(8, rel=0.05)


def test_a_run_records_both_and_trains_as_without(tmp_path, data_set):
    folders = [tmp_path / name for name in ("plain", "watched")]
    for folder in folders:
        folder.mkdir()
    plain, watched = (Recipe(folder, data_set) for folder in folders)
    assert plain.finish("--log.blocks-every", 0).code == 0
    done = watched.finish("--log.blocks-every", 2, "--log.noise-scale-every", 3)
    assert done.code == 0, done.err
    ours, theirs = (
        [record for record in read_metrics(recipe.run) if record["split"] == "train"] for recipe in (watched, plain)
    )
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        assert {name: mine[name] for name in other} == other
        assert ("block_variance" in mine) == ("nll_by_count_4" in mine) == (step % 2 == 0)
        assert ("noise_scale" in mine) == (step % 3 == 0)
    assert ours[1]["block_variance"] > 0
    assert 0 < ours[1]["masked_fraction"] < 1
    assert (watched.run / "curves.png").is_file()
