"""Plugins: what ``--plugin`` loads, who inherits it, and that nothing else loads code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_common import plugins
from bd3_common.errors import ConfigError
from pretrain import cli

CONSTANT = '''
from pathlib import Path

import numpy as np

from bd3_megatron.diffusion.schedules import SCHEDULES, Schedule

Path(__file__).with_suffix(".loaded").touch()


class Constant(Schedule):
    """Every token is masked."""

    def mask_probability(self, t):
        return np.ones_like(t)

    def loss_weight(self, t):
        return 1 / t


SCHEDULES.add("constant_for_test", Constant)
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "constant_for_test.py"
    file.write_text(CONSTANT)
    return file


def bd3(*args: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)


def loaded(plugin: Path) -> bool:
    """Whether the plugin ran since the last call."""
    mark = plugin.with_suffix(".loaded")
    found = mark.exists()
    mark.unlink(missing_ok=True)
    return found


def test_the_option_stands_anywhere_and_processes_inherit_it(plugin: Path) -> None:
    chosen = ("config", "--diffusion.schedule", "constant_for_test")
    for args in (["--plugin", plugin, *chosen], [*chosen, f"--plugin={plugin}"]):
        done = bd3(*args)
        assert (done.returncode, done.stderr) == (0, "")
        assert "schedule: constant_for_test" in done.stdout
    assert bd3(*chosen, **{plugins.VARIABLE: str(plugin)}).returncode == 0
    assert bd3(*chosen).stderr.startswith("diffusion.schedule=constant_for_test: unknown noise schedule; ")
    assert "constant_for_test}" in bd3("config", "--help", "--plugin", plugin).stdout


def test_words_of_another_command_are_left_alone() -> None:
    words = ["attempt", "run", "--", "bd3", "pretrain", "--plugin", "nothing"]
    assert plugins.take_option(words) == words


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--plugin"], "--plugin: a value is missing; give a module or a .py file that adds to a registry"),
        (["--plugin", "--help"], "--plugin: a value is missing; give a module or a .py file that adds to a registry"),
        (["--plugin", "no_such_module_x"], "--plugin=no_such_module_x: cannot be imported (ModuleNotFoundError: "),
    ],
)
def test_mistakes(args: list[str], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "")
    with pytest.raises(ConfigError) as caught:
        plugins.take_option(["config", *args])
    assert str(caught.value).startswith(line)


def test_a_file_with_the_name_of_another_module_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "")
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match="'json' is another module's name or none; rename the file"):
        plugins.add([str(tmp_path / "json.py")])


def test_a_configuration_that_names_a_plugin_loads_nothing(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = plugin.parent / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"plugin: {plugin}\ndiffusion: {{schedule: constant_for_test}}\n")
    assert cli.main(["config", "--config", str(run / "config.yaml")]) == 2
    assert capsys.readouterr().err == f"{run / 'config.yaml'}: plugin: unknown key\n"
    for command in (["eval", str(run)], ["pretrain", "--run", str(run), "--data.path", "nowhere"]):
        assert cli.main(command) != 0
    assert not loaded(plugin)


def test_a_data_set_that_names_a_plugin_loads_nothing(plugin: Path, data_set: Path) -> None:
    copy = plugin.parent / "rows"
    shutil.copytree(data_set, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"plugin": str(plugin)}))
    assert cli.main(["check", str(copy)]) in (0, 1, 2)
    assert not loaded(plugin)


def test_the_environment_for_a_batch_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "")
    assert plugins.environment() == {}
    monkeypatch.setenv(plugins.VARIABLE, os.pathsep.join(["/a/b.py", "module"]))
    assert plugins.environment() == {"BD3_PLUGINS": "/a/b.py:module"}
