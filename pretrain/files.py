"""Files of a run folder that are whole or untouched."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` under a temporary name beside ``path``, sync it, and rename it there.

    An existing file keeps its permissions; a new one is readable by all.

    Raises:
        OSError: it cannot be written; ``path`` is as it was.
    """
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, mode)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
