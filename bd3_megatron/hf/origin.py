"""What a run keeps of the checkpoint it was imported from, for an export in the same format.

A run has the rows of its own tokens and the mask, the usual keys, and a ``tokenizer.json``. The rest stands in a file
of the run folder: rows of padding, keys of ``config.json`` that decide nothing here, small text files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bd3_common import schema
from bd3_common.errors import ConfigError
from bd3_common.formats.tensor_writer import write_tensors
from bd3_common.schema import Record
from bd3_megatron.hf.files import MAX_JSON, bytes_of, read_safetensors, tensor_entry

_KEY = "origin"
TEXT_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
"""files of a Hugging Face folder that an export in the same format gets again"""
_MAX_TEXT = 4 << 20


class _Header(Record):
    format: str
    config: dict[str, Any]
    files: dict[str, str]


@dataclass(frozen=True)
class Origin:
    """Parts of an imported checkpoint.

    Attributes:
        format: name of its format.
        config: its ``config.json``.
        tensors: by names of the format's own.
        files: texts of its files by name, among :data:`TEXT_FILES`.
    """

    format: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def text_files(folder: Path) -> dict[str, str]:
    """Texts of a folder's :data:`TEXT_FILES`; one that is too long or no UTF-8 is left out."""
    found = {}
    for name in TEXT_FILES:
        path = folder / name
        if path.is_file() and path.stat().st_size <= _MAX_TEXT:
            try:
                found[name] = path.read_text("utf-8")
            except UnicodeDecodeError:
                continue
    return found


def write_origin(path: Path, origin: Origin) -> None:
    """Write the file.

    Raises:
        OSError: it cannot be written.
    """
    header = {"format": origin.format, "config": dict(origin.config), "files": dict(origin.files)}
    entries = [tensor_entry(name, tensor) for name, tensor in origin.tensors.items()]
    write_tensors(path, entries, map(bytes_of, origin.tensors.values()), {_KEY: json.dumps(header)})


def read_origin(path: Path) -> Origin | None:
    """The file's content; None if there is no such file.

    Raises:
        ConfigError: it is damaged.
    """
    if not path.is_file():
        return None
    tensors, metadata = read_safetensors(path)
    text = metadata.get(_KEY, "").encode()
    if len(text) > MAX_JSON:
        raise ConfigError(f"{path}: its header has {len(text)} bytes; import the checkpoint again")
    header = schema.check(
        schema.parse(text, dict[str, Any], path, error=ConfigError), _Header, str(path), error=ConfigError
    )
    files = {name: text for name, text in header.files.items() if name in TEXT_FILES}
    return Origin(header.format, header.config, tensors, files)
