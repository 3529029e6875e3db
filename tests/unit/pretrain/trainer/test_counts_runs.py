"""Runs that train by counts: killed and started again they end as if they had not been, and their record is a bound."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from pretrain.tracking.metrics import read_metrics
from tests.unit.commands import die_at
from tests.unit.pretrain.trainer.test_loop import Recipe, assert_as_uninterrupted

COUNTS = ("--diffusion.masking", "counts", "--log.blocks-every", 1, "--log.noise-scale-every", 2)
OBJECTIVES = {
    "single": (),
    "pairs": ("--diffusion.draws", 2, "--diffusion.coupling", "complementary"),
    "given": ("--diffusion.count-weights", 0, 1, 1, 1, 2),
}


class Counts(Recipe):
    """A run by counts."""

    def __init__(self, folder: Path, data_set: Path, objective: str):
        super().__init__(folder, data_set)
        self.args = (*self.args, *COUNTS, *OBJECTIVES[objective])


@pytest.fixture(
    scope="module", params=["pairs", *(pytest.param(name, marks=pytest.mark.long) for name in ("single", "given"))]
)
def whole(request, tmp_path_factory, data_set) -> tuple[str, Recipe]:
    recipe = Counts(tmp_path_factory.mktemp("whole"), data_set, request.param)
    done = recipe.finish()
    assert done.code == 0, done.err
    return request.param, recipe


def test_a_run_by_counts_that_is_killed_ends_as_if_it_never_was(whole, tmp_path, data_set):
    objective, uninterrupted = whole
    recipe = Counts(tmp_path, data_set, objective)
    for death in (("pretrain.trainer.loop", "Trainer._train_step", 4), ("pretrain.checkpoint.folder", "_rename", 2)):
        process = recipe.start(before=functools.partial(die_at, *death))
        process.join()
        assert process.exitcode == -9, death
    assert_as_uninterrupted(recipe, uninterrupted)


def test_a_run_by_counts_records_its_bound(whole):
    objective, recipe = whole
    records = [record for record in read_metrics(recipe.run) if record["split"] == "train"]
    assert all(record["block_variance"] > 0 for record in records)
    assert all(0 < record["masked_fraction"] < 1 for record in records)
    if objective != "given":  # loss and bound divide by different numbers of tokens, and draws are few
        assert records[0]["bound"] == pytest.approx(records[0]["loss"], rel=0.15)
    assert [record["step"] for record in records if "gradient_noise" in record] == [2, 4, 6]
    (first, *_) = (record for record in read_metrics(recipe.run) if record["split"] == "validation")
    assert {f"nll_by_count_{k}" for k in (1, 2, 3, 4)} <= first.keys()
