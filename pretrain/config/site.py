"""Site files: a cluster's defaults for `bd3 launch`, as a layer below the flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from bd3_common.errors import ConfigError
from bd3_common.schema import read_bytes
from bd3_common.text import shorten
from pretrain.config.command_line import container, option_values
from pretrain.config.values import Layer, did_you_mean, leaves, show
from pretrain.config.yaml_text import MAX_CHARACTERS, load_yaml


def site_layer(path: str, cls: type[BaseModel]) -> Layer:
    """The options in a site file.

    Args:
        cls: model of the options that the file may have.

    Raises:
        ConfigError: one line: the file cannot be read, or an option is unknown.
    """
    try:
        # Values stay as they are written: YAML reads 1:30:00 as 5400, and yes as a truth.
        text = read_bytes(Path(path), ConfigError, MAX_CHARACTERS).decode("utf-8")
        document = load_yaml(text, yaml.BaseLoader)
    except FileNotFoundError:
        raise ConfigError(f"site={path}: no such file; give a YAML file with options of the job") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"site={path}: cannot be read ({shorten(' '.join(str(error).split()), 100)})") from None
    if not isinstance(document, dict):
        raise ConfigError(f"site={path}: not options; write 'partition: gpu' lines")
    given = {key: words for key, value in document.items() if (words := _words(path, cls, key, value)) is not None}
    return Layer(option_values(cls, given), f"site={path}")


def _words(path: str, cls: type[BaseModel], key: str, value: Any) -> list[str] | None:
    """The words that a flag would have; None for null."""
    if key not in leaves(cls):
        raise ConfigError(f"site={path}: {show(key)}: unknown option{did_you_mean(str(key), leaves(cls))}")
    if isinstance(value, str):
        return [value] if value and value.lower() not in ("null", "~") else None
    words = [word for pair in value.items() for word in pair] if isinstance(value, Mapping) else list(value)
    if not all(isinstance(word, str) for word in words):
        raise ConfigError(f"site={path}: {key}: a list in a list; write plain values")
    if container(leaves(cls)[key]) is None and len(words) != 1:
        raise ConfigError(f"site={path}: {key}: {len(words)} values; write one")
    return words
