"""Every layout computes what one process computes: losses, gradients, updates, evaluation, noise."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bd3_common.errors import ConfigError
from bd3_megatron.config import PLAIN, SAVINGS, DiffusionConfig, ModelConfig
from pretrain import bench
from pretrain.bench import parity
from pretrain.bench.parity import LAYOUTS, Difference, Layout, Outcome, Task
from tests.distributed.selection import collected, with_long

MODEL = ModelConfig(layers=4, hidden=32, heads=4, kv_heads=2, length=32, vocab_size=61, mask_id=60)
DIT = ModelConfig(backbone="dit", layers=5, hidden=32, heads=4, length=16, vocab_size=61, mask_id=60)
LLAMA = MODEL.model_copy(update={"backbone": "llama", "ffn_hidden": 96})
QWEN2 = MODEL.model_copy(update={"backbone": "qwen2"})
TIED = ModelConfig(layers=4, hidden=32, heads=4, length=16, vocab_size=61, mask_id=60, tie_embeddings=True)
BLOCKS = DiffusionConfig(block_size=4)

# A vocabulary that no tensor-parallel size divides, grouped heads, an MLP with and without gating, five layers.
TASKS = {
    "qwen3": Task(MODEL, BLOCKS, steps=2),
    "dit": Task(DIT, BLOCKS, steps=2),
    "llama": Task(LLAMA, BLOCKS, steps=2),
    "qwen2": Task(QWEN2, BLOCKS, steps=2),
    "tied": Task(TIED, BLOCKS, steps=2),
    "draws": Task(MODEL, DiffusionConfig(block_size=4, draws=2), steps=2),
    "mdlm": Task(MODEL, DiffusionConfig(block_size=32), steps=2),
    "dropout": Task(MODEL.model_copy(update={"dropout": 0.2}), BLOCKS, steps=2),
    "documents": Task(MODEL, BLOCKS, steps=2, documents=True),
    "documents draws": Task(MODEL, DiffusionConfig(block_size=4, draws=2), steps=2, documents=True),
    "documents mdlm": Task(MODEL, DiffusionConfig(block_size=32), steps=2, documents=True),
    "ar": Task(MODEL, DiffusionConfig(block_size=1, beta=1, omega=1), steps=2),
    "counts": Task(MODEL, DiffusionConfig(block_size=4, masking="counts"), steps=2),
    "counts pairs": Task(
        MODEL, DiffusionConfig(block_size=4, masking="counts", draws=2, coupling="complementary"), steps=2
    ),
    "counts ar": Task(MODEL, DiffusionConfig(block_size=1, masking="counts"), steps=2),
    "counts mdlm": Task(MODEL, DiffusionConfig(block_size=32, masking="counts"), steps=2),
}
# Each objective under layouts that treat it in their own way; the plain one under all.
MORE = {
    "dit": ["TP2+SP", "PP2", "CP2", "DP2+distopt", "TP2xPP2"],
    "llama": ["TP2+SP"],
    "qwen2": ["TP2+SP", "DP2+distopt"],
    "tied": ["TP2", "PP2", "PP2-interleaved", "DP2+distopt", "PP4", "TP2xPP2"],
    "draws": ["CP2", "PP2-interleaved", "TP2+SPxCP2"],
    "mdlm": ["CP2", "CP2xPP2"],
    "dropout": ["TP2", "selective"],  # where every rank drops out of whole activations
    "ar": ["CP2", "TP2+SP"],
    "counts": ["TP2+SP", "PP2", "CP2", "DP2+distopt", "ZeRO2"],
    "counts pairs": ["CP2", "PP2-interleaved"],
    "counts ar": ["TP2"],
    "counts mdlm": ["CP2"],
    "documents": ["TP2", "TP2+SP-full", "PP2", "PP2-interleaved", "CP2", "CP2xPP2", "selective"],
    "documents draws": ["CP2"],
    "documents mdlm": ["CP2", "CP2xPP2"],
}
# What leaves out dead work, all of it and each saving by itself, against the plain path of one process.
NEEDS = {"chunked_cross_entropy": ["masked_rows_only"]}
for draws in (1, 2, 4):
    sparing = Task(MODEL, DiffusionConfig(block_size=4, draws=draws), steps=2)
    TASKS |= {f"sparing {draws}": sparing, f"plain {draws}": sparing._replace(kernels=PLAIN)}
    MORE[f"sparing {draws}"] = ["TP2", "TP2+SP", "PP2", "TP2xPP2"]
for saving in SAVINGS:
    kernels = PLAIN.model_copy(update={saving: True} | dict.fromkeys(NEEDS.get(saving, []), True))
    TASKS[f"{saving} 2"] = TASKS["plain 2"]._replace(kernels=kernels)
    MORE[f"{saving} 2"] = ["TP2+SP", "PP2"]
MEGATRON = [name for name, layout in LAYOUTS.items() if layout.zero.stage == 0]
CASES = [("qwen3", name) for name in MEGATRON] + [(task, name) for task, names in MORE.items() for name in names]
LONG = [
    ("dit", "DP2+distopt"),
    *(("tied", name) for name in ("PP2", "DP2+distopt", "TP2xPP2")),
    ("draws", "PP2-interleaved"),
    ("mdlm", "CP2"),
    ("dropout", "selective"),
    ("ar", "TP2+SP"),
    ("counts pairs", "PP2-interleaved"),
    *(("documents", name) for name in ("TP2", "PP2", "CP2", "selective")),
    ("documents mdlm", "CP2"),
    *(("sparing 1", name) for name in ("TP2", "TP2+SP", "PP2")),
    *(("sparing 2", name) for name in ("TP2", "TP2xPP2")),
    *(("sparing 4", name) for name in ("TP2", "TP2+SP", "PP2", "TP2xPP2")),
    *((f"{saving} 2", "PP2") for saving in SAVINGS),
]


@pytest.fixture(scope="module")
def outcomes(request) -> dict[tuple[str, str], list[Outcome]]:
    """Outcome on every rank by (task, layout)."""
    alone = Layout(1, LAYOUTS["DP2"].parallel)
    cases = sorted(collected(request, "task", "layout"))
    runs = {f"{task}:{name}": (LAYOUTS[name], TASKS[task]) for task, name in cases}
    runs |= {f"{task}:": (alone, TASKS[task]) for task in {plain(task) for task, _ in cases}}
    found = parity.run(runs)
    return {tuple(key.split(":")): outcome for key, outcome in found.items()}


def plain(task: str) -> str:
    """The task whose result on one process is the expected one."""
    name, _, draws = task.partition(" ")
    return f"plain {draws}" if name in ("sparing", *SAVINGS) else task


@pytest.mark.parametrize(("task", "layout"), with_long(CASES, LONG))
def test_a_layout_equals_one_process(outcomes, task, layout):
    found = parity.compare(outcomes[task, layout], outcomes[plain(task), ""][0])
    assert found.passes, found


def test_ranks_agree_on_loss_and_norm(outcomes):
    for by_rank in outcomes.values():
        assert all(outcome.losses == by_rank[0].losses for outcome in by_rank)
        assert all(outcome.norms == pytest.approx(by_rank[0].norms, rel=1e-6) for outcome in by_rank)


# ---- what the comparison sees ----


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return parity.run({"": (Layout(1, LAYOUTS["DP2"].parallel), TASKS["dit"])})[""][0]


def changed(tensors: dict[str, torch.Tensor], name: str, by: float) -> dict[str, torch.Tensor]:
    """``tensors`` with one element off by ``by`` times the tensor's largest."""
    tensor = tensors[name].clone()
    tensor.view(-1)[0] += by * tensor.abs().max()
    return tensors | {name: tensor}


