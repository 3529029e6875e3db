"""From an autoregressive checkpoint to a block diffusion model that is served, through the commands."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.loaded_run import open_run
from pretrain.config.resolve import load_saved
from pretrain.run_folder.identity import read_identity
from pretrain.tracking.metrics import read_metrics
from tests.conftest import LENGTH
from tests.unit.bd3_megatron.hf.test_causal_formats import stock
from tests.unit.commands import Done, bd3, die_at

SHORT = "--train.global-batch 8 --train.micro-batch 4 --train.precision fp32 --train.warmup-steps 0 --eval.rows 16"
QUIET = "--log.tensorboard false --preflight.enabled false --train.ema-decay 0"
SIXTY = "--train.steps 60 --train.lr 0.01 --checkpoint.every 20 --checkpoint.keep 9"
BLOCKS = "--diffusion.objective diffusion --diffusion.block-size 4"


@pytest.fixture(scope="module")
def place(tmp_path_factory, data_set) -> Path:
    """A folder with an AR checkpoint ``ar``, made by transformers for the tokenizer of the data set."""
    folder = tmp_path_factory.mktemp("formats")
    model = stock("qwen3", vocab_size=304, max_position_embeddings=64, tie_word_embeddings=True)
    model.save_pretrained(folder / "ar")
    shutil.copyfile(data_set / "tokenizer.json", folder / "ar/tokenizer.json")
    manifest = json.loads((data_set / "manifest.json").read_text())
    config = json.loads((folder / "ar/config.json").read_text())
    config |= {"bos_token_id": manifest["bos_id"], "eos_token_id": manifest["eos_id"]}
    (folder / "ar/config.json").write_text(json.dumps(config))
    done = bd3("convert", "import", folder / "ar", folder / "imported", "--length", LENGTH, log=folder / "import")
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def begun(place, data_set) -> Path:
    """A run of 60 steps at B' = 4 that begins with it."""
    words = f"pretrain --init {place}/imported --run {place}/begun --data.path {data_set} --model.length {LENGTH}"
    line = (
        f"{words} {BLOCKS} {SHORT} {QUIET} --train.steps 60 --train.lr 0.01 --checkpoint.every 20 --checkpoint.keep 9"
    )
    done = bd3(*line.split(), log=place / "begin")
    assert done.code == 0, done.err
    return place / "begun"


def said(line: str, log: Path) -> Done:
    return bd3(*line.split(), log=log)


def test_steps_at_blocks_of_four_lower_the_bound_of_an_ar_model(place, begun):
    nelbo = [record["nelbo"] for record in read_metrics(begun) if record["split"] == "validation"]
    assert nelbo[-1] < nelbo[0] - 0.5
    assert read_identity(begun).parents == [f"run:{read_identity(place / 'imported').id}"]
    model = load_saved(begun / "config.yaml").model
    assert (model.backbone, model.hidden, model.tie_embeddings, model.vocab_size) == ("qwen3", 32, True, 300)
    assert read_identity(place / "imported").parents[0].startswith("sha256:")


def test_an_imported_model_is_the_ar_model(place, data_set):
    done = said(f"eval {place}/imported --data {data_set} --rows 8 --json", place / "eval")
    assert done.code == 0, done.err
    assert json.loads(done.out)["nelbo"] > 5  # random weights of 304 tokens
    assert load_saved(place / "imported/config.yaml").diffusion.objective == "causal"


