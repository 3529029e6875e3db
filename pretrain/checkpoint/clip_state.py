"""The clip interval that a checkpoint has from the searches of its run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bd3_common.errors import ConfigError
from bd3_common.text import shorten
from bd3_megatron.config import DiffusionConfig
from pretrain.config.schema import RunConfig

COLUMNS = ("step", "beta", "omega", "variance", "variance_before", "difference_stderr")
"""of the history: step of a search, the interval after it, the variance of the block loss there and on the interval
before, and the standard error of their difference"""


def read_clip_state(config: RunConfig, meta: Mapping[str, Any]) -> tuple[DiffusionConfig, list[list[float]]]:
    """The objective with the interval it had at the checkpoint with this meta, and the history of searches.

    Raises:
        ConfigError: the meta holds something else than an interval or a history.
    """
    diffusion = config.diffusion
    if not config.clip_search.every or not meta:
        return diffusion, []
    low, high, history = meta.get("beta", diffusion.beta), meta.get("omega", diffusion.omega), []
    if not (_number(low) and _number(high) and 0 < low <= high <= 1):
        raise ConfigError(f"checkpoint: its clip interval is [{shorten(low)}, {shorten(high)}], not in (0, 1]")
    rows = meta.get("clip_history", [])
    if not isinstance(rows, list):
        raise ConfigError(f"checkpoint: clip_history={shorten(rows)}: not a list of searches")
    for row in rows:
        if not (isinstance(row, list) and len(row) == len(COLUMNS) and all(map(_number, row))):
            raise ConfigError(
                f"checkpoint: clip_history has {shorten(row)}, not the {len(COLUMNS)} numbers of a search"
            )
        history.append([float(value) for value in row])
    return diffusion.model_copy(update={"beta": float(low), "omega": float(high)}), history


def _number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)
