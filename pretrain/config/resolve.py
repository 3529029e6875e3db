"""Sources of a run's configuration: defaults < preset < file < flags; `bd3 config` shows it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field

from bd3_common.atomic import write_bytes
from bd3_common.errors import ConfigError
from bd3_common.schema import read_bytes
from bd3_common.text import shorten
from bd3_megatron.config import ABSENT
from data_prep.format.remote import is_remote
from pretrain.config import CONFIG_FILE
from pretrain.config.command_line import Below, parse_options
from pretrain.config.initial import is_run, shape_values, split_step
from pretrain.config.schema import RunConfig, check_batches, check_run
from pretrain.config.values import Layer, as_section, build, did_you_mean, leaves, put, show
from pretrain.config.yaml_text import MAX_CHARACTERS, load_yaml


def presets() -> list[str]:
    """Names that ``--preset`` takes, sorted."""
    files = resources.files("pretrain").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


class RunOptions(RunConfig):
    """A training run. Later wins: defaults, preset, file, flags."""

    preset: str | None = Field(default=None, description="start from a preset: " + ", ".join(presets()))
    config: str | None = Field(default=None, description="YAML file with any of these keys, as bd3 config prints them")


class ShowOptions(RunOptions):
    """Print the resolved configuration as YAML for --config. Later wins: defaults, preset, file, flags."""

    world_size: int | None = Field(
        default=None, ge=1, le=10_000_000, description="check that the layout fits this number of processes"
    )


Options = TypeVar("Options", bound=RunOptions)


def load_run_config(args: list[str], prog: str = "bd3 pretrain") -> RunConfig:
    """Resolve a run's configuration from command-line arguments, including ``--preset`` and ``--config``.

    Raises:
        ConfigError: one line for the first mistake in the preset, the file, the flags or between sections.
        OSError: the file cannot be read.
    """
    return resolve(RunOptions, args, prog)[0]


def preset_config(name: str) -> RunConfig:
    """The defaults under a preset.

    Raises:
        ConfigError: no such preset.
    """
    return build(RunConfig, [read_layer(*_preset(name))])


def save_config(config: RunConfig, path: Path, mode: int = 0o666) -> None:
    """Write ``config`` as YAML under a temporary name and rename it: ``path`` is complete or untouched.

    Paths of data sets and cache are stored absolute, because what reads the file later may be called from another
    folder. URLs are stored as they are.

    Args:
        mode: permissions of a new file, less those that the umask forbids.
    """
    data = config.data
    found: dict[str, Any] = {"path": data.path and _absolute(data.path), "cache": data.cache and _absolute(data.cache)}
    if data.mix is not None:
        found["mix"] = {_absolute(path): weight for path, weight in data.mix.items()}
    config = config.model_copy(update={"data": data.model_copy(update=found)})
    write_bytes(path, to_yaml(config).encode(), mode=mode)


def _absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path)


def load_saved(path: Path) -> RunConfig:
    """Read what :func:`save_config` wrote.

    Raises:
        ConfigError: the file is missing, or one of its keys or values is wrong.
    """
    return build(RunConfig, [Layer(absent_values(RunConfig)), read_layer(path.name, _read_text(path))])


def absent_values(cls: type[BaseModel]) -> dict[str, Any]:
    """Values, nested, of the keys that were added since configurations are saved: those that a file without them means.

    A saved configuration has every key of its time. So its meaning does not change with later defaults, if each new
    key tells how runs were before it.
    """
    values: dict[str, Any] = {}
    for path, field in leaves(cls).items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and ABSENT in extra:
            put(values, path, extra[ABSENT])
    return values


def _absent_in(run: Path) -> Iterator[Layer]:
    """The values of keys that did not exist yet when the run in the folder was begun."""
    path = run / CONFIG_FILE
    if path.is_file():
        written = read_layer(path.name, _read_text(path)).values
        yield Layer(_without(absent_values(RunConfig), written), f"{path} (written before this key existed)")


def _without(values: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    left: dict[str, Any] = {}
    for key, value in values.items():
        if key not in written:
            left[key] = value
        elif isinstance(value, dict):
            left[key] = _without(value, written[key])
    return left


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML in ASCII, sections in their order; it reads back equal."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _with_profile(args: list[str]) -> list[str]:
    """``--profile`` is ``--profile.start 0``, and ``--profile N`` is ``--profile.start N``."""
    out = []
    args = [arg.replace("--profile=", "--profile.start=") if arg.startswith("--profile=") else arg for arg in args]
    for arg, after in zip(args, [*args[1:], ""]):
        out.append(("--profile.start" if after.isdecimal() else "--profile.start=0") if arg == "--profile" else arg)
    return out


def resolve(cls: type[Options], args: list[str], prog: str, below: Below | None = None) -> tuple[RunConfig, Options]:
    """A run's configuration, checked, and the options of ``cls`` that it was resolved from.

    Args:
        below: further layers, over the preset and the file and below the flags.

    Raises:
        ConfigError, OSError: as :func:`load_run_config`.
    """

    def layers(flags: Mapping[str, Any]) -> Iterator[Layer]:
        preset = file = Layer({})
        if flags.get("preset") is not None:
            preset = read_layer(*_preset(flags["preset"]))
        if flags.get("config") is not None:
            path = Path(flags["config"])
            file = read_layer(str(path), _read_text(path))
        yield preset
        runs = (found.get("run") for found in (flags, file.values, preset.values))
        run = next((run for run in runs if isinstance(run, str) and run), RunConfig.model_fields["run"].default)
        yield from _absent_in(Path(run))
        yield file
        init = flags.get("init") or ("model" not in file.values and file.values.get("init"))
        if isinstance(init, str) and init:
            yield _initial_layer(init)
        if below is not None:
            yield from below(flags)

    options = parse_options(cls, _with_profile(args), prog, layers)
    config = RunConfig(**{name: getattr(options, name) for name in RunConfig.model_fields})
    parallel = config.parallel
    world_size = getattr(options, "world_size", None) or parallel.tensor * parallel.pipeline * parallel.context
    data_size = check_run(config, world_size)
    if getattr(options, "world_size", None):
        check_batches(config.train, parallel, data_size)
    return config, options


def _initial_layer(init: str) -> Layer:
    """Shape of the model that a run begins with."""
    path, _ = split_step(init)
    if is_run(path):
        model = load_saved(Path(path) / CONFIG_FILE).model
    else:
        # These import torch; a run's configuration does not.
        from pretrain.config.source_tokens import model_of

        model = model_of(Path(path))
    return Layer({"model": shape_values(model)}, f"init {shorten(init)}")


def _preset(name: str) -> tuple[str, str]:
    """A preset's name for messages and its text."""
    if name not in presets():
        raise ConfigError(f"preset={name}: unknown preset; use {', '.join(presets())}")
    return f"preset {name}", resources.files("pretrain").joinpath("presets", f"{name}.yaml").read_text("utf-8")


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(f"{path}: a folder, not a configuration file")
    try:
        return read_bytes(path, ConfigError, MAX_CHARACTERS).decode("utf-8").removeprefix("\ufeff")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from None


