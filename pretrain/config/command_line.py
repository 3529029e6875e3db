"""Command-line options from pydantic models: tyro parses and prints help, mistakes become one line.

Flags are the dotted paths of the fields (``--model.kv-heads 4``; hyphens and underscores are the same). tyro
answers a mistake with a box and ends the process, so the arguments are read here first: that pass knows every
flag, its number of values and its type, and raises :class:`ConfigError` with the path, the value and the
remedy. What reaches tyro is already well formed.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from bd3_common.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

HELP = ("-h", "--help")
NULL = ("null", "none")
SWITCH = {"true": True, "false": False}


def parse_options(cls: type[Model], args: list[str], prog: str, default: Model | None = None) -> Model:
    """Parse command-line arguments into ``cls``, a pydantic model that may nest others.

    Args:
        args: arguments without the program's name.
        prog: how the usage line calls the program, for example ``bd3 pretrain``.
        default: values of the options not given; it need not be valid by itself (see :func:`unchecked`).

    Raises:
        ConfigError: one line for the first mistake found.
        SystemExit: with code 0, after ``--help`` was printed.
    """
    import tyro

    if any(arg in HELP for arg in args):
        tyro.cli(cls, prog=prog, args=["--help"], default=default)
    given = scan_options(cls, args)
    if default is None:
        _check_positionals(cls, given, prog)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return tyro.cli(cls, prog=prog, args=_canonical(cls, given), default=default)
    except (SystemExit, ValidationError):
        values = default.model_dump() if default is not None else {}
        for path, words in given.items():
            put(values, path, _convert(cls, path, words))
        validate(cls, values)
        text = " ".join(re.sub(r"[^\x20-\x7e]", " ", output.getvalue()).split())  # tyro alone objects: show its words
        raise ConfigError(text or "the options cannot be used together") from None


def scan_options(cls: type[BaseModel], args: Iterable[str]) -> dict[str, list[str]]:
    """Words of each option, the last mention wins: ``["--model.layers", "4"] -> {"model.layers": ["4"]}``.

    A switch carries ``true`` or ``false``; words that belong to no flag go to the positional field.

    Raises:
        ConfigError: an unknown flag, a flag without its value, a value of the wrong type or a word too many.
    """
    fields = leaves(cls)
    names = {_flag(path): path for path in fields}
    negations = {_negation(path): path for path, field in fields.items() if _is_switch(field)}
    rest = [arg for arg in args if arg not in HELP]
    given: dict[str, list[str]] = {}
    loose: list[str] = []
    while rest:
        word = rest.pop(0)
        if not _is_flag(word):
            loose.append(word)
            continue
        flag, (_, equals, value) = _name(word), word.partition("=")
        if flag in negations and not equals:
            given[negations[flag]] = ["false"]
        elif flag in names:
            path = names[flag]
            given[path] = [value] if equals else _take(fields[path], rest)
            if not given[path] and _kind(fields[path]) is None and rest and _name(rest[0]) not in {*names, *negations}:
                raise ConfigError(
                    f"{flag}: a value is missing; one that begins with - is written {flag}={show(rest[0])}"
                )
            _convert(cls, path, given[path])
        else:
            raise ConfigError(
                f"{show(word.partition('=')[0])}: unknown option{did_you_mean(flag, [*names, *negations])}"
            )
    if loose:
        _place(cls, loose, given)
    return given


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
    """The nested model a field holds, or None for a plain value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def check_value(path: str, field: FieldInfo, value: Any) -> Any:
    """Convert one value to its field's type (``"3e-4" -> 0.0003``) and check its bounds.

    Raises:
        ConfigError: ``path=value: what is wrong``.
    """
    if isinstance(value, bool) and bool not in (field.annotation, *get_args(field.annotation)):
        raise ConfigError(f"{path}={show(value)}: a value is needed here, not true or false")
    adapter = TypeAdapter(Annotated[field.annotation, field], config={"allow_inf_nan": False})
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{path}={show(value)}: {_remedy(error.errors()[0])}") from None


