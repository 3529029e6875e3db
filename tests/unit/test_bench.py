"""`bd3 bench`: what it prints."""

from __future__ import annotations

import json

import pytest

from pretrain import bench

SIZES = ("--layers", "1", "--hidden", "32", "--heads", "2", "--vocab-size", "50", "--block-size", "4", "--repeats", "1")


@pytest.fixture
def no_world():
    from bd3_megatron import parallel

    parallel.stop()


def test_a_checkpoint_costs_bytes_and_seconds(no_world, capsys, tmp_path):
    assert bench.main(["checkpoint", *SIZES, "--length", "8", "--folder", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Weights, average and two moments in fp32, and what describes them.
    assert 16 < found["bytes_per_parameter"] < 24
    assert found["bytes"] == pytest.approx(found["bytes_per_parameter"] * found["parameters"])
    for kind in ("", "waited_"):
        assert 0 < found[f"{kind}stall_seconds"] <= found[f"{kind}write_seconds"] * 1.5
    assert min(found[f"{name}_seconds"] for name in ("step", "find", "load")) > 0
    assert list(tmp_path.iterdir()) == []
    assert bench.main(["checkpoint", *SIZES, "--length", "8"]) == 0
    assert "bytes per parameter" in capsys.readouterr().out
