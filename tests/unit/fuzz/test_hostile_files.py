"""Files made to break their reader: each is one line of the reader's own error, at once and in little memory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_common.errors import ConfigError
from bd3_megatron.config import ModelConfig
from bd3_megatron.hf.convert import read_checkpoint
from bd3_megatron.hf.mapping import from_hf
from data_prep.errors import DataError
from data_prep.verify.check import check
from pretrain.config.resolve import load_run_config, load_saved
from pretrain.config.yaml_text import MAX_CHARACTERS
from pretrain.resilience import heartbeat
from pretrain.resilience.slurm_job import SlurmJob
from pretrain.resilience.supervisor import reason_not_to_start, take_bad_nodes
from pretrain.run_folder import events
from tests.unit.fuzz.sandbox import outcome
from tests.unit.fuzz.targets import OLD, make_run, make_shards, read_config, read_data, read_status

DEEP = "[" * 200_000


@pytest.fixture
def data(tmp_path) -> Path:
    return shutil.copytree(OLD / "data", tmp_path / "data")


@pytest.fixture
def export(tmp_path) -> Path:
    return shutil.copytree(OLD / "export", tmp_path / "export")


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    make_run(tmp_path / "run")
    return tmp_path / "run"


def shard(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["splits"]["train"]["shards"][0]


def change(path: Path, *keys: Any, value: Any) -> None:
    """Set one value of a JSON file."""
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


SHARD = ("splits", "train", "shards", 0)


@pytest.mark.parametrize(
    ("keys", "value", "line"),
    [
        ((*SHARD, "name"), "../../outside.tar", "must be a path inside the folder"),
        ((*SHARD, "name"), "/outside.tar", "must be a path inside the folder"),
        ((*SHARD, "name"), "a\0b", "must be a path inside the folder"),
        ((*SHARD, "members", 0, 0), 2**63 - 64, "less than or equal to 9007199254740992"),
        ((*SHARD, "members", 0, 0), 2**53, "its rows lie outside it"),
        ((*SHARD, "members", 0, 1), 2**53, "its rows lie outside it"),
        ((*SHARD, "members", 0, 2), 2**58, "less than or equal to"),
        ((*SHARD, "members", 0, 2), 2**62, "less than or equal to"),
        ((*SHARD, "members", 0, 2), 2**63, "less than or equal to"),
        ((*SHARD, "members", 0, 2), 2**50, ": its members have"),
        ((*SHARD, "members", 0, 3), 2**50, "its rows lie outside it"),
        ((*SHARD, "members"), [], ": its members have 0"),
        ((*SHARD, "rows"), 2**40, "more than its"),
        (("vocab_size",), -5, "greater than or equal to 1"),
        (("vocab_size",), 2, "_id=2: not below vocab_size=2"),
        (("vocab_size",), 10, "the manifest says 10 ids"),
        (("vocab_size",), 2**40, "less than or equal to"),
        (("vocab_size",), 2**70, "less than or equal to"),
        (("vocab_size",), 2**20, "has no room for vocab_size"),
        (("vocab_size",), 280, "holds id 2"),
        (("mask_id",), 10**6, "mask_id=1000000: not below vocab_size"),
        (("length",), 2**62, "less than or equal to"),
        (("validation_unigram_nats",), 1e300, "less than or equal to 700"),
        (("splits", "train", "unigram_entropy"), float("nan"), "is no JSON"),
    ],
    ids=str,
)
def test_a_manifest_that_lies(data, keys, value, line):
    change(data / "manifest.json", *keys, value=value)
    with pytest.raises(DataError, match=line):
        read_data(data)
    assert outcome(lambda: check(data, workers=1)) is None


def test_a_deep_manifest(data):
    (data / "manifest.json").write_text(DEEP)
    with pytest.raises(DataError, match="is no JSON"):
        read_data(data)


@pytest.mark.parametrize(
    "text",
    [
        '{"event":"launched","time":1,"jobs":5}',
        '{"event":"launched","time":1,"jobs":null}',
        '{"event":"launched","time":1,"jobs":[["a"]]}',
        '{"event":"launched","time":1,"jobs":["--help", "1"]}',
        '{"event":"attempt","time":1,"job":{"a":1}}',
        '{"event":"attempt","time":1,"job":"-c"}',
        '{"event":"ended","time":1e300,"kind":"x"}',
        '{"event":"ended","time":NaN,"kind":"x"}',
        '{"event":"ended","time":-1,"kind":"x"}',
        '{"event":"ended","time":1,"excluded":5}',
        '{"event":"ended","time":1,"excluded":null}',
        '{"event":"ended","time":1,"excluded":[1,"a",null]}',
        '{"event":"ended","time":1,"cause":"\\u001b[31m\\n\\u202e"}',
        '{"event":"ended","time":1,"step":' + "9" * 5000 + "}",
        DEEP,
        "\0" * 100,
        "x" * 1_000_000,
    ],
    ids=lambda text: text[:40],
)
def test_status_of_any_events(run, text):
    (run / "events.jsonl").write_text(text + "\n")
    read_status(run)
    with (run / "events.jsonl").open("ab") as file:
        file.write(b'{"event":"started","time":1\xff}\n')
    events.record(run, "started", step=3)
    assert events.read(run)[-1]["step"] == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", '{"step":5,"split":"train","loss":"x"}'),
        ("metrics.jsonl", '{"step":5,"split":"train","loss":NaN}'),
        ("metrics.jsonl", '{"step":5e300,"split":"train","loss":1}'),
        ("metrics.jsonl", '{"step":5,"split":"validation","perplexity":1e300}'),
        ("throughput.jsonl", '{"step":5,"split":"throughput","seconds_per_step":-1e300,"tokens_per_second":"x"}'),
        ("throughput.jsonl", '{"step":5,"split":"throughput","seconds_per_step":NaN,"tokens_per_second":1e300}'),
        ("throughput.jsonl", '{"step":5,"split":"throughput","seconds_per_step":1e14,"tokens_per_second":-1}'),
        ("heartbeat.json", DEEP),
        ("heartbeat.json", '{"start":1}'),
        ("config.yaml", DEEP),
        ("config.yaml", "train: {steps: .nan}"),
    ],
)
def test_status_of_any_numbers(run, name, text):
    (run / name).write_text(text + "\n")
    read_status(run)


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl", "heartbeat.json", "config.yaml", "suspects.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "endless"])
def test_status_of_files_that_are_none(run, name, kind):
    (run / name).unlink()
    make = {"folder": Path.mkdir, "pipe": os.mkfifo, "loop": lambda path: path.symlink_to(path.name)}
    make["endless"] = lambda path: path.symlink_to("/dev/zero")
    make[kind](run / name)
    assert outcome(lambda: read_status(run)) is None
    assert take_bad_nodes(run, 1) is None or name != "suspects.json"
    assert heartbeat.read(run) is None or name != "heartbeat.json"


def test_a_start_without_slurm_whose_supervisor_was_killed(run):
    events.record(run, "attempt", job="", restart=0, nodes=[], step=0, lineage="a 1")
    assert reason_not_to_start(run, SlurmJob.from_environ({}), 3) is None
    assert events.read(run)[-1]["cause"] == "ended from outside: a node failure, preemption or a kill"


@pytest.mark.parametrize("timeout", ["0", "-1", "NaN", "1e300", '"x"', "null"])
def test_a_heartbeat_of_garbage_ends_no_job(run, timeout):
    text = (run / "heartbeat.json").read_text()
    monitor = heartbeat.HeartbeatMonitor(run)
    (run / "heartbeat.json").write_text(text.replace("60.0", timeout).replace("1.0 2", "another"))
    assert monitor.trouble(1.0) is None
    assert monitor.trouble(1e12) is None


@pytest.mark.parametrize(
    ("keys", "value", "line"),
    [
        (("noise",), [1], "noise: value a list of 1"),
        (("noise",), "x", "noise: value x: "),
        (("noise",), {"beta": "x"}, "beta: value x"),
        (("objective",), {"a": []}, "objective: value a dict of 1"),
        (("vocab_size",), 2**40, "vocab_size: value 1099511627776"),
        (("num_hidden_layers",), 10**9, "layers: value 1000000000"),
        (("num_hidden_layers",), 9000, "the weights are [0-9]+ tensors"),
        (("max_position_embeddings",), 2**62, "length: value"),
        (("hidden_size",), float("inf"), "is no JSON"),
        (("model_type",), ["a"] * 10, "no format has it"),
        (("model_type",), "\x1b[31m", r"\\x1b\[31m': no format has it"),
    ],
    ids=str,
)
def test_an_export_that_lies(export, keys, value, line):
    change(export / "config.json", *keys, value=value)
    with pytest.raises(ConfigError, match=line) as caught:
        read_checkpoint(export)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "weight_map", ['{"a":1}', '{"a":1,"b":"x"}', '{"a":["x"]}', '{"a":"../x.safetensors"}', "5", '{"a":"/x"}', DEEP]
)
def test_an_index_that_lies(export, weight_map):
    (export / "model.safetensors.index.json").write_text(f'{{"weight_map":{weight_map}}}')
    with pytest.raises(ConfigError, match=r"index\.json: "):
        read_checkpoint(export)


def test_shards_and_their_index_are_read(tmp_path):
    (tmp_path / "shards").mkdir()
    make_shards(tmp_path / "shards")
    _, _, weights = read_checkpoint(tmp_path / "shards")
    _, _, expected = read_checkpoint(OLD / "export")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_a_reference_model_of_infinite_size(export):
    text = '{"model_type":"bd3lm","vocab_size":Infinity,"model_length":1,"n_blocks":1,"hidden_dim":1,"n_heads":1}'
    (export / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="is no JSON"):
        read_checkpoint(export)
    (export / "config.json").write_text(text.replace("Infinity", '"inf"'))
    with pytest.raises(ConfigError, match="no number where one belongs"):
        read_checkpoint(export)


BOMB = "guard:\n  skip:\n  - &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"  - &{chr(98 + level)} [{','.join([f'*{chr(97 + level)}'] * 9)}]\n" for level in range(8)
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (BOMB, "more than 50000 values"),
        ("guard: &a {skip: *a}\n", "an anchor that holds itself"),
        ("guard: {skip: " + "[" * 20000 + "]" * 20000 + "}\n", "nested more than 32 deep"),
        ("a: &a {b: 1}\nmodel:\n  <<: *a\n", "is not YAML"),
        ("x" * (MAX_CHARACTERS + 1), "has more than"),
        ("model:\n  layers: 2\n  layers: 3\n", "the key layers is given twice"),
        ("model: {layers: .inf}\n", "model.layers=inf"),
        ("train: {lr: .nan}\n", "train.lr=nan: not a finite number"),
        ("model: {layers: 0x" + "f" * 6000 + "}\n", "an integer of 24000 bits: use 10000 or less"),
        ("log: {every: 0x" + "f" * 6000 + "}\n", "an integer of more than 64 bits"),
        ("? 0x" + "f" * 6000 + "\n: 1\n", "an integer of 24000 bits: unknown key"),
        ("run: !!python/object/apply:os.system [true]\n", "is not YAML"),
        ("model: {layers: 1000000000}\n", "model.layers=1000000000: use 10000 or less"),
        ("model: {length: 4611686018427387904}\n", "use 4194304 or less"),
        ("parallel: {timeout_minutes: 1.0e+300}\n", "use 1000000 or less"),
        ('"\\e[31m": 1\n', r"\\x1b\[31m: unknown key"),
        ("guard: {skip: [[x, x], {a: b}]}\n", "guard.skip="),
    ],
    ids=lambda text: text[:30],
)
def test_a_configuration_that_lies(tmp_path, text, line):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=line) as caught:
        read_config(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_run_of_a_billion_layers(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  layers: 2\n", "  layers: 1000000000\n"))
    with pytest.raises(ConfigError, match="use 10000 or less"):
        load_saved(run / "config.yaml")
    model = ModelConfig(layers=9000, hidden=16, heads=2, vocab_size=300)
    with pytest.raises(ConfigError, match="the weights are 1 tensors"):
        from_hf({"a": torch.zeros(1)}, model)


@pytest.mark.parametrize(
    "flags",
    [
        ("--model.vocab-size", 2**40),
        ("--model.length", 2**40),
        ("--train.global-batch", 2**40, "--train.micro-batch", 2**20),
        ("--eval.draws", 10**9),
        ("--train.steps", 2**70),
        ("--train.steps", "9" * 5000),
        ("--model.hidden", 2**60, "--model.heads", 2**59),
    ],
    ids=str,
)
def test_sizes_beyond_any_machine(flags):
    with pytest.raises(ConfigError):
        load_run_config([str(flag) for flag in flags])
