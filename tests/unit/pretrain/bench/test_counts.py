"""The gradient of a block by the number of its masked tokens, and the law of counts that follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bd3_common.errors import ConfigError
from bd3_megatron import parallel
from pretrain import bench
from tests.unit.commands import bd3
from tests.unit.pretrain.bench.test_draws import SHAPE, TRAIN, WATCH

OBJECTIVE = ("--diffusion.block-size", 4, "--diffusion.masking", "counts")


def train(folder: Path, data_set: Path, *objective) -> Path:
    done = bd3(
        *("pretrain", "--data.path", data_set, "--run", folder / "run"),
        *SHAPE,
        *TRAIN,
        *objective,
        *WATCH,
        log=folder / "log",
    )
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_set) -> Path:
    return train(tmp_path_factory.mktemp("counts"), data_set, *OBJECTIVE)


def test_the_law_of_least_variance_follows_from_the_norms(run, capsys):
    parallel.stop()
    assert bench.main(["counts", str(run), "--samples", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["count"] for row in found["rows"]] == [1, 2, 3, 4]
    norms = np.array([row["gradient"] for row in found["rows"]])
    k = np.arange(1, 5)
    q = norms / k / (norms / k).sum()
    assert found["count_probabilities"] == pytest.approx([0, *q])
    # A single token has a smaller gradient than several, a larger one than its share of them.
    assert norms[0] < norms[3] < 4 * norms[0]
    moments = found["second_moments"]
    assert moments["counts, uniform"] == 1
    assert moments["counts, least variance"] == pytest.approx((norms / k).sum() ** 2 / (4 * (norms / k) @ (norms / k)))
    assert moments["counts, least variance"] < 1 < moments["levels [0.001, 1]"]


def test_the_table_ends_with_options_that_train(run, data_set, tmp_path, capsys):
    parallel.stop()
    assert bench.main(["counts", str(run), "--samples", "16"]) == 0
    text = capsys.readouterr().out
    assert "B'=4; 16 blocks per count" in text
    options = text.splitlines()[-1].split()
    train(tmp_path, data_set, "--diffusion.block-size", 4, *options)


def test_an_objective_without_counts_is_refused_in_one_line(tmp_path, data_set):
    run = train(tmp_path, data_set, "--diffusion.block-size", 1, "--diffusion.beta", 1, "--diffusion.omega", 1)
    with pytest.raises(ConfigError, match="masks all or nothing, so that no count is drawn"):
        bench.main(["counts", str(run)])
