"""The golden files of the reference implementation, and the command that checks them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests import golden

FILES = sorted((Path(__file__).parents[2] / "data").glob("*.safetensors"))


def rewritten(source: Path, target: Path, change) -> str:
    """Copy of a golden file after ``change(tensors, metadata)``."""
    with safe_open(source, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, target, metadata=metadata)
    return str(target)


def test_the_golden_files_are_there():
    assert [path.stem for path in FILES] == ["bd3lm_block1", "bd3lm_block8", "mdlm_len64"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", golden.MODELS)
def test_model_reproduces_the_reference(name, path):
    difference = golden.compare(golden.read_golden(path), golden.MODELS[name])
    assert difference.passed, difference


def test_every_parameter_of_the_reference_is_compared():
    data = golden.read_golden(FILES[1])
    buffers = {"sampling_eps_min", "sampling_eps_max", "backbone.rotary_emb.inv_freq"}
    assert set(data.grads) == set(data.state) - buffers


def test_command_prints_one_line_per_file_and_model(capsys):
    assert golden.main([str(FILES[0]), str(FILES[2])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(golden.MODELS)
    assert all(line.endswith("pass") for line in lines)


def scale_gradient(tensors, metadata):
    tensors["grads.sigma_map.mlp.0.weight"] *= 1.001


def shift_nll(tensors, metadata):
    row, position = tensors["nll"].nonzero()[0]
    tensors["nll"][row, position] += 1e-2


def nan_nll(tensors, metadata):
    tensors["nll"][1, 1] = math.nan


def nan_gradient(tensors, metadata):
    tensors["grads.blocks.0.norm1.weight"][3] = math.nan


def other_loss(tensors, metadata):
    metadata["loss"] = str(float(metadata["loss"]) * 1.0001)


def other_weight(tensors, metadata):
    tensors["weights.backbone.blocks.0.attn_qkv.weight"][0] *= 1.01


@pytest.mark.parametrize("change", [scale_gradient, shift_nll, nan_nll, nan_gradient, other_loss, other_weight])
def test_a_perturbed_file_is_a_miss(change, tmp_path, capsys):
    path = rewritten(FILES[1], tmp_path / "changed.safetensors", change)
    assert golden.main([path]) == 1
    assert capsys.readouterr().out.splitlines()[0].endswith("MISS")


def test_the_worst_gradient_is_named():
    data = golden.read_golden(FILES[0])
    name = "backbone.blocks.1.attn_out.weight"
    off = dataclasses.replace(data, grads=data.grads | {name: data.grads[name] * 1.01})
    difference = golden.compare(off, golden.hf_nll)
    assert difference.worst == "blocks.1.attn_out.weight"
    assert difference.grad == pytest.approx(0.01 / 1.01, rel=1e-3)


def drop_nll(tensors, metadata):
    del tensors["nll"]


def drop_gradients(tensors, metadata):
    for name in [name for name in tensors if name.startswith("grads.")]:
        del tensors[name]


def drop_heads(tensors, metadata):
    del metadata["n_heads"]


def wrong_heads(tensors, metadata):
    metadata["n_heads"] = "2"


def short_x0(tensors, metadata):
    tensors["x0"] = tensors["x0"][:, :-1].contiguous()


def foreign_ids(tensors, metadata):
    tensors["x0"] = torch.full_like(tensors["x0"], 300)


def stray_gradient(tensors, metadata):
    tensors["grads.head"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_nll, "no nll; not a golden file"),
        (drop_gradients, "no grads.*; not a golden file"),
        (drop_heads, "the configuration has no n_heads"),
        (wrong_heads, "inv_freq is not that of head width 32"),
        (short_x0, "x0 has shape [4, 63], not [4, 64]"),
        (foreign_ids, "ids outside the vocabulary of 257"),
        (stray_gradient, "gradient backbone.head has no weight of its shape"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_of_another_kind_is_one_line_and_status_two(change, message, tmp_path, capsys):
    path = rewritten(FILES[1], tmp_path / "changed.safetensors", change)
    assert golden.main([path]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_unreadable_files_and_no_files_are_status_two(tmp_path, capsys):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(FILES[0].read_bytes()[:1000])
    for arguments in ([], [str(tmp_path / "none.safetensors")], [str(tmp_path)], [str(cut)]):
        assert golden.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
