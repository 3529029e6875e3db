"""Place of a run folder: a folder of its own, neither a link nor mixed with a data set."""

from __future__ import annotations

import os
from pathlib import Path

from bd3_common.atomic import refuse_link
from bd3_common.errors import ConfigError
from data_prep.format.remote import is_remote
from pretrain.config.schema import RunConfig


def check_place(config: RunConfig) -> None:
    """Check the run folder's place before anything is written.

    Raises:
        ConfigError: it is a link or a file, lies in a data set of the run, or has one in it.
    """
    run = Path(config.run)
    refuse_link(run, "run", ConfigError)
    if run.exists() and not run.is_dir():
        raise ConfigError(f"run={run}: is not a folder; give another name, or remove it")
    for path in config.data.weights():
        local = path.removeprefix("file://")
        if is_remote(local):
            continue
        inner, outer = os.path.realpath(run), os.path.realpath(local)
        if _lies_in(inner, outer):
            raise ConfigError(
                f"run={run}: lies in the data set {path}, where its files would be faults; choose another"
            )
        if _lies_in(outer, inner):
            raise ConfigError(f"run={run}: the data set {path} lies in it; choose another folder for the run")


def _lies_in(inner: str, outer: str) -> bool:
    return Path(inner).is_relative_to(outer)
