"""The benchmarks that start no other process."""

from __future__ import annotations

import json

import pytest
import torch

from bd3_megatron.config import ConfigError
from pretrain import bench
from pretrain.bench.memory import saved_for_backward

SMALL = ["--length", "64", "--layers", "3", "--hidden", "32", "--heads", "2", "--vocab-size", "64", "--json"]


def test_recomputation_keeps_less_for_the_backward_pass(capsys):
    assert bench.main(["memory", *SMALL]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["recompute"] for row in rows] == ["none", "selective", "full"]
    none, selective, full = (row["saved_bytes"] for row in rows)
    assert full < selective < none
    assert rows[0]["bytes_per_token"] == none / 128


def test_what_is_kept_is_counted_once_and_let_go():
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8)
    with saved_for_backward(iter([weight])) as saved:
        once = (x @ weight).exp()  # keeps x and the result of exp
        twice = once * once
        assert saved.bytes == 4 * 8 * 4 * 2
        twice.sum().backward()
        assert saved.bytes == 0
    assert saved.peak == 4 * 8 * 4 * 2


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["stepp"], "bd3 bench stepp: unknown benchmark; did you mean step?"),
        (["memory", "--hidden", "30"], "model.heads=4: model.hidden=30 is not divisible by 4; use 1, 2, 3, 5, 6"),
    ],
)
def test_mistakes_are_one_line(args, line):
    with pytest.raises(ConfigError) as caught:
        bench.main(args)
    assert str(caught.value).startswith(line)


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
        assert found[f"{kind}stall_seconds"] > 0
        assert found[f"{kind}write_seconds"] > 0
    assert min(found[f"{name}_seconds"] for name in ("step", "find", "load")) > 0
    assert list(tmp_path.iterdir()) == []
    assert bench.main(["checkpoint", *SIZES, "--length", "8"]) == 0
    assert "bytes per parameter" in capsys.readouterr().out


def test_data_gives_rates_and_ratios(capsys, tmp_path):
    text = tmp_path / "text.jsonl"
    with text.open("w") as stream:
        for number in range(60):
            stream.write(json.dumps({"id": str(number), "text": f"It is a truth number {number}. " * 10}) + "\n")
    sizes = ["--megabytes", "0.02", "--scaling-megabytes", "0.03", "--length", "16", "--rows", "40", "--shards", "4"]
    options = [*sizes, "--batch", "8", "--repeats", "1", "--tokenizer", "bpe:300", "--text", str(text)]
    assert bench.main(["data", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert min(found["read_vs_memmap"], found["prep_vs_tokenizers"]) > 0
    assert [row["workers"] for row in found["prep_scaling"]] == [2]
    assert len(found["prep"]) == 4
    assert all(row["megabytes_per_second"] > 0 for row in found["prep"])
    assert [row["what"].partition(",")[0] for row in found["read"]] == [
        "RowReader",
        "numpy.memmap",
        *["webdataset"] * 2,
    ]
    assert all(row["rows_per_second"] > 0 for row in found["read"])
    assert bench.main(["data", *options]) == 0
    assert "rows / memmap" in capsys.readouterr().out


def test_data_without_webdataset_or_text(capsys, monkeypatch, tmp_path):
    import sys

    from pretrain.bench import data

    monkeypatch.setitem(sys.modules, "webdataset", None)
    rows = data._webdataset(data.DataOptions(), tmp_path, None)
    assert rows == [{"what": "webdataset", "skipped": "not installed; pip install webdataset"}]
    monkeypatch.setattr(data, "BUNDLED", tmp_path / "none.jsonl.gz")
    with pytest.raises(ConfigError, match=r"none\.jsonl\.gz is not there .* with --text"):
        bench.main(["data"])
