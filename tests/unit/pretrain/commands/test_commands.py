"""From text to a Hugging Face model and back through the commands, and what they say to mistakes."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from transformers import AutoModelForMaskedLM, AutoTokenizer

from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.diffusion.estimators import likelihood_objective
from bd3_megatron.diffusion.noise import Purpose, SampleKeys
from data_prep.read.order import RowOrder
from data_prep.read.reader import RowReader
from pretrain.checkpoint.loaded_run import load_run
from pretrain.config.resolve import load_saved
from pretrain.evaluation.rows import make_batch
from pretrain.tracking.metrics import read_metrics
from tests.conftest import LENGTH
from tests.unit.commands import Done, bd3

GOLDEN = Path(__file__).parents[3] / "data" / "bd3lm_block8.safetensors"
MODELS = {
    "qwen3": "--model.kv-heads 2 --model.tie-embeddings true --diffusion.block-size 4",
    "dit": "--model.backbone dit --diffusion.block-size 8 --diffusion.draws 2",
    "causal": "--diffusion.objective causal --diffusion.block-size 1",
}
SHAPE = f"--model.layers 2 --model.hidden 32 --model.heads 4 --model.length {LENGTH} --model.dropout 0.1"
SHORT = "--train.steps 3 --train.global-batch 8 --train.micro-batch 4 --train.precision fp32 --train.warmup-steps 0"
WATCH = "--train.lr 0.01 --train.ema-decay 0.5 --eval.rows 8 --log.tensorboard false"


@dataclass(frozen=True)
class Loop:
    """What the commands made, one after the other, and what they printed."""

    folder: Path
    data: Path
    done: dict[str, Done]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def exported(self) -> Path:
        return self.folder / "exported"


@pytest.fixture(scope="module", params=MODELS)
def loop(request, tmp_path_factory, corpus, data_set) -> Loop:
    folder, done = tmp_path_factory.mktemp(request.param), {}

    def run(name: str, line: str) -> None:
        done[name] = bd3(*line.split(), log=folder / name)
        assert done[name].code == 0, done[name].err

    data = folder / "data"
    run("prep", f"prep {corpus} --out {data} --length {LENGTH} --tokenizer bpe:300 --validation-fraction 0.3")
    run(
        "pretrain",
        f"pretrain --run {folder}/run --data.path {data} {SHAPE} {MODELS[request.param]} {SHORT} {WATCH}",
    )
    run("eval", f"eval {folder}/run --rows 8 --json")
    run("sample", f"sample {folder}/run --prompt Emma --count 2 --seed 3 --json")
    run("export", f"convert export {folder}/run {folder}/exported")
    run("import", f"convert import {folder}/exported {folder}/imported")
    run("eval again", f"eval {folder}/imported --data {data} --rows 8 --json")
    run("sample again", f"sample {folder}/imported --prompt Emma --count 2 --seed 3 --json")
    return Loop(folder, data, done)


def test_the_data_set_is_what_the_data_room_alone_makes(loop, data_set):
    for path in data_set.rglob("*"):
        if path.is_file():
            assert (loop.data / path.relative_to(data_set)).read_bytes() == path.read_bytes()


def test_eval_repeats_the_last_validation_of_training(loop):
    last = [record for record in read_metrics(loop.run) if record["split"] == "validation"][-1]
    printed = json.loads(loop.done["eval"].out)
    assert last.pop("split") == "validation"
    assert {name: printed[name] for name in last} == last
    assert printed["perplexity"] < read_metrics(loop.run)[0]["perplexity"]


def noised_rows(loop: Loop, model: ModelConfig, diffusion: DiffusionConfig):
    """The batch that `bd3 eval --rows 8` sees."""
    reader, slots = RowReader(loop.data, "validation"), np.arange(8)
    _, rows = RowOrder(len(reader), 0).epoch_and_row(slots)
    keys = SampleKeys(np.zeros_like(slots), rows, slots, batch=0, batch_rows=8)
    return make_batch(reader, model, diffusion, keys, 0, Purpose.EVALUATE)


def test_the_export_loads_in_transformers_with_the_loss_of_the_run(loop):
    exported = AutoModelForMaskedLM.from_pretrained(loop.exported, trust_remote_code=True)
    config = load_saved(loop.run / "config.yaml")
    diffusion = likelihood_objective(config.diffusion)
    batch = noised_rows(loop, config.model, diffusion)
    nelbo = json.loads(loop.done["eval"].out)["nelbo"]
    tokens = 8 * (LENGTH - 1)
    with torch.no_grad():
        if diffusion.objective == "causal":
            loss = exported(batch.input_ids, labels=batch.input_ids).loss
        else:
            clean = batch.labels if diffusion.block_size < LENGTH else None
            noisy = batch.input_ids[: len(batch.labels)]
            loss = exported(noisy, clean, labels=batch.labels, loss_weights=batch.weight).loss
    draws = len(batch.labels) // 8
    assert loss.item() * batch.labels.numel() / draws / tokens == pytest.approx(nelbo, rel=1e-5)


def test_what_was_exported_and_imported_evaluates_and_samples_alike(loop):
    first, second = (json.loads(loop.done[name].out) for name in ("eval", "eval again"))
    assert (first.pop("step"), second.pop("step")) == (3, 0)
    assert first == second
    assert loop.done["sample"].out == loop.done["sample again"].out


def test_samples_continue_the_prompt(loop):
    samples = [json.loads(line) for line in loop.done["sample"].out.splitlines()]
    assert [sample["sample"] for sample in samples] == [0, 1]
    assert all(sample["text"].startswith("Emma") for sample in samples)
    assert len({sample["text"] for sample in samples}) == 2
    prompt = len(Tokenizer.from_file(str(loop.run / "tokenizer.json")).encode("Emma").ids)
    assert all(sample["tokens"] <= LENGTH - prompt - 1 for sample in samples)  # BOS and prompt are not new
    total = sum(sample["tokens"] for sample in samples)
    assert loop.done["sample"].err == f"{total} new tokens in {samples[0]['nfe']} forward passes (step 3)\n"


def test_the_exported_tokenizer_is_the_runs(loop):
    ours = Tokenizer.from_file(str(loop.run / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(loop.exported)
    text = "It is a truth universally acknowledged"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text, add_special_tokens=False).ids


def test_commands_leave_what_they_promise_and_no_more(loop):
    names = {"data", "run", "exported", "imported"} | {f"{name}{end}" for name in loop.done for end in (".out", ".err")}
    assert {path.name for path in loop.folder.iterdir()} == names
    files = {"config.yaml", "tokenizer.json", "checkpoints", "run_id.json"}
    assert {path.name for path in (loop.folder / "imported").iterdir()} == files
    watched = {"metrics.jsonl", "throughput.jsonl", "curves.png", "versions.txt"}
    watched |= {"events.jsonl", "heartbeat.json", "preflight.json", "logs"}
    assert {path.name for path in loop.run.iterdir()} == files | watched


# ---- mistakes ----


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder; files with their bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_set) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    line = f"pretrain --run {folder}/run --data.path {data_set} {SHAPE} --diffusion.block-size 4 {SHORT} {WATCH}"
    done = bd3(*line.split(), "--train.steps", "1", log=folder / "log")
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture
def workplace(tmp_path, corpus, data_set, trained, monkeypatch) -> Path:
    """A folder with a corpus, a data set, a run and several things that are broken; the commands run in it."""
    shutil.copyfile(corpus, tmp_path / "corpus.jsonl")
    shutil.copytree(data_set, tmp_path / "data")
    shutil.copytree(trained, tmp_path / "run")
    packed = gzip.compress((tmp_path / "corpus.jsonl").read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "latin.jsonl").write_bytes('{"id": "1", "text": "café"}\n'.encode("latin-1"))
    (tmp_path / "typo.yaml").write_text("model:\n  layrs: 3\n")
    (tmp_path / "file").write_text("a regular file")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PRETRAIN = f"pretrain --data.path data {SHAPE} {SHORT} {WATCH} --run new"
MISTAKES = {
    # prep
    "prep corpus.jsonl --out new --lenght 32": "--lenght: unknown option; did you mean --length?",
    "prep nowhere.jsonl --out new": "nowhere.jsonl: no such file or folder; check the path",
    "prep cut.jsonl.gz --out new --tokenizer bpe:300": "cut.jsonl.gz: the gz stream ends early, after ",
    "prep latin.jsonl --out new --tokenizer bpe:300": "latin.jsonl at 0: not UTF-8 at byte 24",
    "prep corpus.jsonl --out new --tokenizer gpt5": "gpt5: no such tokenizer file",
    "prep corpus.jsonl --out new --tokenizer bpe:10": "tokenizer=bpe:10: no room for",
    "prep corpus.jsonl --out new --tokenizer bpe:99999999999999999999999": "after bpe: goes a number of entries below",
    "prep corpus.jsonl --out file/new --tokenizer bpe:300": "file/new: cannot be written",
    "prep corpus.jsonl --out /proc/new --tokenizer bpe:300": "/proc/new: cannot be written (No such file or directory)",
    "prep corpus.jsonl --out run --tokenizer bpe:300": "run: exists and is not a data set",
    # pretrain
    f"{PRETRAIN} --train.stepz 3": "--train.stepz: unknown option; did you mean --train.steps?",
    f"{PRETRAIN} --config typo.yaml": "typo.yaml: model.layrs: unknown key; did you mean model.layers?",
    f"{PRETRAIN} --config none.yaml": "none.yaml: no such configuration file",
    f"{PRETRAIN} --model.heads 5": "model.heads=5: model.hidden=32 is not divisible by 5",
    f"{PRETRAIN} --diffusion.block-size 5": "diffusion.block_size=5: model.length=32 is not divisible by 5",
    f"{PRETRAIN} --model.length 64": "model.length=64: the rows of data have 32 tokens; use model.length=32",
    f"{PRETRAIN} --model.vocab-size 10": "model.vocab_size=10: data has 300 ids",
    f"{PRETRAIN} --train.micro-batch 3": "train.micro_batch=3: train.global_batch=8 is not divisible by 3",
    f"{PRETRAIN} --data.path nowhere": "nowhere: no such data set; write it with bd3 prep --out nowhere",
    f"{PRETRAIN} --data.path run": "run: not a data set",
    f"{PRETRAIN} --data.path null": "data.path: not set",
    f"{PRETRAIN} --run file": "run=file: is not a folder; give another name, or remove it",
    f"{PRETRAIN} --run file/new": "file/new: cannot read or write: Not a directory",
    f"{PRETRAIN} --run /proc/new": "/proc/new: cannot read or write: No such file or directory",
    f"{PRETRAIN} --parallel.tensor 2": "their product 2 does not divide the world of 1",
    # eval
    "eval": "RUN is missing; usage: bd3 eval RUN [OPTIONS]",
    "eval nowhere": "nowhere: not a run folder (config.yaml is missing)",
    "eval data": "data: not a run folder (config.yaml is missing)",
    "eval run --step 7": "step 7: no checkpoint run/checkpoints/step-00000007; there are: 1",
    "eval run --data nowhere": "nowhere: no such data set",
    "eval run --rows 1": "rows=1: use 2 or more",
    # sample
    "sample nowhere": "nowhere: not a run folder",
    "sample run --tokens 32": "--tokens 32: the prompt has 1 tokens with BOS and a row of this model 32; use 31",
    "sample run --top-p 0": "top_p=0: use a value above 0",
    "sample run --method best": "method=best: unknown decoding algorithm; use first_hitting, steps, or name the module",
    "sample run --prompt <|mask|>": "--prompt: holds the mask token",
    "sample run --prompt -x": "--prompt: a value is missing; one that begins with - is written --prompt=-x",
    "sample run --seed 99999999999999999999": "seed=99999999999999999999: use a value below 9.22337",
    # convert
    "convert exprot run new": "bd3 convert exprot: unknown direction; did you mean export?",
    "convert export nowhere new": "nowhere: not a run folder",
    "convert export run data": "out=data: exists and is not an empty folder",
    "convert export run file/new": "out=file/new: cannot be written",
    "convert export run /proc/new": "out=/proc/new: cannot be written: No such file or directory",
    "convert import nowhere new": "nowhere: no such file",
    "convert import data new": "data/config.json: no such file",
    "convert import file new": "file: not a readable safetensors file",
    "convert import run run": "run: exists already",
    f"convert import {GOLDEN} /proc/new": "/proc/new: cannot be written (No such file or directory)",
    f"convert import {GOLDEN} new --mask-id 999": "model.mask_id=999: not below model.vocab_size=",
    f"convert import {GOLDEN} new --bos <s>": "--bos: names a token of a tokenizer; give that with --tokenizer",
    f"convert import {GOLDEN} new --tokenizer file": "file: not a tokenizer",
    f"convert import {GOLDEN} new --tokenizer data/tokenizer.json": "data/tokenizer.json: has 300 tokens, the model ",
    # bench
    "bench step --heads 3": "model.heads=3: model.hidden=256 is not divisible by 3",
    "bench step --lengths 64 100": "diffusion.block_size=16: model.length=100 is not divisible by 16",
    "bench step --lengths 1 --block-size 1": "lengths=1: use 2 or more",
    "bench step --lengths": "lengths=: give at least 1",
    "bench checkpoint --layers 0": "layers=0: use 1 or more",
}
if not torch.cuda.is_available():
    MISTAKES[f"{PRETRAIN} --parallel.backend nccl"] = "parallel.backend=nccl: no CUDA device here; use auto or gloo"


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_exit_code_two_and_nothing_left_behind(line, workplace, tmp_path_factory):
    before = tree(workplace)
    done = bd3(*line.split(), log=tmp_path_factory.mktemp("log") / "log")
    *progress, told = done.err.splitlines()
    assert MISTAKES[line] in told
    # What prep has done until it meets the mistake may be reported before it.
    assert all(said.startswith(("read ", "trained ", "tokenized")) for said in progress)
    assert (done.code, done.out) == (2, "")
    assert tree(workplace) == before


def test_a_run_without_a_tokenizer_or_with_damaged_checkpoints_is_told(workplace, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    (workplace / "run" / "tokenizer.json").unlink()
    done = bd3("sample", "run", log=log)
    assert (done.code, done.err) == (
        2,
        "run: has no tokenizer.json; copy the one the model was trained with into it\n",
    )
    (workplace / "run" / "checkpoints" / "step-00000001" / "complete.json").unlink()
    for line in ("eval run", "convert export run new"):
        done = bd3(*line.split(), log=log)
        assert (done.code, done.err) == (
            2,
            "run/checkpoints: no complete checkpoint: step-00000001: complete.json is missing; "
            "let bd3 pretrain reach one\n",
        )


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("layers: 2", "layers: 1", "weights: decoder.layers.1."),
        ("vocab_size: 300", "vocab_size: null", "model.vocab_size=null: "),
        ("mask_id: 2", "mask_id: null", "model.mask_id=null: "),
        ("bos_id: 0", "bos_id: null", "model.bos_id=null: "),
    ],
)
def test_a_configuration_that_does_not_fit_the_checkpoint_is_told(old, new, line, workplace, tmp_path_factory):
    config = workplace / "run" / "config.yaml"
    text = config.read_text()
    assert text.count(old) == 1
    config.write_text(text.replace(old, new))
    done = bd3("sample", "run", log=tmp_path_factory.mktemp("log") / "log")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith(f"run/config.yaml: {line}")


def test_the_runs_tokenizer_is_read_with_care(workplace, tmp_path_factory):
    log, path = tmp_path_factory.mktemp("log") / "log", workplace / "run" / "tokenizer.json"
    before = bd3("sample", "run", "--prompt", "Emma Woodhouse, handsome", log=log)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(2)
    tokenizer.save(str(path))
    assert bd3("sample", "run", "--prompt", "Emma Woodhouse, handsome", log=log) == before
    assert before.code == 0
    path.write_bytes(path.read_bytes()[:1000])
    done = bd3("sample", "run", log=log)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("run/tokenizer.json: not a tokenizer (")


def test_a_run_can_be_evaluated_from_elsewhere(workplace, tmp_path_factory, monkeypatch):
    """Its data set is found, and a backend that needs a GPU is not asked for."""
    log = tmp_path_factory.mktemp("log") / "log"
    line = f"{PRETRAIN} --diffusion.block-size 4 --train.steps 1"
    assert bd3(*line.split(), log=log).code == 0
    config = workplace / "new" / "config.yaml"
    config.write_text(config.read_text().replace("backend: auto", "backend: nccl"))
    monkeypatch.chdir(log.parent)
    assert bd3("eval", workplace / "new", "--rows", "8", log=log).code == 0


def test_a_run_is_opened_as_often_as_one_likes(trained):
    loaded = load_run(trained)
    for _ in range(2):
        with loaded.engine() as engine:
            assert engine.world.size == 1
        assert not dist.is_initialized()


def test_a_damaged_shard_is_told(workplace, tmp_path_factory):
    (shard,) = (workplace / "data" / "train").iterdir()
    shard.write_bytes(shard.read_bytes()[:-1])
    before = tree(workplace)
    done = bd3(*PRETRAIN.split(), log=tmp_path_factory.mktemp("log") / "log")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert shard.name in done.err
    assert tree(workplace) == before


def test_the_installed_command_does_the_same(workplace):
    """Once through the console script, with an interpreter that ends as usual."""
    command = Path(sys.executable).with_name("bd3")
    if not command.exists():
        pytest.skip("the package is not installed here")
    options = {"capture_output": True, "text": True, "cwd": workplace, "env": os.environ | {"COLUMNS": "80"}}
    good = subprocess.run([command, "eval", "run", "--rows", "8", "--json"], check=False, **options)
    # What a CUDA build of torch logs where it finds nvcc and no GPU is not ours.
    lines = [line for line in good.stderr.splitlines() if "No CUDA runtime is found" not in line]
    assert (good.returncode, lines) == (0, [])
    assert json.loads(good.stdout)["rows"] == 8
    bad = subprocess.run([command, "eval", "data"], check=False, **options)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("data: not a run folder")
    assert bad.stderr.count("\n") == 1
