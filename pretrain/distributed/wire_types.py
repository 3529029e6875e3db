"""Types that cross ranks: classes that :mod:`pretrain.distributed.codec` may build from a message."""

from __future__ import annotations

from typing import TypeVar

C = TypeVar("C", bound=type)

RECORDS: dict[str, type] = {}
"""by full name"""


def crosses_ranks(cls: C) -> C:
    """Decorator of a class whose instances are sent between ranks; received values are checked by its annotations."""
    RECORDS[full_name(cls)] = cls
    return cls


def full_name(cls: type) -> str:
    """Module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"
