"""The study of docs/science.md: its commands are ones that `bd3 pretrain` takes, and its table pairs seeds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from bd3_megatron.diffusion.clips import count_law
from pretrain.config.resolve import load_run_config

SCRIPT = Path(__file__).parents[2] / "scripts/estimator_study.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("estimator_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [4, 16])
def test_every_arm_is_an_objective_that_training_takes(study, size, tmp_path):
    found = {}
    for arm in study.ARMS:
        if arm == "least-variance" and (4, size) not in study.LEAST_VARIANCE:
            with pytest.raises(SystemExit, match="not measured for 4 layers"):
                study.flags(arm, 4, size)
            continue
        found[arm] = load_run_config(["--preset", "tiny-cpu", "--data.path", str(tmp_path), *study.flags(arm, 4, size)])
    clip = count_law(found["clip"].diffusion)
    names = {arm: found[arm].diffusion.loss_name for arm in ("full", "counts", "clip")}
    assert [names[arm].endswith("likelihood bound") for arm in names] == [True, True, False], names
    weights, masks = found["clip-weights"].diffusion, found["clip-counts"].diffusion
    # Expected loss of the clip, from counts: every block's S_k counts a(k).
    assert np.allclose(np.array(weights.count_weights) / size, clip.first, rtol=1e-6)
    assert np.allclose(masks.count_probabilities, clip.probability, rtol=1e-6)


def test_the_table_pairs_the_seeds_of_an_arm_with_those_of_the_whole_interval(study, tmp_path, capsys):
    nelbo = {("full", 0): 5.0, ("full", 1): 5.2, ("counts", 0): 4.9, ("counts", 1): 5.0, ("counts", 2): 4.0}
    for (arm, seed), value in nelbo.items():
        folder = tmp_path / "L4-B4-1000" / arm / f"seed-{seed}"
        (folder / "checkpoints/step-00001000").mkdir(parents=True)
        folder.with_suffix(".rows-all.json").write_text(json.dumps({"nelbo": value}))
    words = ["--out", str(tmp_path), "--layers", "4", "--block-size", "4", "--arms", "full", "counts"]
    assert study.main(["table", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| 4 | 4 | 1000 | full | 2 | 5.1000 ± 0.1000 | 164.0 | - | - |" in lines
    assert "| 4 | 4 | 1000 | counts | 3 | 4.6333 ± 0.3180 | 102.9 | -0.1500 ± 0.0500 | -0.100 -0.200 |" in lines
