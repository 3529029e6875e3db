"""Owner of checkpoints: the run that a folder and the checkpoints in it belong to."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.folder import folders, read_listing, step_of
from pretrain.run_folder.identity import Identity, identity_from_meta, read_identity


def identity_of(run: Path) -> Identity:
    """Identity of the run in a folder; where it has no identity file, that of its checkpoints (nothing is written).

    Raises:
        ConfigError: the file is damaged, or it is missing and the checkpoints are of several runs.
    """
    found = read_identity(run)
    if found is not None:
        return found
    listings = {step_of(path): read_listing(path) for path in folders(run)}
    metas = [(step, one["meta"] if isinstance(one, dict) else None) for step, one in listings.items()]
    return identity_from_meta(run, metas)