def test_first_weights_are_those_of_the_run_that_is_named(place, begun, data_set, tmp_path):
    line = f"pretrain --run {tmp_path}/new --data.path {data_set} --model.length {LENGTH} {BLOCKS} {SHORT} {QUIET}"
    done = said(f"{line} --init {begun}@20 --train.steps 1 --train.lr 1e-30", tmp_path / "log")
    assert done.code == 0, done.err
    ours, theirs = open_run(tmp_path / "new").weights, open_run(begun, 20, averaged=False).weights
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = said(f"{line} --train.steps 1 --train.lr 1e-30", tmp_path / "log")
    assert again.code == 2  # without --init the shape is the default's
    exported = said(f"convert export {begun} {tmp_path}/out", tmp_path / "log")
    assert exported.code == 0, exported.err
    line = line.replace("/new ", "/newer ")
    done = said(f"{line} --init {tmp_path}/out --train.steps 1 --train.lr 1e-30", tmp_path / "log")
    assert done.code == 0, done.err
    ours, theirs = open_run(tmp_path / "newer").weights, open_run(begun).weights
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_identity(tmp_path / "newer").parents == [f"run:{read_identity(begun).id}"]


def test_an_interrupted_beginning_goes_on_without_the_first_weights(place, begun, data_set, tmp_path):
    shutil.copytree(place / "imported", tmp_path / "gone")
    words = f"pretrain --init {tmp_path}/gone --run {tmp_path}/run --data.path {data_set} --model.length {LENGTH}"
    line = (
        f"{words} {BLOCKS} {SHORT} {QUIET} --train.steps 60 --train.lr 0.01 --checkpoint.every 20 --checkpoint.keep 9"
    )
    before = functools.partial(die_at, "pretrain.trainer.loop", "Trainer._train_step", 25)
    assert bd3(*line.split(), log=tmp_path / "log", before=before).code == -9
    shutil.rmtree(tmp_path / "gone")
    done = said(f"pretrain --config {tmp_path}/run/config.yaml", tmp_path / "log")
    assert done.code == 0, done.err
    ours, theirs = open_run(tmp_path / "run").weights, open_run(begun).weights
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("nothing", "init=nothing: neither a run folder (no config.yaml) nor a Hugging Face folder (no config.json)"),
        ("begun@7", "step 7: no checkpoint"),
        ("narrow", "init={}/narrow: weights: "),
        (
            "other",
            "init={}/other: has 60 tokens with the mask 59, the data 300 with 2; prepare the data with its tokenizer",
        ),
    ],
)
def test_first_weights_that_do_not_fit_are_told_in_one_line(place, begun, data_set, tmp_path, init, message):
    more = ""
    if init == "narrow":
        shutil.copytree(begun, place / "narrow", dirs_exist_ok=True)
        more = "--model.ffn-hidden 40"
    if init == "other" and not (place / "other").exists():
        stock("qwen3", vocab_size=59).save_pretrained(place / "other-ar")
        assert said(f"convert import {place}/other-ar {place}/other", tmp_path / "log").code == 0
    path = init if init == "nothing" else place / init
    line = f"pretrain --init {path} --run {tmp_path}/run --data.path {data_set} --model.length {LENGTH} {more}"
    done = said(f"{line} {BLOCKS} {SHORT} {QUIET} --train.steps 1", tmp_path / "log")
    assert done.code == 2
    assert done.messages[-1].startswith(message.format(place)) or message.format(place) in done.err
    assert done.err.count("\n") <= 2
    assert not (tmp_path / "run").exists()


def test_out_as_sdar_and_as_qwen3(place, begun, tmp_path):
    done = said(
        f"convert export {begun} {tmp_path}/sdar --format sdar --dtype bf16 --shard-size 0.001", tmp_path / "log"
    )
    assert done.code == 0, done.err
    assert "MB/s)" in done.out
    assert "blocks of 4: SGLang takes it as block_size" in done.out
    assert (tmp_path / "sdar/model.safetensors.index.json").is_file()
    told = said(f"convert export {begun} {tmp_path}/qwen3 --format qwen3", tmp_path / "log")
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert told.err.startswith("format=qwen3: is of causal models, and diffusion.objective=diffusion sees whole blocks")
    done = said(f"convert export {place}/imported {tmp_path}/qwen3 --format qwen3", tmp_path / "log")
    assert done.code == 0, done.err
    assert (tmp_path / "qwen3/tokenizer_config.json").is_file()
    there = said(f"convert roundtrip {place}/ar", tmp_path / "log")
    assert there.out == "qwen3 -> run -> qwen3: 24 tensors, all bitwise equal\n"
    for name in ("bd3", "sdar"):
        there = said(f"convert roundtrip {begun} --format {name}", tmp_path / "log")
        assert there.out == f"run -> {name} -> run: 18 tensors, all bitwise equal\n", there.err
    done = said(f"convert inspect {tmp_path}/sdar", tmp_path / "log")
    assert "format      sdar\n" in done.out
    assert "objective   diffusion, blocks of 4\n" in done.out


