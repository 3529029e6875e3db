"""Command-line options of pydantic models: words become one nested dict, which is validated once.

Flags are the dotted paths of the fields (``--model.kv-heads 4``; hyphens and underscores are the same). The scan knows
every flag and its number of values; a mistake raises :class:`ConfigError` with the flag or path, the value and the
remedy. tyro prints ``--help`` (:mod:`pretrain.config.help_page`) and reads nothing.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bd3_common.errors import ConfigError
from bd3_common.text import is_unicode
from pretrain.config.values import Layer, Model, build, did_you_mean, flag, leaves, put, show

T = TypeVar("T")
_POSITIONAL = "positional"
Positional = Annotated[T, _POSITIONAL]
"""Type of a field that takes words without a flag: ``inputs: Positional[tuple[str, ...]]``"""

HELP = ("-h", "--help")
NULL = ("null", "none")
SWITCH = {"true": True, "false": False}

Below = Callable[[Mapping[str, Any]], Iterable[Layer]]
"""Function from the flags to the layers that they win over, lowest first: a preset, a file"""


def parse_options(cls: type[Model], args: list[str], prog: str, below: Below | None = None) -> Model:
    """Parse command-line arguments into ``cls``, a pydantic model that may nest others.

    Args:
        args: arguments without the program's name.
        prog: how the usage line calls the program, for example ``bd3 pretrain``.
        below: layers between the defaults and the flags.

    Raises:
        ConfigError: one line for the first mistake found.
        SystemExit: with code 0, after ``--help`` was printed.
    """
    if any(arg in HELP for arg in args):
        from pretrain.config.help_page import print_help

        print_help(cls, prog, _defaults(cls, args, below))
        raise SystemExit(0)
    given = scan_options(cls, args)
    flags = option_values(cls, given)
    layers = [*(below(flags) if below is not None else ()), Layer(flags)]
    _check_positionals(cls, {name for layer in layers for name in layer.values}, prog)
    return build(cls, layers)


def scan_options(cls: type[BaseModel], args: Iterable[str]) -> dict[str, list[str]]:
    """Words of each option, the last mention wins: ``["--model.layers", "4"] -> {"model.layers": ["4"]}``.

    A switch carries ``true`` or ``false``; words that belong to no flag go to the positional field.

    Raises:
        ConfigError: an unknown flag, a flag without its value, or a word too many.
    """
    fields = leaves(cls)
    names = {flag(path): path for path in fields}
    negations = {_negation(path): path for path, field in fields.items() if is_switch(field)}
    rest = [arg for arg in args if arg not in HELP]
    given: dict[str, list[str]] = {}
    loose: list[str] = []
    while rest:
        word = rest.pop(0)
        if not _is_flag(word):
            loose.append(word)
            continue
        name, (_, equals, value) = _name(word), word.partition("=")
        if name in negations and not equals:
            given[negations[name]] = ["false"]
        elif name in names:
            path = names[name]
            given[path] = [value] if equals else _take(fields[path], rest)
            if not given[path] and container(fields[path]) is None:
                if rest and _name(rest[0]) not in {*names, *negations}:
                    raise ConfigError(
                        f"{name}: a value is missing; one that begins with - is written {name}={show(rest[0])}"
                    )
                raise ConfigError(f"{name}: a value is missing")
        else:
            raise ConfigError(
                f"{show(word.partition('=')[0])}: unknown option{did_you_mean(name, [*names, *negations])}"
            )
    if loose:
        _place(cls, loose, given)
    return given


def option_values(cls: type[BaseModel], given: Mapping[str, list[str]]) -> dict[str, Any]:
    """Nested values that options' words stand for; numbers stay text, which validation converts.

    Args:
        given: words by dotted path, as :func:`scan_options` returns them.

    Raises:
        ConfigError: a key without its value.
    """
    fields = leaves(cls)
    values: dict[str, Any] = {}
    for path, words in given.items():
        put(values, path, _value(path, fields[path], words))
    return values


def is_positional(field: FieldInfo) -> bool:
    """True if the field takes words without a flag."""
    return _POSITIONAL in field.metadata


def is_switch(field: FieldInfo) -> bool:
    """True if the field is a flag that needs no value: ``--x`` and ``--no-x``."""
    return field.annotation is bool


def container(field: FieldInfo) -> Any:
    """The container a field is: list, tuple, dict, or None for a single value; ``| None`` does not matter."""
    options = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    kind = options[0] if takes_null(field) and len(options) == 1 else field.annotation
    origin = get_origin(kind) or kind
    return origin if origin in (list, tuple, dict, set, frozenset) else None


def takes_null(field: FieldInfo) -> bool:
    """True if the field may be null."""
    return get_origin(field.annotation) is not typing.Literal and type(None) in get_args(field.annotation)


def _defaults(cls: type[Model], args: list[str], below: Below | None) -> Model | None:
    """The values that ``--help`` shows beside the other options; None if they do not make a whole."""
    try:
        flags = option_values(cls, scan_options(cls, args))
        return build(cls, [*(below(flags) if below is not None else ()), Layer(flags)])
    except (ConfigError, OSError):
        return None


def _name(word: str) -> str:
    """The flag in ``--model.kv_heads=4``, as :func:`flag` writes it."""
    return word.partition("=")[0].replace("_", "-")


def _negation(path: str) -> str:
    section, dot, name = path.rpartition(".")
    return flag(f"{section}{dot}no-{name}")


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and not re.match(r"-\.?\d", word)


def _take(field: FieldInfo, rest: list[str]) -> list[str]:
    """Remove a flag's words from the front of ``rest`` and return them."""
    if is_switch(field):
        return [rest.pop(0).lower()] if rest and rest[0].lower() in SWITCH else ["true"]
    taken: list[str] = []
    while rest and not _is_flag(rest[0]) and (container(field) is not None or not taken):
        taken.append(rest.pop(0))
    return taken


