"""Lines to stderr from threads that must not wait for Python's locks."""

from __future__ import annotations

import os


def write_line(text: str) -> None:
    """Write a line in one system call. Logging takes a lock, which a main thread that hangs may hold."""
    os.write(2, f"{text}\n".encode())
