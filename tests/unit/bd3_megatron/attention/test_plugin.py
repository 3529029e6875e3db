"""An attention backend from one file outside the packages, used through the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bd3_common import plugins
from bd3_megatron import parallel
from bd3_megatron.attention.backends import ATTENTION_BACKENDS
from pretrain import cli

PLUGIN = '''
"""Attention by torch's scaled_dot_product_attention with the dense mask."""

from bd3_megatron.attention.backends import ATTENTION_BACKENDS, AttentionBackend


class DenseSdpa(AttentionBackend):
    """SDPA over grouped keys with the dense mask."""

    name = "dense_sdpa"
    uncounted = "its masks"
    calls = 0

    @classmethod
    def unsupported_reason(cls, demand):
        if demand.context > 1:
            return f"takes whole rows, not those of parallel.context={demand.context}"
        return super().unsupported_reason(demand)

    def attend(self, query, key, value, scale, documents):
        import torch.nn.functional as F

        from bd3_megatron.attention.mask import dense_mask

        DenseSdpa.calls += 1
        mask = dense_mask(self.streams, query.device, documents)[..., : len(query), :]  # [q, N], b of them if packed
        mask = mask if documents is None else mask[:, None]
        heads_first = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3)


ATTENTION_BACKENDS.add("dense_sdpa", DenseSdpa)
'''
BUILT_IN = ATTENTION_BACKENDS.names()
MODEL = ("--model.layers", "2", "--model.hidden", "32", "--model.heads", "2", "--model.length", "32")
RUN = (*MODEL, "--diffusion.block-size", "4", "--train.precision", "fp32")


@pytest.fixture
def plugin(monkeypatch, tmp_path) -> Path:
    """The plugin's file; what loading it changes in this process is undone."""
    file = tmp_path / "dense_sdpa.py"
    file.write_text(PLUGIN)
    monkeypatch.setattr(ATTENTION_BACKENDS, "_added", {})
    monkeypatch.setattr(plugins, "_loaded", set())
    monkeypatch.setenv(plugins.VARIABLE, "")
    yield file
    sys.modules.pop("dense_sdpa", None)


def test_a_run_trains_with_it_as_with_the_reference(plugin, data_set, tmp_path, capsys):
    parallel.stop()
    train = [f"--train.{name}" for name in ("steps=2", "global-batch=4", "micro-batch=2", "warmup-steps=0")]
    options = (*RUN, *train, "--data.path", str(data_set), "--eval.rows", "4", "--preflight.no-enabled")
    losses = {}
    for name in ("dense_sdpa", "reference"):
        run = tmp_path / name
        args = ["pretrain", "--run", str(run), "--kernels.attention", name, *options, "--plugin", str(plugin)]
        assert cli.main(args) == 0, capsys.readouterr().err
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [record["loss"] for record in records if "loss" in record]
    assert len(losses["reference"]) == 2
    assert losses["dense_sdpa"] == pytest.approx(losses["reference"], rel=1e-5)
    assert sys.modules["dense_sdpa"].DenseSdpa.calls > 0


def test_help_pages_list_it(plugin, capsys):
    for command in (["config"], ["bench", "attention"], ["bench", "step"]):
        assert cli.main([*command, "--plugin", str(plugin), "--help"]) == 0
        assert ",".join(BUILT_IN) + ",dense_sdpa}" in capsys.readouterr().out


def test_it_is_measured_beside_the_others(plugin, capsys):
    sizes = ["--lengths", "32", "--heads", "2", "--head-dim", "8", "--repeats", "1", "--json"]
    args = ["bench", "attention", "--plugin", str(plugin), "--backends", "dense_sdpa", "chunked", *sizes]
    assert cli.main(args) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["backend"] for row in rows] == ["dense_sdpa", "chunked"]
    assert min(row["of_causal"] for row in rows) > 0


def test_an_estimate_counts_it(plugin, capsys):
    args = ["estimate", *RUN, "--model.vocab-size", "100", "--train.micro-batch", "4", "--plugin", str(plugin)]
    assert cli.main([*args, "--kernels.attention", "dense_sdpa"]) == 0
    assert "kernels.attention=dense_sdpa: its masks are not counted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--parallel.context", "2"],
            "kernels.attention=dense_sdpa: takes whole rows, not those of parallel.context=2; "
            "use auto, flex or chunked",
        ),
        ([], ""),
    ],
)
def test_its_unsupported_reason_is_one_line(plugin, capsys, options, line):
    args = ["estimate", *RUN, "--model.vocab-size", "100", "--kernels.attention", "dense_sdpa", *options]
    assert cli.main([*args, "--plugin", str(plugin)]) == (2 if line else 0)
    assert capsys.readouterr().err.strip() == line


def test_without_its_file_the_name_is_unknown(plugin, capsys):
    assert cli.main(["config", "--kernels.attention", "dense_sdpa"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kernels.attention=dense_sdpa: unknown attention backend; ")
    assert f"use auto, {', '.join(BUILT_IN)}, or name the module that adds it with --plugin" in error
