"""Collective errors: exceptions that every rank raises, which rank 0 alone prints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

E = TypeVar("E", bound=BaseException)


def mark_collective(error: E) -> E:
    """Mark an error that every rank raises, so that only rank 0 prints it."""
    error.collective = True
    return error


def is_collective(error: BaseException | None) -> bool:
    """True for an error that every rank raises, see :func:`mark_collective`."""
    return getattr(error, "collective", False)


@contextlib.contextmanager
def collective_errors() -> Iterator[None]:
    """Mark errors raised inside as collective: they depend on the configuration only, so every rank raises them."""
    try:
        yield
    except Exception as error:
        mark_collective(error)
        raise