def test_a_result_equals_itself(outcome):
    assert parity.compare([outcome], outcome) == Difference(0, 0, 0, 0, 0, True)


@pytest.mark.parametrize("name", ["final_norm.bias", "decoder.layers.4.mlp.linear_fc2.weight"])
def test_one_wrong_element_is_seen(outcome, name):
    wrong = replace(outcome, gradients=changed(outcome.gradients, name, 2e-5))
    assert not parity.compare([wrong], outcome).passes
    assert parity.compare([replace(outcome, gradients=changed(outcome.gradients, name, 5e-6))], outcome).passes
    wrong = replace(outcome, state=changed(outcome.state, f"ema/{name}", 2e-4))
    assert not parity.compare([wrong], outcome).passes


@pytest.mark.parametrize(
    "wrong",
    [
        lambda o: replace(o, losses=[o.losses[0] * (1 + 2e-5), *o.losses[1:]]),
        lambda o: replace(o, losses=[*o.losses[:-1], o.losses[-1] * (1 + 2e-4)]),
        lambda o: replace(o, norms=[o.norms[0] * (1 + 2e-5), *o.norms[1:]]),
        lambda o: replace(o, gradients=dict(list(o.gradients.items())[1:])),
        lambda o: replace(o, gradients=o.gradients | {"final_norm.bias": torch.full((32,), torch.nan)}),
        lambda o: replace(o, nll=o.nll * (1 + 2e-4)),
        lambda o: replace(o, noise=o.noise | {(0, 0): "other"}),
        lambda o: replace(o, noise=dict(list(o.noise.items())[1:])),
    ],
    ids=["loss", "later loss", "norm", "missing gradient", "NaN", "evaluation", "other noise", "missing noise"],
)
def test_what_is_off_does_not_pass(outcome, wrong):
    assert not parity.compare([wrong(outcome)], outcome).passes


# ---- the command ----


def test_the_command_prints_a_row_per_layout_and_fails_when_one_is_off(capsys, monkeypatch):
    args = ["parity", "--layouts", "TP2", "DP2+distopt", "--steps", "2", "--json"]
    assert bench.main(args) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(row["layout"], row["processes"], row["ok"]) for row in printed["rows"]] == [
        ("TP2", 2, True),
        ("DP2+distopt", 2, True),
    ]
    assert printed["failed"] == []
    monkeypatch.setattr(parity, "ALL_STEPS", 0.0)
    monkeypatch.setattr(parity, "FIRST_STEP", 0.0)
    assert bench.main(["parity", "--layouts", "TP2", "--steps", "1"]) == 1
    done = capsys.readouterr()
    assert done.err == "differs from one process: TP2\n"
    assert done.out.splitlines()[-1].endswith("OFF")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--layouts", "TP2xPP3"], "layouts=TP2xPP3: unknown layout; did you mean TP2xPP2?; use TP2, "),
        (["--heads", "3", "--hidden", "24", "--layouts", "TP2"], "layout TP2: parallel.tensor=2: model.heads=3 "),
        (["--global-batch", "2", "--layouts", "DP2"], "layout DP2: global_batch=2: not a multiple of micro_batch=2 "),
    ],
)
def test_mistakes_are_told_before_a_process_starts(args, line):
    with pytest.raises(ConfigError) as caught:
        bench.main(["parity", *args])
    assert str(caught.value).startswith(line)
