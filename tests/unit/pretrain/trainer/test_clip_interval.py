"""Runs that search for their clip interval: they train on what they find, and go on exactly where they are killed."""

from __future__ import annotations

import functools
import signal

import pytest
import torch

from bd3_common.errors import ConfigError
from pretrain.checkpoint.clip_state import read_clip_state
from pretrain.checkpoint.loaded_run import load_run
from pretrain.checkpoint.reader import find_checkpoint
from pretrain.config.schema import RunConfig
from pretrain.resilience import signals
from pretrain.tracking.metrics import read_metrics
from pretrain.trainer import loop
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
    assert [record["step"] for record in found] == [2, 4]  # after the last step nothing trains
    history = find_checkpoint(searching.run).meta["clip_history"]
    assert [row[:4] for row in history] == [[r["step"], r["beta"], r["omega"], r["variance"]] for r in found]
    meta = find_checkpoint(searching.run).meta
    assert (meta["beta"], meta["omega"]) == (found[-1]["beta"], found[-1]["omega"]) != (1e-3, 1.0)
    for record in found:
        assert record["variance"] <= record["variance_before"]
    assert found[1]["variance_before"] < 0.5 * found[0]["variance_before"]  # it trains on what it found


@pytest.mark.long
def test_the_direct_search_finds_about_the_same(searching, tmp_path, data_set):
    recipe = Recipe(tmp_path, data_set)
    more = ("--train.steps", 3, "--clip-search.rows", 64, "--clip-search.grid", "0.5:1.0", "0.3:0.8")
    done = recipe.finish(*SEARCH, *more, "--clip-search.estimator", "direct")
    assert done.code == 0, done.err
    (tmp_path / "counts").mkdir()
    counts = Recipe(tmp_path / "counts", data_set)
    assert counts.finish(*SEARCH, *more).code == 0
    first, other = (
        next(record for record in read_metrics(r.run) if record["split"] == "clip_search") for r in (recipe, counts)
    )
    for interval in ("0.5-1", "0.3-0.8"):
        assert first[f"variance_{interval}"] == pytest.approx(other[f"variance_{interval}"], rel=0.1)


@pytest.mark.parametrize(
    "death",
    [
        ("pretrain.trainer.loop", "Trainer._search_interval", 2),
        pytest.param(("pretrain.trainer.loop", "Trainer._save", 4), marks=pytest.mark.long),
        pytest.param(("pretrain.trainer.loop", "Trainer._train_step", 4), marks=pytest.mark.long),
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


def stop_in_the_evaluation_of(step: int) -> None:
    """A signal arrives while this step is evaluated."""
    evaluate = loop.Trainer._evaluate

    def interrupted(trainer: loop.Trainer):
        if trainer.step == step:
            signals.received = lambda: signal.SIGTERM
        return evaluate(trainer)

    loop.Trainer._evaluate = interrupted


def test_a_signal_in_an_evaluation_costs_no_search(tmp_path, data_set):
    recipes = []
    for name in ("stopped", "whole"):
        (tmp_path / name).mkdir()
        recipes.append(Recipe(tmp_path / name, data_set))
    options = (*SEARCH, "--eval.every", 4)
    process = recipes[0].start(*options, before=functools.partial(stop_in_the_evaluation_of, 4))
    process.join()
    assert process.exitcode == signals.exit_code(signal.SIGTERM)
    for recipe in recipes:
        done = recipe.finish(*options)
        assert done.code == 0, done.err
    assert recipes[0].metrics == recipes[1].metrics
    expected = recipes[1].weights()
    assert all(torch.equal(x, expected[name]) for name, x in recipes[0].weights().items())


def test_the_commands_after_training_have_the_interval_that_was_found(searching):
    meta = find_checkpoint(searching.run).meta
    diffusion = load_run(searching.run).config.diffusion
    assert (diffusion.beta, diffusion.omega) == (meta["beta"], meta["omega"])


@pytest.mark.parametrize(
    ("meta", "line"),
    [
        ({"beta": 2}, "checkpoint: its clip interval is [2, 1.0], not in (0, 1]"),
        ({"clip_history": 3}, "checkpoint: clip_history=3: not a list of searches"),
        ({"clip_history": [[1, 2]]}, "checkpoint: clip_history has a list of 2, not the 6 numbers of a search"),
    ],
)
def test_a_meta_without_an_interval_is_named(meta, line):
    config = RunConfig(clip_search={"every": 5})
    with pytest.raises(ConfigError) as caught:
        read_clip_state(config, meta)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ("--diffusion.resample", "--diffusion.draws", 2, "--diffusion.coupling", "complementary"),
            "clip_search.every=2: diffusion.resample=true with diffusion.coupling=complementary needs an interval",
        ),
        (
            ("--diffusion.resample", "--clip-search.grid", "0.3:0.45"),
            "clip_search.grid=[0.3, 0.45]: diffusion.beta=0.3: no k/4 lies in [0.3, 0.45]",
        ),
        (("--clip-search.grid", "0.3-0.45"), "clip_search.grid=0.3-0.45: "),
        (("--clip-search.grid", "0.5:0.3"), "clip_search.grid: [0.5, 0.3] is no interval of levels in (0, 1]"),
    ],
)
def test_an_interval_that_cannot_be_drawn_is_refused_before_anything_is_written(tmp_path, data_set, options, line):
    recipe = Recipe(tmp_path, data_set)
    done = bd3(*recipe.args, *SEARCH, *options, log=recipe.log)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(line), done.err
    assert done.err.count("\n") == 1
    assert not recipe.run.exists()


def test_counts_have_no_interval_to_search_for(tmp_path, data_set):
    recipe = Recipe(tmp_path, data_set)
    done = bd3(*recipe.args, *SEARCH, "--diffusion.masking", "counts", log=recipe.log)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "clip_search.every=2: diffusion.masking=counts draws no noise levels, so no interval to search for; use 0, or "
        "diffusion.masking=levels\n"
    )
