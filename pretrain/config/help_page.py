"""Help pages, laid out by tyro: options with their types, defaults and the names that registries know."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bd3_common import plugins
from bd3_common.registry import Choice
from pretrain.config.command_line import is_positional
from pretrain.config.values import as_section, show


def print_help(cls: type[BaseModel], prog: str, defaults: BaseModel | None = None) -> None:
    """Print the options of ``cls``.

    Args:
        defaults: values to show as defaults; None shows the class's own.
    """
    page = _dataclass(cls, defaults, plugin=True)
    try:
        tyro.cli(page, prog=prog, args=["--help"], description=_text(cls))
    except SystemExit:
        return


def _dataclass(cls: type[BaseModel], defaults: BaseModel | None, plugin: bool = False) -> type:
    """A dataclass that tyro shows as the options of a pydantic model.

    Built from the fields, because tyro does not know the project's markers, and because a registry's names are not
    known before plugins are loaded.
    """
    fields: list[tuple[str, Any, Any]] = []
    for name, field in cls.model_fields.items():
        value = field.get_default(call_default_factory=True) if defaults is None else getattr(defaults, name)
        if (section := as_section(field)) is not None:
            made = _dataclass(section, value if isinstance(value, BaseModel) else None)
            fields.append((name, made, dataclasses.field(default_factory=made)))
            continue
        kind = _kind(field)
        if is_positional(field):
            kind = tyro.conf.Positional[kind]  # type: ignore[misc, valid-type]
        required = field.is_required() and defaults is None
        described = tyro.conf.arg(
            name=name.rstrip("_").replace("_", "-"),
            help=_description(field),
            metavar=_metavar(kind),
            help_behavior_hint="(required)" if required else f"(default: {show(value)})" if value != () else "",
        )
        fields.append((name, Annotated[kind, described], _field(value, required)))
    if plugin:
        described = tyro.conf.arg(
            name=plugins.OPTION.strip("-"), help=plugins.HELP, metavar="MODULE", help_behavior_hint=""
        )
        fields.append(("plugin", Annotated[str | None, described], None))
    # tyro looks for the source of a class, to read comments beside its fields; a built-in one has none.
    namespace = {"__doc__": _text(cls), "__module__": "builtins"}
    return dataclasses.make_dataclass(cls.__name__, fields, kw_only=True, namespace=namespace)


def _field(value: Any, required: bool) -> Any:
    return dataclasses.field() if required else dataclasses.field(default_factory=lambda: value)


def _choice(field: FieldInfo) -> Choice | None:
    return next((marker for marker in field.metadata if isinstance(marker, Choice)), None)


def _description(field: FieldInfo) -> str:
    """A field's help text, with the summaries of a registry's entries where the field asks for them."""
    choice = _choice(field)
    return ". ".join(filter(None, (field.description, choice.description() if choice else None)))


def _kind(field: FieldInfo) -> Any:
    """A field's type for tyro: names of registries as literals."""
    choice = _choice(field)
    return _with_names(field.annotation) if choice is None else Literal[tuple(choice.names())]


def _with_names(kind: Any) -> Any:
    """The type with every ``Annotated[str, Choice(...)]`` inside it, such as in a tuple, replaced by its names."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        choice = next((marker for marker in inner[1:] if isinstance(marker, Choice)), None)
        return Literal[tuple(choice.names())] if choice is not None else _with_names(inner[0])
    if origin is None or origin is Literal:
        return kind
    changed = tuple(each if each is Ellipsis else _with_names(each) for each in inner)
    if origin in (types.UnionType, typing.Union):
        return typing.Union[changed]  # noqa: UP007
    return origin[changed]


def _metavar(kind: Any) -> str | None:
    """Placeholder of a nullable value, without null: the description says what null means."""
    if get_origin(kind) is Annotated or get_origin(kind) not in (types.UnionType, typing.Union):
        return None
    kinds = [each for each in get_args(kind) if each is not type(None)]
    if len(kinds) != 1:
        return None
    (inner,) = kinds
    while get_origin(inner) is Annotated:
        inner = get_args(inner)[0]
    if get_origin(inner) is Literal:
        return "{" + ",".join(map(str, get_args(inner))) + "}"
    if get_origin(inner) in (tuple, list):
        item = _metavar(get_args(inner)[0] | None)
        return item and f"[{item} ...]"
    return inner.__name__.upper() if inner in (int, float, str) else None


def _text(cls: type[BaseModel]) -> str:
    return inspect.cleandoc(cls.__doc__ or "")
