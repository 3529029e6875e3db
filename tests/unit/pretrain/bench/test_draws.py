"""The variance of a run's gradient by how noise is drawn: its statistics, its gradients, its table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bd3_common.errors import ConfigError
from bd3_megatron import parallel
from bd3_megatron.config import ParallelConfig
from bd3_megatron.engine.megatron import MegatronEngine
from pretrain import bench
from pretrain.bench import draws
from pretrain.bench.draws import DrawsOptions, Scatter
from pretrain.checkpoint.loaded_run import load_run
from pretrain.run_folder.data import open_stream
from pretrain.trainer.batches import Batches
from tests.conftest import LENGTH
from tests.unit.commands import bd3

SHAPE = ("--model.layers", 2, "--model.hidden", 32, "--model.heads", 4, "--model.length", LENGTH)
TRAIN = ("--train.steps", 2, "--train.global-batch", 8, "--train.micro-batch", 8, "--train.precision", "fp32")
OBJECTIVE = ("--diffusion.block-size", 4, "--diffusion.beta", 0.3, "--diffusion.omega", 0.8)
WATCH = ("--train.warmup-steps", 0, "--train.lr", 0.01, "--eval.rows", 4, "--log.tensorboard", "false")


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_set) -> Path:
    folder = tmp_path_factory.mktemp("run")
    done = bd3(
        *("pretrain", "--data.path", data_set, "--run", folder / "run"),
        *SHAPE,
        *TRAIN,
        *OBJECTIVE,
        *WATCH,
        log=folder / "log",
    )
    assert done.code == 0, done.err
    return folder / "run"


def test_the_scatter_is_the_trace_of_the_covariance():
    vectors = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)) + 100
    scatter = Scatter(7, torch.device("cpu"))
    for vector in vectors:
        scatter.add(vector)
    assert scatter.variance == pytest.approx(np.trace(np.cov(vectors.double().numpy().T)), rel=1e-4)
    torch.testing.assert_close(scatter.mean, vectors.mean(0))


@pytest.mark.parametrize("micro", [8, 4, 3])
def test_the_gradient_is_that_of_a_training_step(run, micro):
    """The first step of the run, its norm before clipping, however the rows are dealt to passes."""
    parallel.stop()
    loaded = load_run(run)
    config = loaded.config
    stream = open_stream(config.data, "train", config.model)
    batches = Batches(stream, config.model, config.diffusion, global_batch=8, micro_batch=8)
    options = DrawsOptions(run=str(run), micro_batch=micro)
    with loaded.engine() as engine:
        found, loss = draws._gradient(options, loaded, engine, stream, [batches.keys(0)], 0)
        twice, _ = draws._gradient(options, loaded, engine, stream, [batches.keys(0)] * 2, 0)
    torch.testing.assert_close(twice, found)
    world = parallel.start(ParallelConfig())
    trained = MegatronEngine(config.engine(), world)
    trained.set_weights(loaded.weights)
    result = trained.train_step(batches.at(0), 1e-3)
    assert found.norm().item() == pytest.approx(result.grad_norm, rel=1e-5)
    assert loss == pytest.approx(result.loss, rel=1e-5)
    parallel.stop()


def test_draws_are_compared_by_variance_times_flops(run, capsys):
    parallel.stop()
    assert bench.main(["draws", str(run), "--rows", "2", "--samples", "32", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    names = ["1 pair", "2 separate pairs", "2 draws, independent", "2 draws, antithetic", "2 draws, complementary"]
    assert [(row["over"], row["estimator"]) for row in rows] == [
        (over, name) for over in ("noise", "rows and noise") for name in names
    ]
    for over in (rows[:5], rows[5:]):
        one, pairs, independent, antithetic, complementary = over
        assert pairs["relative"] == 1
        # The mean of two separate gradients has half of one's variance at twice its cost.
        assert pairs["flops"] == 2 * one["flops"]
        assert one["relative"] == pytest.approx(1, abs=4 * one["relative_stderr"])
        # Three streams instead of four, but as many rows for the head.
        assert 0.75 < independent["flops"] / pairs["flops"] < 0.85
        assert independent["flops"] == antithetic["flops"] == complementary["flops"]
        assert all(row["variance_stderr"] < 0.3 * row["variance"] for row in over)
        assert all(row["relative"] > 0 and row["seconds"] > 0 for row in over)
    # Over the noise alone all have one mean; complements vary less than anything else.
    assert all(row["mean_distance"] < 3 for row in rows[1:5] if row["mean_distance"] is not None)
    assert rows[4]["relative"] < 0.7
    assert all(one["variance"] < other["variance"] for one, other in zip(rows[:5], rows[5:]))


def test_the_table_and_its_options(run, capsys):
    parallel.stop()
    options = ["--samples", "16", "--rows", "1", "--draws", "2", "4", "--couplings", "antithetic", "--no-fresh-rows"]
    assert bench.main(["draws", str(run), *options, "--beta", "0.5", "--omega", "1", "--stratify", "false"]) == 0
    text = capsys.readouterr().out
    assert "noise levels [0.5, 1]; 16 gradients of 1 clean row each" in text
    assert "rows and noise" not in text
    lines = [line[:26].strip() for line in text.splitlines()[4:]]
    assert lines == ["1 pair", "2 separate pairs", "2 draws, antithetic", "4 separate pairs", "4 draws, antithetic"]


@pytest.mark.long
def test_another_masking_than_the_run_s_is_compared(run, capsys):
    """Counts estimate the bound with less variance than the whole interval of levels."""
    parallel.stop()
    found = {}
    for masking in ("levels", "counts"):
        options = ["--masking", masking, "--samples", "16", "--rows", "4", "--draws", "2", "--couplings", "antithetic"]
        if masking == "levels":
            options += ["--beta", "0.001", "--omega", "1"]
        assert bench.main(["draws", str(run), *options, "--no-fresh-rows", "--json"]) == 0
        found[masking] = json.loads(capsys.readouterr().out)["rows"][0]
    assert found["counts"]["loss_variance"] < 0.2 * found["levels"]["loss_variance"]
    assert found["counts"]["variance"] < found["levels"]["variance"]
    assert bench.main(["draws", str(run), "--masking", "counts", "--samples", "16", "--rows", "1"]) == 0
    assert "B'=4, uniform counts; 16 gradients" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--draws", "3"], "diffusion.draws=3: diffusion.coupling=antithetic takes draws in pairs"),
        (["--beta", "1"], "{run}: this objective masks all or nothing, so that no noise is drawn"),
        (["--beta", "0.9"], "diffusion.beta=0.9: above diffusion.omega=0.8"),
        (["--samples", "4"], "samples=4: use 16 or more"),
        (["--couplings", "mirrored"], "couplings=mirrored: use independent, antithetic or complementary"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(run, options, line):
    options = [*options, "--omega", "1"] if options == ["--beta", "1"] else options
    with pytest.raises(ConfigError) as caught:
        bench.main(["draws", str(run), *options])
    assert str(caught.value).startswith(line.format(run=run))
