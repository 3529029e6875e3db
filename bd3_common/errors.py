"""User errors: exceptions whose text is one line for the person at the terminal, and how they are shown."""

from __future__ import annotations

import errno
import os
from typing import Any

from bd3_common.text import printable, redacted, shorten

_WRITE_ERRORS = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


class UserError(ValueError):
    """A mistake of the user or a fault of the machine; the text is one line: what, where, the value, the remedy."""


class ConfigError(UserError):
    """A mistake in the configuration or the command line."""


def user_line(error: Exception) -> str | None:
    """The line to print for a user error, a failing disk or a full memory; None for a bug."""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: " in str(error):  # torch's is a RuntimeError
        return "out of memory: this machine cannot hold it; make the model, the batch or the row length smaller"
    if isinstance(error, OSError):
        line = _os_line(error)
    elif type(error).__name__ == "ValidationError" and hasattr(error, "errors"):  # pydantic's, not imported for it
        line = _first_mistake(error)
    else:
        line = str(error) if isinstance(error, UserError) else None
    return None if line is None else redacted(printable(" ".join(line.split())))


def _first_mistake(error: Any) -> str:
    """``batch=0: input should be greater than 0``: the first mistake that pydantic found in options."""
    found = error.errors(include_url=False)[0]
    text = str(found["msg"]).removeprefix("Value error, ")
    path = ".".join(map(str, found["loc"]))
    return text if found["type"] == "value_error" or not path else f"{path}={shorten(found['input'])}: {text}"


def _os_line(error: OSError) -> str | None:
    """``PATH: cannot write: No space left on device``; None for an error that names neither a file nor a disk."""
    if error.filename is None and error.errno not in _WRITE_ERRORS:
        return None
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    reason = error.strerror or type(error).__name__
    if error.errno in _WRITE_ERRORS:
        return f"{where}cannot write: {reason}"
    if isinstance(error, PermissionError):
        readable = os.access(error.filename, os.R_OK) or not os.path.exists(error.filename)
        return f"{where}cannot {'write' if readable else 'read'}: {reason}"
    if error.errno == errno.ELOOP:
        return f"{where}is a link that is not followed; remove it"
    # Creating or opening a path below one that does not allow it: /proc/x, file/x.
    return f"{where}cannot read or write: {reason}"
