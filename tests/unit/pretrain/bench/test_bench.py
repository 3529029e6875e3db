"""The benchmarks that start no other process."""

from __future__ import annotations

import json

import pytest
import torch

from bd3_common.errors import ConfigError
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.cost import flops
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
    assert rows == [{"what": "webdataset", "skipped": "not installed; pip install 'bd3-megatron[data]'"}]
    monkeypatch.setattr(data, "BUNDLED", tmp_path / "none.jsonl.gz")
    with pytest.raises(ConfigError, match=r"none\.jsonl\.gz is not there .* with --text"):
        bench.main(["data"])


SMALL_ATTENTION = ["attention", "--lengths", "32", "64", "--heads", "2", "--head-dim", "16", "--repeats", "1"]


def test_attention_prints_a_row_per_length_block_size_and_backend(capsys, tmp_path):
    picture = tmp_path / "attention.png"
    named = ["--block-sizes", "4", "32", "--kv-heads", "1", "--backends", "flex", "reference", "--plot", str(picture)]
    assert bench.main([*SMALL_ATTENTION, *named, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["dtype"], result["kv_heads"], result["device"]) == ("fp32", 1, "cpu")
    rows = result["rows"]
    cases = [(row["block_size"], row["length"], row["backend"]) for row in rows]
    assert cases == [(size, length, name) for size in (4, 32) for length in (32, 64) for name in ("flex", "reference")]
    for row in rows:
        pairs = row["length"] * row["block_size"] if row["block_size"] == row["length"] else None
        pairs = pairs or row["length"] * (row["length"] + row["block_size"])
        useful = 3.5 * 4 * 16 * 2 * 2 * pairs  # two heads, two rows
        assert row["tflops"] == pytest.approx(useful / row["seconds"] / 1e12)
        assert row["of_matmul"] == pytest.approx(row["tflops"] / row["matmul_tflops"])
        assert row["ratio"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--block-sizes", "48"], "--block-sizes=48: 32 is not divisible by it; use 1, 2, 4, 8, 16 or 32"),
        (["--kv-heads", "3"], "--kv-heads=3: --heads=2 is not divisible by 3; use 1 or 2"),
        (["--plot", "/nowhere/a.png"], "--plot=/nowhere/a.png: there is no folder /nowhere; make it first"),
        (
            ["--backends", "flash", "--block-sizes", "4"],
            "kernels.attention=flash: needs a CUDA device of compute capability 9.0 or newer, found none; "
            "use auto, flex or chunked",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the last line is that of a machine without CUDA")
def test_mistakes_in_attention_are_one_line(args, line):
    with pytest.raises(ConfigError) as caught:
        bench.main([*SMALL_ATTENTION, *args])
    assert str(caught.value) == line


SMALL_STEP = ["step", "--layers", "2", "--hidden", "32", "--heads", "2", "--vocab-size", "64", "--batch", "2"]


def test_step_compares_with_the_plain_path_and_with_an_autoregressive_step(no_world, capsys, tmp_path):
    picture = tmp_path / "step.png"
    options = ["--lengths", "32", "64", "--block-size", "8", "--repeats", "1", "--draws", "2", "--plot", str(picture)]
    assert bench.main([*SMALL_STEP, *options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["length"] for row in rows] == [32, 64]
    model = ModelConfig(
        backbone="dit", layers=2, hidden=32, heads=2, ffn_hidden=128, length=64, vocab_size=64, mask_id=63
    )
    diffusion = DiffusionConfig(block_size=8, draws=2)
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(2 * row["length"] / row["seconds"])
        assert row["ratio"] == pytest.approx(row["seconds"] / row["plain_seconds"])
        assert row["of_causal"] == pytest.approx(row["seconds"] / row["causal_seconds"])
        assert 0 < row["flop_ratio"] < 1 < row["flops_of_causal"]
    useful = flops.training_flops_per_token(model, diffusion)
    assert rows[1]["useful_tflops"] == pytest.approx(useful * rows[1]["tokens_per_second"] / 1e12)
    assert rows[1]["mfu_useful"] == pytest.approx(rows[1]["useful_tflops"] / rows[1]["matmul_tflops"])
    assert rows[1]["mfu_6nd"] / rows[1]["mfu_useful"] == pytest.approx(flops.six_n(model) / useful)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert bench.main([*SMALL_STEP, "--lengths", "32", "--repeats", "1", "--no-plain", "--no-causal"]) == 0
    assert "plain" not in capsys.readouterr().out.splitlines()[1:]


def test_step_takes_a_preset(no_world, capsys):
    assert bench.main(["step", "--preset", "tiny-cpu", "--batch", "1", "--repeats", "1", "--no-plain", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["length"] == 128
    with pytest.raises(ConfigError, match=r"preset=tiny: unknown preset; use 125m, 1b"):
        bench.main(["step", "--preset", "tiny"])
    with pytest.raises(ConfigError, match=r"--lengths=30: not divisible by diffusion.block_size=4"):
        bench.main(["step", "--preset", "tiny-cpu", "--lengths", "30"])


SMALL_SHAPE, LARGE_SHAPE = (12, 768, 12), (24, 2048, 16)  # layers, width, heads: 125M and 1.3B


@pytest.mark.parametrize(
    ("shape", "length", "ratio"),
    [
        ((12, 768, 12), 1024, 2.14),
        ((12, 768, 12), 8192, 4.08),
        ((24, 2048, 16), 1024, 2.15),
        ((24, 2048, 16), 8192, 3.35),
    ],
)
def test_plain_flops_are_the_published_ones_with_logits_of_both_streams(shape, length, ratio):
    layers, hidden, heads = shape
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "vocab_size": 50258, "mask_id": 50257}
    model = ModelConfig(backbone="dit", length=length, **sizes)
    causal = flops.forward_flops(model, DiffusionConfig(objective="causal", block_size=1))
    plain = flops.plain_forward_flops(model, DiffusionConfig(block_size=4))
    assert (plain - causal.head) / causal.total == pytest.approx(ratio, abs=0.006)


def test_head_runs_on_masked_rows(no_world, capsys):
    options = ["--hidden", "16", "--vocab-sizes", "50", "200", "--rows", "256", "--mask-rate", "0.5", "--repeats", "1"]
    assert bench.main(["head", *options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["vocab_size"] for row in rows] == [50, 200]
    for row in rows:
        assert row["rows"] % 16 == 0
        assert 96 <= row["rows"] <= 160
        assert row["ratio"] == pytest.approx(row["seconds"] / row["every_row_seconds"])
        assert row["tflops"] == pytest.approx(6 * row["rows"] * row["vocab_size"] * 16 / row["seconds"] / 1e12)
    assert bench.main(["head", *options]) == 0
    assert "of_matmul" in capsys.readouterr().out
