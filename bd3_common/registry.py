"""Registries: names that users choose from, each of a class that is imported on first use.

Entries have three sources. A file in the registry's own folder is an entry under the file's name: it holds one
subclass of the registry's base class, and the first line of its docstring is the summary. An installed distribution
adds entries by entry points. A plugin (:mod:`bd3_common.plugins`) calls :meth:`Registry.add`. Listing names and
summaries of a folder reads its files without importing them.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from bd3_common import plugins
from bd3_common.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """An entry: its name, the path of its class (``module:Class``), and a summary of one line."""

    name: str
    target: str
    summary: str = ""
    distribution: str | None = None
    """installed distribution that adds it by an entry point"""


class Registry(Generic[T]):
    """Names of one kind, for example of noise schedules, and the classes they stand for.

    Args:
        base: class that every entry's class derives from, defined in the ``__init__`` of the package whose modules
            are the built-in entries. A module's name is the entry's name; names that begin with ``_`` are no entries.
        kind: what one entry is called in messages, for example ``noise schedule``.
        key: the configuration key or option that takes a name, for example ``diffusion.schedule``.
        group: group of entry points of other distributions, for example ``bd3_megatron.schedules``.
    """

    def __init__(self, base: type[T], kind: str, key: str, group: str):
        self.base, self.kind, self.key, self.group = base, kind, key, group
        self._instances: dict[str, T] = {}
        self._added: dict[str, tuple[Entry, type[T] | None]] = {}
        self._found: dict[str, Entry] | None = None
        self._installed: dict[str, Entry] | None = None
        self._warned: set[str] = set()

    def add(self, name: str, target: type[T] | str, summary: str = "") -> None:
        """Add an entry from a plugin.

        Args:
            target: the class, or ``module:Class`` to import it when it is used.
            summary: one line for help texts; by default the first line of the class's docstring.

        Raises:
            ConfigError: the name is taken.
        """
        if name in self._entries():
            raise ConfigError(f"{self.kind} {name}: there is one of this name already; choose another")
        if isinstance(target, str):
            self._added[name] = Entry(name, target, summary), None
        else:
            summary = summary or _first_line(target.__doc__)
            self._added[name] = Entry(name, f"{target.__module__}:{target.__qualname__}", summary), target

    def names(self) -> list[str]:
        """All names: built-in ones sorted, then those of other distributions, then those of plugins."""
        return list(self._entries())

    def entries(self) -> list[Entry]:
        """All entries, in the order of :meth:`names`."""
        return list(self._entries().values())

    def check(self, name: str) -> str:
        """``name``, if it is an entry.

        Raises:
            ConfigError: unknown name; the line lists the known ones.
        """
        if name not in self._entries():
            raise ConfigError(f"{self.key}={name}: {self.remedy(name)}")
        return name

    def remedy(self, name: str, also: tuple[str, ...] = ()) -> str:
        """Error message for an unknown name: the mistake and the remedy, without the key."""
        known = [*also, *self.names()]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        return (
            f"unknown {self.kind}; {hint}use {', '.join(known)}, or name the module that adds it with {plugins.OPTION}"
        )

    def load(self, name: str) -> type[T]:
        """The class of an entry.

        Raises:
            ConfigError: unknown name, or a class that does not derive from the base class.
        """
        self.check(name)
        added = self._added.get(name)
        if added is not None and added[1] is not None:
            found = added[1]
        else:
            found = self._import(self._entries()[name])
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise ConfigError(f"{self.kind} {name}: {found!r} does not derive from {self._base_name}")
        return found

    def load_all(self) -> dict[str, type[T]]:
        """Classes of all entries by name, without those of installed distributions that cannot be imported.

        A warning names each of the latter: a package that needs a GPU, say, must not stop what does not use it.
        """
        found: dict[str, type[T]] = {}
        for entry in self.entries():
            try:
                found[entry.name] = self.load(entry.name)
            except ConfigError as error:
                if entry.distribution is None:
                    raise
                if entry.name not in self._warned:
                    self._warned.add(entry.name)
                    logging.getLogger(__name__).warning("%s; it is left out", error)
        return found

    def instance(self, name: str) -> T:
        """The shared instance of an entry whose class takes no arguments.

        Raises:
            ConfigError: see :meth:`load`.
        """
        if name not in self._instances:
            self._instances[name] = self.load(name)()
        return self._instances[name]

    @property
    def _base_name(self) -> str:
        return f"{self.base.__module__}:{self.base.__qualname__}"

    def _entries(self) -> dict[str, Entry]:
        plugins.load()
        if self._installed is None:  # reading the metadata of all distributions takes milliseconds
            self._installed = {}
            for point in entry_points(group=self.group):
                distribution = point.dist.name if point.dist is not None else "unknown"
                if point.name in self._built_in() or point.name in self._installed:
                    logging.getLogger(__name__).warning(
                        "%s %s of the distribution %s is not used: there is one of this name already",
                        self.kind,
                        point.name,
                        distribution,
                    )
                else:
                    self._installed[point.name] = Entry(point.name, point.value, distribution=distribution)
        return self._built_in() | self._installed | {name: entry for name, (entry, _) in self._added.items()}

    def _built_in(self) -> dict[str, Entry]:
        if self._found is None:
            self._found = {entry.name: entry for entry in _modules(self.base.__module__)}
        return self._found

    def _import(self, entry: Entry) -> Any:
        module_name, _, name = entry.target.partition(":")
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            if not isinstance(error, ImportError) and entry.distribution is None:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            remedy = f"; mend or uninstall the distribution {entry.distribution}" if entry.distribution else ""
            raise ConfigError(
                f"{self.kind} {entry.name}: {module_name} cannot be imported ({reason}){remedy}"
            ) from error
        if name:
            try:
                return getattr(module, name)
            except AttributeError:
                raise ConfigError(f"{self.kind} {entry.name}: {module_name} has no {name}") from None
        classes = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, self.base)
            and value.__module__ == module_name
            and not value.__name__.startswith("_")
        ]
        if len(classes) != 1:
            raise TypeError(f"{module_name} must hold one public subclass of {self._base_name}; it has {len(classes)}")
        return classes[0]


@dataclass(frozen=True)
class Choice:
    """Annotation of a pydantic field that takes a name of a registry: ``Annotated[str, Choice(SCHEDULES)]``.

    Help texts list :meth:`names` when they are printed, plugins included.
    """

    registry: Registry[Any] | str
    """the registry, or ``module:NAME`` of one that the configuration must not import"""
    also: tuple[str, ...] = ()
    """values allowed besides the registry's names, for example ``auto``"""
    summaries: bool = False
    """True: help texts include the summary of each entry"""

    def description(self) -> str:
        """The entries with their summaries, for help texts; empty unless ``summaries``."""
        if not self.summaries:
            return ""
        return "; ".join(f"{e.name}: {e.summary}" if e.summary else e.name for e in self._found().entries())

    def names(self) -> list[str]:
        """Allowed values of the field, those of ``also`` first."""
        return [*self.also, *self._found().names()]

    def _found(self) -> Registry[Any]:
        if isinstance(self.registry, Registry):
            return self.registry
        module, _, name = self.registry.partition(":")
        found: Registry[Any] = getattr(importlib.import_module(module), name)
        return found

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self._validate, handler(source))

    def _validate(self, value: str) -> str:
        if value not in self.names():
            from pydantic_core import PydanticCustomError

            raise PydanticCustomError("unknown_name", "{remedy}", {"remedy": self._found().remedy(value, self.also)})
        return value


def _modules(package: str) -> Iterator[Entry]:
    """Entries of the modules of a package, found without importing them."""
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.py")):
            if not file.stem.startswith("_"):
                text = ast.get_docstring(ast.parse(file.read_text("utf-8")))
                yield Entry(file.stem, f"{package}.{file.stem}", _first_line(text))


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0].rstrip(".")