def test_the_mean_of_checkpoints(begun, tmp_path):
    done = said(f"convert average {begun} {tmp_path}/mean --steps 20 40 60", tmp_path / "log")
    assert done.code == 0, done.err
    mean = open_run(tmp_path / "mean")
    parts = [open_run(begun, step, averaged=False).weights for step in (20, 40, 60)]
    assert mean.checkpoint.step == 60
    for name in mean.weights:
        expected = sum(part[name].double() for part in parts) / 3
        assert torch.equal(mean.weights[name], expected.float())
    assert read_identity(tmp_path / "mean").parents == [f"run:{read_identity(begun).id}"]
    told = said(f"convert average {begun} {tmp_path}/one --steps 20 20", tmp_path / "log")
    assert told.err == "--steps: 1 checkpoint; give two or more\n"


@pytest.mark.parametrize("name", ["bd3", "sdar"])
def test_an_export_that_is_killed_leaves_nothing_that_loads(begun, tmp_path, name):
    before = functools.partial(die_at, "bd3_megatron.hf.files", "bytes_of", 9)
    line = f"convert export {begun} {tmp_path}/out --format {name}"
    assert bd3(*line.split(), log=tmp_path / "log", before=before).code == -9
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".out", ".err") and path.name[0] != "."]
    done = said(line, tmp_path / "log")
    assert done.code == 0, done.err
    assert {path.name for path in tmp_path.iterdir()} == {"out", "log.out", "log.err"}


LARGE = """
import resource, sys, time
from pathlib import Path
import torch
import pretrain.conversion.convert
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.hf.files import LazyTensors
from bd3_megatron.hf.mapping import entries
from pretrain.checkpoint.loaded_run import open_run
from pretrain.config.schema import RunConfig
from pretrain.conversion.new_run import Beginning, write_run

run, out, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if not run.exists():
    model = ModelConfig(layers=24, hidden=2048, heads=16, vocab_size=50_258, mask_id=50_257, length=1024)
    shapes = {entry.name: entry.shape for entry in entries(model)}
    weights = LazyTensors(shapes, lambda name: torch.empty(shapes[name]).normal_(std=0.02))
    write_run(run, Beginning(RunConfig(run=str(run), model=model, diffusion=DiffusionConfig()), weights, []))
    sys.exit()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
done = pretrain.conversion.convert.export_run(open_run(run), out, name, "bf16", 2_000_000_000)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(done.parameters, after - before, round(done.bytes / 1e6 / done.seconds))
"""


@pytest.mark.long
def test_an_export_of_a_billion_parameters_needs_little_memory(tmp_path, capsys):
    """In kB by getrusage; less than 3 GB above the interpreter with its imports."""
    for name in ("write", "bd3", "sdar"):
        command = [sys.executable, "-c", LARGE, str(tmp_path / "run"), str(tmp_path / name), name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        if name == "write":
            continue
        parameters, memory, speed = map(int, done.stdout.split())
        with capsys.disabled():
            print(f"\n{name}: {parameters:,} parameters, {memory / 1e6:.2f} GB above the interpreter, {speed} MB/s")
        assert parameters > 10**9
        assert memory < 3_000_000
        shutil.rmtree(tmp_path / name)
