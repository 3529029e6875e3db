"""Safe path of child processes: Python does not search the current folder for modules in them.

``python -c``, with which multiprocessing starts its helpers, would put it first on ``sys.path``: a module of a common
name that lies beside somebody's corpus would be imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

VARIABLE = "PYTHONSAFEPATH"


@contextmanager
def safe_path() -> Iterator[None]:
    """Context whose child processes have a safe path."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = before or "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


_BEFORE = os.environ.get(VARIABLE)


def inherited() -> Mapping[str, str]:
    """Environment for a user's own command: :data:`VARIABLE` as this process got it."""
    own = {name: value for name, value in os.environ.items() if name != VARIABLE}
    return own if _BEFORE is None else own | {VARIABLE: _BEFORE}
