"""Slurm's commands on the PATH that answer as told and note how they were called."""

from __future__ import annotations

import os
from pathlib import Path


class FakeSlurm:
    """Commands in ``folder``; ``environ`` has it at the front of the PATH.

    Args:
        environ: further variables.
    """

    def __init__(self, folder: Path, environ: dict[str, str] | None = None):
        folder.mkdir()
        self.folder, self._calls = folder, folder / "calls"
        self.environ = (environ or {}) | {"PATH": f"{folder}:{os.environ['PATH']}"}

    def answers(self, name: str, body: str) -> None:
        """Let a command run lines of the shell."""
        path = self.folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {self._calls}\n{body}\n')
        path.chmod(0o755)

    def called(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []
