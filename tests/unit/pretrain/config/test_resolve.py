"""Where a configuration comes from, what is wrong with it, and that it survives being written and read."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_common.errors import ConfigError
from bd3_megatron.config import ModelConfig
from bd3_megatron.layout import check_layout
from pretrain.commands import config as config_command
from pretrain.config import resolve as load
from pretrain.config.resolve import absent_values, load_run_config, load_saved, presets, save_config
from pretrain.config.schema import DataConfig, RunConfig
from pretrain.config.values import leaves

GPT2_AND_MASK = 50_258
SIZES = {"tiny-cpu": None, "dit-small": 169_627_218, "125m": 125e6, "1b": 1.3e9, "7b": 7e9}


def mistake(*args: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(list(args))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def shapes(model: ModelConfig, vocab: int) -> list[tuple[int, ...]]:
    """Shapes of all parameters, tensor by tensor."""
    h, f, d, q, kv = model.hidden, model.ffn, model.width_per_head, model.heads, model.groups
    dit = model.backbone == "dit"
    norm = [(h,), (h,)] if dit else [(h,)]
    attention = [(q * d, h), (kv * d, h), (kv * d, h), (h, q * d)]
    mlp = [(f, h), (f,), (h, f), (h,)] if dit else [(d,), (d,), (f, h), (f, h), (h, f)]
    head = [] if model.tie_embeddings else [(vocab, h), *([(vocab,)] if dit else [])]
    layers = itertools.chain.from_iterable([*norm, *norm, *attention, *mlp] for _ in range(model.layers))
    return [(vocab, h), *layers, *norm, *head]


def test_every_preset_is_in_the_table() -> None:
    assert set(presets()) == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_preset(name: str) -> None:
    config = load_run_config(["--preset", name])
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    assert check_layout(config.engine(), 8 * tensor * pipeline) == 8
    vocab = config.model.vocab_size or GPT2_AND_MASK
    count = config.model.parameters(vocab)
    assert count == sum(math.prod(shape) for shape in shapes(config.model, vocab))
    if SIZES[name] is not None:
        assert count == pytest.approx(SIZES[name], rel=0.1)


def test_later_sources_win(file: Path) -> None:
    file.write_text("model: {layers: 6, heads: 8}\ntrain:\n  lr: 5e-4\n")
    config = load_run_config(["--preset", "tiny-cpu", "--model.heads", "2", "--config", str(file)])
    assert config.model.length == 128  # preset
    assert config.model.layers == 6  # file over preset
    assert config.model.heads == 2  # flag over file
    assert config.train.lr == 5e-4  # which YAML itself reads as text
    assert config.checkpoint.keep == RunConfig().checkpoint.keep


def test_a_file_may_leave_the_fitting_value_to_a_flag(file: Path) -> None:
    file.write_text("model:\n  hidden: 100\n")
    assert mistake("--config", str(file)).startswith("model.heads=12: model.hidden=100 is not divisible")
    assert load_run_config(["--config", str(file), "--model.heads", "10"]).model.hidden == 100


@pytest.mark.parametrize("text", ["", "# nothing\n", "model:\n", "model: {}\n"])
def test_empty_files_and_sections(file: Path, text: str) -> None:
    file.write_text(text)
    assert load_run_config(["--config", str(file)]) == RunConfig()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {layrs: 3}", "model.layrs: unknown key; did you mean model.layers?"),
        ("modl: {layers: 3}", "modl: unknown key; did you mean model?"),
        ("layers: 3", "layers: unknown key; did you mean model.layers?"),
        ("preset: 7b", "preset: unknown key"),
        ("model: {layers: abc}", "model.layers=abc: not an integer"),
        ("model: {layers: 2.5}", "model.layers=2.5: not an integer"),
        ("model: {layers: true}", "model.layers=true: a value is needed here, not true or false"),
        ("model: {layers: null}", "model.layers=null: not an integer"),
        ("model: {layers: [3]}", "model.layers=3: not an integer"),
        (
            "model: {backbone: lama}",
            "model.backbone=lama: unknown backbone; did you mean llama? use dit, llama, qwen2, qwen3",
        ),
        ("train: {lr: .inf}", "train.lr=inf: not a finite number"),
        ("train: {dropout: .1}", "train.dropout: unknown key; did you mean model.dropout?"),
        ("run: 3", "run=3: not a text; put quotes around it"),
        ("run: null", "run=null: a text is needed"),
        (
            "run:\n  2020-99-99",
            "line 2 is not YAML: 2020-99-99 is not the timestamp it looks like; put quotes around it",
        ),
        ("train: {steps: !!int x}", "line 1 is not YAML: x is not the int it looks like"),
        ("log: {tensorboard: !!bool x}", "line 1 is not YAML: x is not the bool it looks like"),
        ("model: 3", "model=3: not a section; write 'key: value' lines below it"),
        ("- model", "not a configuration; write 'key: value' lines"),
        ("model: [", "line 1 is not YAML: expected the node content, but found '<stream end>'"),
        ("model:\n\tlayers: 3", "line 2 is not YAML: found character '\\t' that cannot start any token"),
        ("model:\n  layers: 3\n  layers: 4", "line 3 is not YAML: the key layers is given twice"),
        ("run: !!python/object:os.x {}", "line 1 is not YAML: could not determine a constructor for the tag"),
    ],
)
def test_mistakes_in_a_file_name_the_file(file: Path, text: str, line: str) -> None:
    file.write_text(text)
    assert mistake("--config", str(file)).startswith(f"{file}: {line}")


def test_mistakes_about_the_sources(file: Path, tmp_path: Path) -> None:
    assert mistake("--config", str(file)) == f"{file}: no such configuration file; check the path"
    assert mistake("--config", str(tmp_path)) == f"{tmp_path}: a folder, not a configuration file"
    file.write_bytes(b"run: \xff")
    assert mistake("--config", str(file)) == f"{file}: not a text file (byte 5 is not UTF-8)"
    names = "125m, 1b, 7b, dit-small, tiny-cpu"
    assert mistake("--preset", "13b") == f"preset=13b: unknown preset; use {names}"


def test_sections_are_checked_against_each_other() -> None:
    line = mistake("--preset", "tiny-cpu", "--parallel.tensor", "3")
    assert line == "parallel.tensor=3: model.heads=4 is not divisible by 3; use 1 or 2"
    line = mistake("--preset", "tiny-cpu", "--diffusion.block-size", "24")
    assert line.startswith("diffusion.block_size=24: model.length=128 is not divisible by 24")


@pytest.mark.parametrize("name", SIZES)
def test_what_bd3_config_prints_can_be_read_back(name: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--preset", name, "--train.adam-eps", "1.5e-9", "--data.path", "données: 1"]
    config_command.main(args)
    text = capsys.readouterr().out
    assert yaml.safe_load(text).keys() == RunConfig.model_fields.keys()
    file.write_text(text, encoding="utf-8")
    assert load_run_config(["--config", str(file)]) == load_run_config(args)


def test_bd3_config_comments(capsys: pytest.CaptureFixture[str]) -> None:
    config_command.main(["--preset", "dit-small", "--world-size", "16", "--parallel.tensor", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["# parameters: 162,265,682", "# ranks: 16 = tensor 2 x context 1 x pipeline 1 x data 8"]
    config_command.main(["--preset", "tiny-cpu", "--parallel.pipeline", "3", "--parallel.head-weight", "1"])
    assert capsys.readouterr().out.splitlines()[0] == "# layers per stage: 1, 2, 1"
    with pytest.raises(
        ConfigError, match=r"the world of 6 processes; start a multiple of 4, or use a product of 1, 2, 3 or 6$"
    ):
        config_command.main(["--preset", "7b", "--world-size", "6"])


@settings(deadline=None, max_examples=40)
@given(
    lr=st.floats(1e-9, 1e3),
    run=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    rows=st.none() | st.integers(2, 2**40),
    board=st.booleans(),
)
def test_saved_configurations_come_back_equal(
    tmp_path_factory: pytest.TempPathFactory, lr: float, run: str, rows: int | None, board: bool
) -> None:
    values = {"run": run, "train": {"lr": lr}, "eval": {"rows": rows}, "log": {"tensorboard": board}}
    config = RunConfig.model_validate(values)
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    save_config(config, path)
    assert load_saved(path) == config
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".saved")] == []


def test_the_data_set_is_found_from_another_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_config(RunConfig(data=DataConfig(path="some/../data")), file)
    assert load_saved(file) == RunConfig(data=DataConfig(path=str(tmp_path / "data")))


def test_a_failed_save_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_config(RunConfig(run="old"), file)

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(load.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        save_config(RunConfig(run="new"), file)
    assert load_saved(file).run == "old"
    assert list(file.parent.iterdir()) == [file]


def test_load_saved_checks_the_whole(file: Path) -> None:
    file.write_text("model: {hidden: 100}")
    with pytest.raises(ConfigError, match=r"^model.heads=12: "):
        load_saved(file)


# ---- keys that did not exist yet ----

BEFORE = Path(__file__).parents[3] / "data" / "before_rooms" / "run" / "config.yaml"


def dotted(values, prefix: str = "") -> set[str]:
    nested = [dotted(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}"} for k, v in values.items()]
    return set().union(*nested)


def test_every_newer_key_says_what_runs_without_it_did():
    known = dotted(yaml.safe_load(BEFORE.read_text())) | {"data.mix"}
    newer = set(leaves(RunConfig)) - known
    assert newer >= {"diffusion.masking", "diffusion.noise_version", "eval.estimator", "clip_search.every"}
    assert newer == dotted(absent_values(RunConfig))


def test_an_old_configuration_means_what_it_meant():
    config = load_saved(BEFORE)
    assert (config.diffusion.noise_version, config.diffusion.masking) == (1, "levels")
    assert config.eval.estimator == "levels"
    assert RunConfig().diffusion.noise_version == 2


def test_an_old_run_goes_on_as_it_was_whatever_the_preset_says_now(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(BEFORE.read_text())
    preset = "diffusion: {masking: counts}\neval: {estimator: levels}\nlog: {blocks_every: 7}\n"
    monkeypatch.setattr(load, "_preset", lambda name: (f"preset {name}", preset))
    config = load_run_config(["--preset", "tiny-cpu", "--run", str(run)])
    assert (config.diffusion.noise_version, config.diffusion.masking) == (1, "levels")
    assert config.log.blocks_every == 0
    stated = load_run_config(["--preset", "tiny-cpu", "--run", str(run), "--diffusion.noise-version", "2"])
    assert stated.diffusion.noise_version == 2  # which the run then refuses by name
    new = load_run_config(["--preset", "tiny-cpu", "--run", str(tmp_path / "none")])
    assert (new.diffusion.noise_version, new.diffusion.masking, new.log.blocks_every) == (2, "counts", 7)
