"""Runs that search for their clip interval: they train on what they find, and go on exactly where they are killed."""

from __future__ import annotations

import functools

import pytest
import torch

from pretrain.checkpoint.reader import find_checkpoint
from pretrain.tracking.metrics import read_metrics
from tests.unit.commands import bd3, die_at
from tests.unit.pretrain.trainer.test_loop import Recipe

SEARCH = ("--clip-search.every", 2, "--clip-search.rows", 16, "--clip-search.significance", 0)


@pytest.fixture(scope="module")
def searching(tmp_path_factory, data_set) -> Recipe:
    recipe = Recipe(tmp_path_factory.mktemp("searching"), data_set)
    done = recipe.finish(*SEARCH)
    assert done.code == 0, done.err
    assert "clip interval [" in done.err
    return recipe


def test_searches_are_recorded_and_in_the_checkpoint(searching):
    found = [record for record in read_metrics(searching.run) if record["split"] == "clip_search"]
    assert [record["step"] for record in found] == [2, 4, 6]
    history = find_checkpoint(searching.run).meta["clip_history"]
    assert [row[:4] for row in history] == [[r["step"], r["beta"], r["omega"], r["variance"]] for r in found]
    meta = find_checkpoint(searching.run).meta
    assert (meta["beta"], meta["omega"]) == (found[-1]["beta"], found[-1]["omega"]) != (1e-3, 1.0)
    for record in found:
        assert record["variance"] <= record["variance_before"]
    assert found[1]["variance_before"] < 0.5 * found[0]["variance_before"]  # it trains on what it found


def test_the_direct_search_finds_about_the_same(searching, tmp_path, data_set):
    recipe = Recipe(tmp_path, data_set)
    direct = ("--clip-search.estimator", "direct", "--train.steps", 2, "--clip-search.rows", 64)
    done = recipe.finish(*SEARCH, *direct)
    assert done.code == 0, done.err
    counts = Recipe(tmp_path / "counts", data_set) if (tmp_path / "counts").mkdir() is None else None
    assert counts.finish(*SEARCH, "--train.steps", 2, "--clip-search.rows", 64).code == 0
    first, other = (
        next(record for record in read_metrics(r.run) if record["split"] == "clip_search") for r in (recipe, counts)
    )
    assert first["best_variance"] == pytest.approx(other["best_variance"], rel=0.2)


@pytest.mark.parametrize(
    "death",
    [
        ("pretrain.trainer.loop", "Trainer._search_interval", 2),
        ("pretrain.trainer.loop", "Trainer._save", 4),
        ("pretrain.trainer.loop", "Trainer._train_step", 4),
    ],
)
def test_a_run_killed_around_a_search_ends_as_if_it_never_was(searching, tmp_path, data_set, death):
    recipe = Recipe(tmp_path, data_set)
    process = recipe.start(*SEARCH, before=functools.partial(die_at, *death))
    process.join()
    assert process.exitcode == -9
    done = recipe.finish(*SEARCH)
    assert done.code == 0, done.err
    assert recipe.metrics == searching.metrics
    expected = searching.weights()
    assert all(torch.equal(x, expected[name]) for name, x in recipe.weights().items())


def test_counts_have_no_interval_to_search_for(tmp_path, data_set):
    recipe = Recipe(tmp_path, data_set)
    done = bd3(*recipe.args, *SEARCH, "--diffusion.masking", "counts", log=recipe.log)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "clip_search.every=2: diffusion.masking=counts draws no noise levels, so no interval to search for; use 0, or "
        "diffusion.masking=levels\n"
    )
