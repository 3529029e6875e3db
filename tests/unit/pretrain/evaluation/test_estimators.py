"""Estimators of the bound on a small model: exact enumeration, counts and levels; `bd3 eval` and `bd3 compare`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bd3_common.errors import ConfigError
from bd3_megatron.config import DiffusionConfig
from data_prep.read.reader import RowReader
from pretrain.config.schema import EvalConfig
from pretrain.evaluation.likelihood import Likelihood, evaluate
from tests.unit import tiny
from tests.unit.commands import bd3
from tests.unit.pretrain.evaluation.test_likelihood import of_data
from tests.unit.pretrain.trainer.test_loop import Recipe


@pytest.fixture(scope="module")
def reader(data_set) -> RowReader:
    return RowReader(data_set, "validation")


def found_by(world, reader: RowReader, size: int, trained: DiffusionConfig | None = None, **options) -> Likelihood:
    model, diffusion = of_data(reader), trained or DiffusionConfig(block_size=size)
    engine = tiny.engine(world, model, diffusion)
    return evaluate(engine, reader, model, diffusion, EvalConfig(rows=12, **options), 12, by_document=True)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_counts_and_levels_estimate_the_exact_bound(world, reader, size):
    exact = found_by(world, reader, size, estimator="exact")
    assert found_by(world, reader, size, estimator="exact", seed=5).nats == pytest.approx(exact.nats, rel=1e-12)
    bound = exact.summarize().nelbo
    deviations = {}
    for estimator, draws in (("counts", 4), ("levels", 4)):
        values = [
            found_by(world, reader, size, estimator=estimator, draws=draws, seed=seed).summarize().nelbo
            for seed in range(12)
        ]
        deviations[estimator] = float(np.std(values, ddof=1))
        error = deviations[estimator] / np.sqrt(len(values))
        assert abs(np.mean(values) - bound) < 4 * error + 1e-3
    if size > 1:
        assert deviations["counts"] < 0.25 * deviations["levels"]
    else:
        assert deviations["counts"] < 1e-6 * bound


def test_blocks_of_a_row_have_no_enumeration(world, reader):
    with pytest.raises(ConfigError, match=r"^estimator=exact: blocks of 32 tokens have 2\^32 - 1 masks; use counts"):
        found_by(world, reader, 32, estimator="exact")


def test_losses_inside_blocks_add_up(world, reader):
    for estimator in ("exact", "counts", "levels"):
        found = found_by(world, reader, 4, estimator=estimator, draws=2)
        assert sum(found.blocks.by_position().values()) == pytest.approx(found.nats.sum(), rel=1e-6)
        assert list(found.blocks.by_position()) == ["1", "2", "3", "4"]
    by_count = found_by(world, reader, 4, estimator="exact").blocks.by_count()
    assert list(by_count) == ["1", "2", "3", "4"]


def test_the_error_over_documents_is_that_of_their_sums(world, reader):
    found = found_by(world, reader, 4)
    documents = found.documents
    assert documents.nats.sum() == pytest.approx(found.nats.sum(), rel=1e-9)
    assert documents.tokens.sum() == found.tokens.sum()
    residuals = documents.nats - documents.tokens * found.summarize().nelbo
    expected = np.sqrt(len(residuals) / (len(residuals) - 1) * (residuals**2).sum()) / documents.tokens.sum()
    assert found.document_stderr == pytest.approx(expected, rel=1e-6)


def test_training_by_a_clip_or_by_counts_does_not_change_the_evaluation(world, reader):
    plain = found_by(world, reader, 4).summarize()
    for trained in ({"beta": 0.3, "omega": 0.8}, {"masking": "counts"}, {"noise_version": 1}):
        assert found_by(world, reader, 4, DiffusionConfig(block_size=4, **trained)).summarize() == plain


# ---- commands ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_set) -> list[Path]:
    """A run of 6 steps, and one of 2."""
    found = []
    for steps in (6, 2):
        recipe = Recipe(tmp_path_factory.mktemp("run"), data_set)
        done = recipe.finish("--train.steps", steps)
        assert done.code == 0, done.err
        found.append(recipe.run)
    return found


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_several_data_sets_and_block_sizes_in_one_call(runs, data_set, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data_set, copy)
    args = ("--data", data_set, copy, "--block-sizes", 4, 8, 32, "--rows", 6)
    done = bd3("eval", runs[0], *args, "--json", log=tmp_path / "log")
    assert done.code == 0, done.err
    found = lines(done.out)
    places = [(record["block_size"], record["data"]) for record in found]
    assert places == [(size, str(place)) for size in (4, 8, 32) for place in (data_set, copy)]
    assert found[0]["nelbo"] == found[1]["nelbo"] != found[2]["nelbo"]
    assert {record["estimator"] for record in found} == {"counts"}
    assert set(found[0]) >= {f"nll_by_count_{k}" for k in (1, 2, 3, 4)}
    shares = [value for name, value in found[0].items() if name.startswith("nelbo_by_position_")]
    assert sum(shares) == pytest.approx(found[0]["nelbo"], rel=1e-6)
    text = bd3("eval", runs[0], *args, log=tmp_path / "log").out
    assert text.count("NELBO               ") == 6
    assert "estimator           counts, blocks of 8, 1 draw each" in text


def test_a_block_size_that_does_not_fit_is_named(runs, tmp_path):
    for size, line in (
        (5, "block_sizes=5: model.length=32 is not divisible by 5"),
        (0, "block_sizes=0: use 1 or more"),
    ):
        done = bd3("eval", runs[0], "--block-sizes", size, log=tmp_path / "log")
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(line), done.err


def test_what_cannot_be_enumerated_is_named_before_anything_is_evaluated(runs, data_set, tmp_path):
    done = bd3("eval", runs[0], "--estimator", "exact", "--block-sizes", 4, 16, log=tmp_path / "log")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("estimator=exact: blocks of 16 tokens have 2^16 - 1 masks; use counts")
    options = ("--data.path", data_set, "--run", tmp_path / "run", "--model.length", 32, "--eval.estimator", "exact")
    done = bd3("pretrain", *options, "--diffusion.block-size", 16, log=tmp_path / "log")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("eval.estimator=exact: blocks of 16 tokens"), done.err
    assert not (tmp_path / "run").exists()


def test_one_file_of_documents_for_one_evaluation(runs, data_set, tmp_path):
    args = ("--documents-file", tmp_path / "documents", "--data", data_set, data_set)
    done = bd3("eval", runs[0], *args, log=tmp_path / "log")
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith("for one data set and one block size; give one of each\n")


def test_positions_add_up_to_the_bound_with_several_draws_in_a_pass(world, reader):
    trained = DiffusionConfig(block_size=4, draws=2)
    for estimator in ("counts", "levels"):
        model = of_data(reader)
        engine = tiny.engine(world, model, trained)
        found = evaluate(engine, reader, model, trained, EvalConfig(rows=6, draws=3, estimator=estimator), 2)
        assert sum(found.blocks.by_position().values()) == pytest.approx(found.nats.sum(), rel=1e-6)


def test_exact_values_do_not_depend_on_the_draws_of_training(world, reader):
    one, two = (found_by(world, reader, 4, DiffusionConfig(block_size=4, draws=k), estimator="exact") for k in (1, 2))
    assert two.nats == pytest.approx(one.nats, rel=1e-6)


def test_compare_pairs_rows_and_noise(runs, tmp_path):
    done = bd3("compare", *runs, "--rows", 40, "--json", log=tmp_path / "log")
    assert done.code == 0, done.err
    first, second = lines(done.out)
    alone = lines(bd3("eval", runs[1], "--rows", 40, "--json", log=tmp_path / "log").out)[0]
    assert {name: second[name] for name in alone} == alone
    assert second["difference"] == pytest.approx(second["nelbo"] - first["nelbo"], rel=1e-9)
    assert second["difference"] > 0
    # Rows are as hard for one as for the other.
    assert second["difference_stderr"] < 0.9 * first["nelbo_stderr"]
    table = bd3("compare", *runs, "--rows", 40, log=tmp_path / "log").out
    assert f"{second['difference']:+.4f} +- {second['difference_stderr']:.4f}" in table
    same = lines(bd3("compare", runs[0], runs[0], "--rows", 40, "--json", log=tmp_path / "log").out)[1]
    assert (same["difference"], same["difference_stderr"]) == (0, 0)


def test_compare_needs_two_runs(runs, tmp_path):
    done = bd3("compare", runs[0], log=tmp_path / "log")
    assert (done.code, done.out, done.err) == (2, "", "bd3 compare: give two or more run folders\n")
