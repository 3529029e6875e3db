"""Nested dicts of configuration values: where each came from, and one validation that makes the object.

A mistake becomes one line with the dotted path, the value and the remedy; if the value came from a file, the line
begins with the file's name.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bd3_common.errors import ConfigError
from bd3_common.text import shorten

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Layer:
    """Values of one source, which win over those of the layers below.

    Attributes:
        values: nested dict; sections and keys exist, the values are not validated.
        source: name of the file or preset for messages; empty for flags.
    """

    values: Mapping[str, Any]
    source: str = ""


def build(cls: type[Model], layers: Iterable[Layer]) -> Model:
    """Merge layers, the last of which wins, and validate the sum once.

    Raises:
        ConfigError: one line for the first mistake.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        for path, value in _paths(cls, layer.values):
            put(values, path, value)
            sources[path] = layer.source
    return validate(cls, values, sources)


def validate(cls: type[Model], values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> Model:
    """``cls.model_validate(values)`` with the first mistake as one line.

    Args:
        sources: file or preset that each dotted path came from, for messages.

    Raises:
        ConfigError: a validator's own text, or the path, the value and what is wrong with it.
    """
    fields = leaves(cls)
    _refuse_truths(fields, values, sources or {})
    try:
        found = cls.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    else:
        _refuse_huge(fields, found, sources or {})
        return found
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":
        raise ConfigError(_with_short_values(str(first["ctx"]["error"]), values))
    if first["type"] == "missing":
        raise ConfigError(f"{flag(path)}: required")
    if first["type"] == "extra_forbidden":
        raise ConfigError(f"{path}: unknown key{did_you_mean(path, fields)}")
    # A list's mistake lies at one of its items: the line names the key and shows the whole list.
    leaf = next((name for name in fields if path.startswith(f"{name}.")), path)
    value = first["input"] if leaf == path else _get(values, leaf)
    raise ConfigError(_mistake(leaf, value, _remedy(first), sources or {}))


def leaves(cls: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Fields by dotted path, those of nested sections included: ``{"model.layers": FieldInfo, ...}``."""
    found: dict[str, FieldInfo] = {}
    for name, field in cls.model_fields.items():
        if (section := as_section(field)) is not None:
            found |= leaves(section, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def as_section(field: FieldInfo) -> type[BaseModel] | None:
    """The nested model a field has, or None for a plain value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set ``values["a"]["b"]`` for the path ``a.b``."""
    *sections, name = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def flag(path: str) -> str:
    """The flag of a field: ``model.kv_heads -> --model.kv-heads``."""
    # A trailing underscore keeps a field's name off pydantic's own methods: json_ is --json.
    return "--" + path.rstrip("_").replace("_", "-")


_LONGEST = 1000  # characters of a value that a validator may quote whole, as a path


def _with_short_values(text: str, values: Any) -> str:
    """The message of a validator, in which a long value that was given is cut off."""
    if isinstance(values, str):
        return text.replace(values, show(values)) if len(values) > _LONGEST else text
    inner = [*values, *values.values()] if isinstance(values, Mapping) else values
    if isinstance(inner, list | tuple | set):
        for value in inner:
            text = _with_short_values(text, value)
    return text


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"``, where X is the near one of ``known``; empty where none is near."""
    known = list(known)
    tails = {path.rpartition(".")[2].lstrip("-"): path for path in reversed(known)}
    tail = name.rpartition(".")[2].lstrip("-")
    if tail in tails:  # the section was forgotten or is wrong: --layers, model.lr
        return f"; did you mean {tails[tail]}?"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    near = near or [tails[found] for found in difflib.get_close_matches(tail, tails, n=1, cutoff=0.75)]
    return f"; did you mean {near[0]}?" if near else ""


def show(value: Any) -> str:
    """A value as the user would write it, on one line and not too long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        text = " ".join(map(_word, value[:60]))
    else:
        text = " ".join(_word(value).split())
    return shorten(text)


class _Brief(reprlib.Repr):
    """Values within bounds of length and depth: aliases of YAML can make them larger than memory when spelled out."""

    maxlevel, maxstring = 3, 60

    def repr_int(self, x: int, level: int) -> str:
        return shorten(x)


def _word(value: Any) -> str:
    return value[:200] if isinstance(value, str) else _BRIEF.repr(value)


_BRIEF = _Brief()


def _paths(cls: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted paths of fields with their values."""
    for name, value in values.items():
        section = as_section(cls.model_fields[name]) if name in cls.model_fields else None
        if section is not None and isinstance(value, Mapping):
            yield from _paths(section, value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _get(values: Any, path: str) -> Any:
    for name in path.split("."):
        values = values[name] if isinstance(values, Mapping) else getattr(values, name)
    return values


def _refuse_truths(fields: Mapping[str, FieldInfo], values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Refuse true and false where a number is needed: pydantic would read them as 1 and 0."""
    for path in sources:
        value = _get(values, path)
        field = fields.get(path)
        if (
            isinstance(value, bool)
            and field is not None
            and bool not in (field.annotation, *get_args(field.annotation))
        ):
            raise ConfigError(_mistake(path, value, "a value is needed here, not true or false", sources))


def _refuse_huge(fields: Mapping[str, FieldInfo], model: BaseModel, sources: Mapping[str, str]) -> None:
    """Refuse integers beyond 64 bits, which arrays and files cannot hold."""
    for path in fields:
        value = _get(model, path)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise ConfigError(_mistake(path, value, "an integer of more than 64 bits", sources))


def _mistake(path: str, value: Any, remedy: str, sources: Mapping[str, str]) -> str:
    source = sources.get(path, "")
    return f"{source}{': ' if source else ''}{path}={show(value)}: {remedy}"


def _remedy(error: Mapping[str, Any]) -> str:
    """The mistake in one value, from a pydantic error record."""
    kind, context = error["type"], error.get("ctx", {})
    sentences = {
        "greater_than_equal": "use {ge:.12g} or more",
        "greater_than": "use a value above {gt:.12g}",
        "less_than_equal": "use {le:.12g} or less",
        "less_than": "use a value below {lt:.12g}",
        "literal_error": "use {expected}",
        "finite_number": "not a finite number",
        "string_type": "a text is needed" if error["input"] is None else "not a text; put quotes around it",
        "too_short": "give at least {min_length}",
    }
    if kind in sentences:
        return sentences[kind].format(**context).replace("'", "")
    for prefix, word in (("int_", "an integer"), ("float_", "a number"), ("bool_", "true or false")):
        if kind.startswith(prefix):
            return f"not {word}"
    message: str = error["msg"]
    return message[0].lower() + message[1:]
