"""YAML from outside, within bounds: size, depth, and nodes, those of an alias counted wherever it stands."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml

MAX_CHARACTERS = 1 << 18
MAX_DEPTH = 32
MAX_NODES = 50_000


def load_yaml(text: str, loader: Any) -> Any:
    """The value of a document.

    Args:
        loader: a loader class of PyYAML.

    Raises:
        yaml.YAMLError: no YAML, or more than a configuration can need; ``problem`` says what.
    """
    if len(text) > MAX_CHARACTERS:
        raise _refused(f"{len(text)} characters, the limit is {MAX_CHARACTERS}")
    reader = _shallow(loader)(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, 0)
        return reader.construct_document(node)
    finally:
        reader.dispose()


@cache
def _shallow(loader: Any) -> Any:
    """The loader, which refuses deep nesting while it reads, before Python's own limit of recursion."""

    class Shallow(loader):  # type: ignore[misc]
        depth = 0

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.depth > MAX_DEPTH:
                raise _refused(f"nested more than {MAX_DEPTH} deep", self.peek_event().start_mark)
            self.depth += 1
            node: yaml.Node | None = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return Shallow


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None], depth: int) -> tuple[int, int]:
    """Nodes below a node and their depth, itself included. Anchors make few characters stand for many nodes."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise _refused("an anchor that holds itself", node.start_mark)
        return found
    known[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
    if depth > MAX_DEPTH:
        raise _refused(f"nested more than {MAX_DEPTH} deep", node.start_mark)
    count = height = 1
    for child in children:
        below, deep = _measure(child, known, depth + 1)
        count, height = count + below, max(height, deep + 1)
    if count > MAX_NODES or height > MAX_DEPTH:
        raise _refused(f"more than {MAX_NODES} values, or nested more than {MAX_DEPTH} deep", node.start_mark)
    known[id(node)] = count, height
    return count, height


def _refused(problem: str, mark: yaml.Mark | None = None) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