def read_layer(source: str, text: str) -> Layer:
    """The keys of a YAML document of a run's configuration.

    Raises:
        ConfigError: not YAML, an unknown key, or a value where a section is needed.
    """
    try:
        document = load_yaml(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        problem = shorten(problem, 160)
        raise ConfigError(f"{source}:{where} is not YAML: {problem}".replace(":  ", ": ")) from None
    return Layer(_section(RunConfig, document, source, prefix=""), source)


def _section(cls: type[BaseModel], document: Any, source: str, prefix: str) -> dict[str, Any]:
    if document is None:
        return {}
    if not isinstance(document, Mapping):
        where = prefix.rstrip(".")
        found = f"{where}={show(document)}: not a section" if where else "not a configuration"
        raise ConfigError(f"{source}: {found}; write 'key: value' lines{' below it' if where else ''}")
    values: dict[str, Any] = {}
    for key, value in document.items():
        path = f"{prefix}{show(key)}"
        if key not in cls.model_fields:
            known = [*leaves(RunConfig), *RunConfig.model_fields]
            raise ConfigError(f"{source}: {path}: unknown key{did_you_mean(path, known)}")
        section = as_section(cls.model_fields[key])
        values[key] = value if section is None else _section(section, value, source, f"{path}.")
    return values


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error: the first would be lost without a word."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError):  # as in 2020-99-99, or !!int x
            problem = f"{show(node.value)} is not the {node.tag.rpartition(':')[2]} it looks like; put quotes around it"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {show(key)} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)
