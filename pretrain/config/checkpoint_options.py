"""Options of commands that read one checkpoint of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bd3_megatron.config import Section
from pretrain.config.command_line import Positional


class CheckpointOptions(Section):
    """Choice of a run's checkpoint; :func:`pretrain.checkpoint.loaded_run.load_chosen` reads it."""

    run: Positional[str] = Field(description="run folder")
    step: int | None = Field(default=None, ge=0, description="step of the checkpoint; null means the newest")
    weights: Literal["ema", "raw"] = Field(default="ema", description="EMA weights, or the last step's")