def validate(cls: type[Model], values: Mapping[str, Any]) -> Model:
    """``cls.model_validate(values)`` with the first mistake as one line.

    Raises:
        ConfigError: a validator's own text, or the path, the value and what is wrong with it.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":
        raise ConfigError(str(first["ctx"]["error"]))
    if first["type"] == "missing":
        raise ConfigError(f"{_flag(path)}: required")
    if first["type"] == "extra_forbidden":
        raise ConfigError(f"{path}: unknown key{did_you_mean(path, leaves(cls))}")
    raise ConfigError(f"{path}={show(first['input'])}: {_remedy(first)}")


def unchecked(cls: type[Model], values: Mapping[str, Any]) -> Model:
    """An instance of ``cls`` from nested ``values`` without validation.

    A file may set ``model.hidden`` and leave the fitting ``model.heads`` to a flag: only the sum of all
    layers has to be valid, so what lies under the flags is not checked as a whole.
    """
    made = {}
    for name, value in values.items():
        section = as_section(cls.model_fields[name])
        made[name] = unchecked(section, value) if section is not None else value
    return cls.model_construct(**made)


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set ``values["a"]["b"]`` for the path ``a.b``."""
    *sections, name = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


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
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = " ".join(map(str, value) if isinstance(value, list | tuple) else str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _flag(path: str) -> str:
    # A trailing underscore keeps a field's name off pydantic's own methods: json_ is --json.
    return "--" + path.rstrip("_").replace("_", "-")


def _name(word: str) -> str:
    """The flag in ``--model.kv_heads=4``, as :func:`_flag` writes it."""
    return word.partition("=")[0].replace("_", "-")


def _negation(path: str) -> str:
    section, dot, name = path.rpartition(".")
    return _flag(f"{section}{dot}no-{name}")


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and not re.match(r"-\.?\d", word)


def _is_switch(field: FieldInfo) -> bool:
    return field.annotation is bool


def _is_positional(field: FieldInfo) -> bool:
    import tyro

    return any(marker is tyro.conf.Positional for marker in field.metadata)


def _kind(field: FieldInfo) -> Any:
    """The container a field is: list, tuple, dict, or None for a single value; ``| None`` does not matter."""
    options = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    kind = options[0] if _takes_null(field) and len(options) == 1 else field.annotation
    origin = get_origin(kind) or kind
    return origin if origin in (list, tuple, dict, set, frozenset) else None


def _takes_null(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is not typing.Literal and type(None) in get_args(field.annotation)


def _take(field: FieldInfo, rest: list[str]) -> list[str]:
    """Remove a flag's words from the front of ``rest`` and return them."""
    if _is_switch(field):
        return [rest.pop(0).lower()] if rest and rest[0].lower() in SWITCH else ["true"]
    taken: list[str] = []
    while rest and not _is_flag(rest[0]) and (_kind(field) is not None or not taken):
        taken.append(rest.pop(0))
    return taken


def _convert(cls: type[BaseModel], path: str, words: list[str]) -> Any:
    """The value that an option's words stand for."""
    field = leaves(cls)[path]
    kind = _kind(field)
    if not words and kind is None:
        raise ConfigError(f"{_flag(path)}: a value is missing")
    if _takes_null(field) and len(words) == 1 and words[0].lower() in NULL:
        return None
    if kind is dict:
        if len(words) % 2:
            raise ConfigError(f"{path}={show(' '.join(words))}: keys and values come in pairs")
        return check_value(path, field, dict(zip(words[::2], words[1::2])))
    return check_value(path, field, words[0] if kind is None else words)


def _place(cls: type[BaseModel], loose: list[str], given: dict[str, list[str]]) -> None:
    """Give the words that belong to no flag to the positional fields, in order; a list takes all that is left."""
    fields = leaves(cls)
    for path in (path for path, field in fields.items() if _is_positional(field)):
        words, loose = (loose[:1], loose[1:]) if _kind(fields[path]) is None else (loose, [])
        if words:
            given[path] = words
            _convert(cls, path, words)
    if loose:
        name, equals, value = loose[0].partition("=")
        known = equals and name.replace("-", "_") in fields
        raise ConfigError(
            f"{show(loose[0])}: unexpected argument" + (f"; did you mean {_flag(name)} {value}?" if known else "")
        )


def _check_positionals(cls: type[BaseModel], given: Mapping[str, list[str]], prog: str) -> None:
    """Refuse a command line without its positional words and show how the command is called."""
    required = {path: field for path, field in leaves(cls).items() if field.is_required()}
    missing = [path for path, field in required.items() if _is_positional(field) and path not in given]
    if missing:
        words = [prog]
        for path, field in required.items():
            words += [] if _is_positional(field) else [_flag(path)]
            words.append(path.upper() + ("..." if _kind(field) else ""))
        raise ConfigError(f"{missing[0].upper()} is missing; usage: {' '.join(words)} [OPTIONS]")


def _canonical(cls: type[BaseModel], given: Mapping[str, list[str]]) -> list[str]:
    """The arguments as tyro wants them: positionals first, switches by name, ``None`` for null, 4 for 4.0."""
    fields = leaves(cls)
    first: list[str] = []
    flags: list[str] = []
    for path, words in sorted(given.items(), key=lambda item: list(fields).index(item[0])):
        field = fields[path]
        value = _convert(cls, path, words)
        if isinstance(value, list | tuple):
            words = [str(item) for item in value]
        elif not isinstance(value, dict | set | frozenset):
            words = [str(value)]
        if _is_positional(field):
            first += words
        elif _is_switch(field):
            flags.append(_flag(path) if value else _negation(path))
        elif _kind(field) is None:
            flags.append(f"{_flag(path)}={words[0]}")
        else:
            flags += [_flag(path), *words]
    return first + flags


def _remedy(error: Mapping[str, Any]) -> str:
    """What is wrong with one value, from a pydantic error record."""
    kind, context = error["type"], error.get("ctx", {})
    sentences = {
        "greater_than_equal": "use {ge:g} or more",
        "greater_than": "use a value above {gt:g}",
        "less_than_equal": "use {le:g} or less",
        "less_than": "use a value below {lt:g}",
        "literal_error": "use {expected}",
        "finite_number": "not a finite number",
        "string_type": "a text is needed" if error["input"] is None else "not a text; put quotes around it",
        "too_short": "give at least {min_length}",
        "value_error": "{error}",
    }
    if kind in sentences:
        return sentences[kind].format(**context).replace("'", "")
    for prefix, word in (("int_", "an integer"), ("float_", "a number"), ("bool_", "true or false")):
        if kind.startswith(prefix):
            return f"not {word}"
    return error["msg"][0].lower() + error["msg"][1:]
