"""Plugins: modules named with ``--plugin`` whose import adds entries to registries.

The names travel in the environment variable :data:`VARIABLE`, so that ranks and worker processes that a command starts
load the same plugins. Nothing else names a plugin: a run folder or a data set that mentions one loads nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bd3_common.errors import ConfigError
from bd3_common.text import first_hidden

OPTION = "--plugin"
HELP = "module or .py file that adds to a registry; may be given several times"
VARIABLE = "BD3_PLUGINS"

_loaded: set[str] = set()


def take_option(args: list[str]) -> list[str]:
    """Remove ``--plugin MODULE`` and ``--plugin=MODULE`` from ``args``, load the modules, and return the rest.

    Words after ``--`` belong to another command and are left alone.

    Raises:
        ConfigError: the module's name is missing, or the module cannot be imported.
    """
    end = args.index("--") if "--" in args else len(args)
    rest, names = [], []
    words = iter(args[:end])
    for word in words:
        name, equals, value = word.partition("=")
        if name != OPTION:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("-"):
            raise ConfigError(f"{OPTION}: a value is missing; give a module or a .py file that adds to a registry")
        names.append(value)
    add(names)
    return rest + args[end:]


def add(names: list[str]) -> None:
    """Load plugins, and name them in the environment of processes that this one starts.

    Raises:
        ConfigError: one cannot be imported.
    """
    for name in names:
        if os.pathsep in name or first_hidden(name):
            raise ConfigError(f"{OPTION}={name}: has {os.pathsep!r} or a control character; rename the file")
    # Absolute, because processes may have another working folder.
    names = [str(Path(name).resolve()) if _is_file(name) else name for name in names]
    known = named()
    os.environ[VARIABLE] = os.pathsep.join(known + [name for name in names if name not in known])
    if not os.environ[VARIABLE]:
        del os.environ[VARIABLE]
    load()


def named() -> list[str]:
    """Plugins named so far, on the command line or by the process that started this one."""
    return [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]


def environment() -> dict[str, str]:
    """Environment variable by which another process loads the same plugins; empty without plugins."""
    return {VARIABLE: os.pathsep.join(named())} if named() else {}


def load() -> None:
    """Import the named plugins that are not imported yet.

    Raises:
        ConfigError: one cannot be imported.
    """
    for name in named():
        if name not in _loaded:
            _loaded.add(name)
            try:
                _import(name)
            except Exception as error:
                _loaded.discard(name)
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise ConfigError(
                    f"{OPTION}={name}: cannot be imported ({reason}); give a module or a .py file"
                ) from error


def _is_file(name: str) -> bool:
    return name.endswith(".py")


@contextmanager
def _without_current_folder() -> Iterator[None]:
    """Context in which modules are not imported from the folder one happens to stand in.

    It is first on ``sys.path`` after ``python -m``, not after ``bd3``. Named by PYTHONPATH, it is searched.
    """
    first = sys.path[0] if sys.path else None
    removes = not sys.flags.safe_path and (first == "" or first == os.getcwd())
    if removes:
        del sys.path[0]
        importlib.invalidate_caches()
    try:
        yield
    finally:
        if removes and first is not None:
            sys.path.insert(0, first)


def _import(name: str) -> None:
    if not _is_file(name):
        with _without_current_folder():
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                file = Path(name.replace(".", "/") + ".py")
                if error.name == name and file.is_file():
                    raise ConfigError(
                        f"the current folder is not searched for modules; for its file write {OPTION} ./{file}"
                    ) from None
                raise
        return
    stem = Path(name).stem
    if stem in sys.modules or not stem.isidentifier():
        raise ConfigError(f"{stem!r} is another module's name or none; rename the file")
    spec = importlib.util.spec_from_file_location(stem, name)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{name!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[stem] = module  # its classes can be pickled
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[stem]
        raise
