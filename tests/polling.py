"""Waiting in tests: poll a condition with a deadline that a busy machine keeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

TIMEOUT = 600.0  # seconds, for a busy machine


def until(
    condition: Callable[[], T], timeout: float = TIMEOUT, what: str | Callable[[], str] = "", every: float = 0.02
) -> T:
    """Poll ``condition`` and return its first true value.

    Raises:
        TimeoutError: it was not true within ``timeout`` seconds; the message has ``what`` was waited for.
    """
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout} s: {what() if callable(what) else what}")
        time.sleep(every)