def _value(path: str, field: FieldInfo, words: list[str]) -> Any:
    kind = container(field)
    if takes_null(field) and len(words) == 1 and words[0].lower() in NULL:
        return None
    name = path.upper() if is_positional(field) else flag(path)
    if "" in words and (kind is None or is_positional(field)) and field.default != "":
        raise ConfigError(f"{name}: empty; give a value" + (", or null" if takes_null(field) else ""))
    for word in words:
        if not (is_unicode(word) or os.path.lexists(word)):  # names of files may be in another encoding
            raise ConfigError(f"{name}={show(word)}: is not UTF-8; write it in UTF-8")
    if kind is dict:
        if len(words) % 2:
            raise ConfigError(f"{path}={show(' '.join(words))}: keys and values come in pairs")
        return dict(zip(words[::2], words[1::2]))
    if kind is not None:
        return words
    return SWITCH.get(words[0].lower(), words[0]) if is_switch(field) else words[0]


def _place(cls: type[BaseModel], loose: list[str], given: dict[str, list[str]]) -> None:
    """Give the words that belong to no flag to the positional fields, in order; a list takes all that is left."""
    fields = leaves(cls)
    for path in (path for path, field in fields.items() if is_positional(field)):
        words, loose = (loose[:1], loose[1:]) if container(fields[path]) is None else (loose, [])
        if words:
            given[path] = words
    if loose:
        name, equals, value = loose[0].partition("=")
        known = equals and name.replace("-", "_") in fields
        raise ConfigError(
            f"{show(loose[0])}: unexpected argument; "
            + (f"did you mean {flag(name)} {value}?" if known else "leave it out, or name its option (see --help)")
        )


def _check_positionals(cls: type[BaseModel], given: Collection[str], prog: str) -> None:
    """Refuse a command line without its positional words and show how the command is called."""
    required = {path: field for path, field in leaves(cls).items() if field.is_required()}
    missing = [path for path, field in required.items() if is_positional(field) and path not in given]
    if missing:
        words = [prog]
        for path, field in required.items():
            words += [] if is_positional(field) else [flag(path)]
            words.append(path.upper() + ("..." if container(field) else ""))
        raise ConfigError(f"{missing[0].upper()} is missing; usage: {' '.join(words)} [OPTIONS]")
