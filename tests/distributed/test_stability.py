"""Nonfinite steps and loss spikes on one rank of a run: all ranks decide the same, as one process does."""

from __future__ import annotations

import functools
import importlib.util
import json
import math

import pytest

from tests.distributed.launch import Job
from tests.unit.pretrain.trainer.test_stability import SPIKE, Recipe, spoil

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
LAYOUTS = {
    "DP2+distopt": ("--parallel.distributed-optimizer",),
    "ZeRO2": ("--zero.stage", 2),
    "ZeRO3": ("--zero.stage", 3),
}
HIGH = {7: 1e3, 8: 1e3}
OPTIONS = (*SPIKE, "--train.global-batch", 8, "--train.adam-eps", 1e-4, "--model.dropout", 0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_set) -> Recipe:
    """One process; the last of four micro-batches of step 3 is spoiled."""
    recipe = Recipe(tmp_path_factory.mktemp("alone"), data_set, {}, *OPTIONS)
    done = recipe.finish(before=functools.partial(spoil_last, {3: math.nan}, 3))
    assert done.code == 0, done.err
    return recipe


def spoil_last(steps: dict[int, float], micro: int) -> None:
    spoil(HIGH)
    spoil(steps, micro)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_of_two_ranks_skips_and_goes_back_as_one_process_does(tmp_path, data_set, alone, layout):
    if "ZeRO" in layout and not DEEPSPEED:
        pytest.skip("DeepSpeed is not installed")
    recipe = Recipe(tmp_path, data_set, {}, *OPTIONS, *LAYOUTS[layout])
    before = {0: functools.partial(spoil, HIGH), 1: functools.partial(spoil_last, {3: math.nan}, 1)}
    for done in Job(recipe.args, 2, tmp_path, before=before).finish():
        assert done.code == 0, done.err
    assert recipe.left_out() == alone.left_out() == [3, 7, 8, 9]
    for ours, expected in zip(recipe.trained(), alone.trained(), strict=True):
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            assert ours[name] == (value if value is None or name == "split" else pytest.approx(value, rel=1e-4))
    assert recipe.state()[1]["updates"] == alone.state()[1]["updates"] == 8
    assert recipe.files()["skips.json"] == alone.files()["skips.json"]
    ours, expected = (json.loads((r.run / "skipped" / "step-00000003.json").read_text()) for r in (recipe, alone))
    assert ours["rows"] == expected["rows"]
    assert [row.get("suspect", False) for row in ours["rows"]] == [False] * 6 + [True] * 2


def test_too_many_such_steps_end_all_ranks_with_one_line(tmp_path, data_set):
    recipe = Recipe(tmp_path, data_set, {}, *OPTIONS, "--guard.nonfinite", 2)
    first, second = Job(
        recipe.args, 2, tmp_path, before={1: functools.partial(spoil, {3: math.nan, 5: math.nan})}
    ).finish()
    assert (first.code, second.code, second.err) == (2, 2, "")
    assert first.err.splitlines()[-1].startswith("guard.nonfinite=2: no finite loss and gradient in steps 3 5 ")
    assert recipe.left_out() == [3, 5]
