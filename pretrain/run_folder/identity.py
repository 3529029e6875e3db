"""Identity of a run: an id, in the run folder and in the meta of each of its checkpoints.

A folder may be removed, renamed or begun again while a job still writes into it, and a checkpoint may be copied in from
another run. The id tells them apart: a checkpoint is published only into the folder of its run, and taken only there.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from bd3_common import schema
from bd3_common.atomic import write_text
from bd3_common.errors import ConfigError
from bd3_common.schema import Count, OpenRecord
from bd3_common.text import shorten
from pretrain.run_folder.layout import RUN_ID

META_KEY = "run"
"""key of the run's id in a checkpoint's meta"""

Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Identity(OpenRecord):
    """Content of the identity file."""

    id: Id = Field(default_factory=lambda: secrets.token_hex(16))
    parents: list[Annotated[str, Field(max_length=200)]] = Field(
        default=[], description="runs or weights that its first weights come from: run:ID, sha256:DIGEST"
    )
    earlier: list[Count] = Field(default=[], description="steps of checkpoints from before runs had ids")

    def refusal(self, step: int, meta: Mapping[str, Any]) -> str | None:
        """Reason not to take a checkpoint, from its step and meta; None if it is one of this run."""
        theirs = _id_of(meta)
        if theirs == self.id or (theirs is None and step in self.earlier):
            return None
        if theirs is None:
            return f"has no run id and is not among those from before the run had one ({RUN_ID})"
        return f"is of run {shorten(theirs, 40)}, not of this run {self.id}"


def read_identity(run: Path) -> Identity | None:
    """Identity of the run in a folder; None if the folder has none.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return schema.read(run / RUN_ID, Identity, "put back what bd3 pretrain wrote", ConfigError)
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_identity(run: Path, identity: Identity) -> None:
    """Write the identity file.

    Raises:
        OSError: the folder cannot be written.
    """
    write_text(run / RUN_ID, json.dumps(identity.model_dump(), indent=1) + "\n")


def identity_from_meta(run: Path, metas: Sequence[tuple[int, Mapping[str, Any] | None]]) -> Identity:
    """Identity of a folder without an identity file, by its checkpoints.

    If one of them has no id, the run is older than ids, and gets a new one.

    Args:
        metas: step and meta of each checkpoint; None for an unreadable meta.

    Raises:
        ConfigError: the checkpoints are of several runs.
    """
    found = {step: _id_of(meta) for step, meta in metas if meta is not None}
    ids = {one for one in found.values() if one is not None}
    if None in found.values() or not ids:
        return Identity(earlier=sorted(step for step, _ in metas if found.get(step) is None))
    if len(ids) > 1:
        raise ConfigError(
            f"{run}: {RUN_ID} is missing, and the checkpoints are of {len(ids)} runs; put the file back, or remove the "
            f"checkpoints of the others"
        )
    return schema.check({"id": ids.pop()}, Identity, f"{run}: id of the run in its checkpoints", "", ConfigError)


def _id_of(meta: Mapping[str, Any]) -> str | None:
    found = meta.get(META_KEY)
    return None if found is None else str(found)


def check_folder(run: Path, run_id: str) -> None:
    """Check that a folder is still that of the run, before something is written into it or removed.

    Raises:
        ConfigError: it was removed, moved, or begun again.
        OSError: it cannot be read.
    """
    found = read_identity(run)
    if found is None or found.id != run_id:
        happened = "was removed or moved" if found is None else f"was begun again, as run {found.id},"
        raise ConfigError(f"run={run}: the folder {happened} under this job of run {run_id}, which ends")
