"""Weights & Biases: one W&B run for a run folder, however often it resumes.

wandb's own environment variables choose the rest: ``WANDB_PROJECT``, ``WANDB_ENTITY``, ``WANDB_MODE=offline``.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bd3_common.atomic import write_text
from bd3_common.errors import ConfigError
from pretrain.run_folder.layout import WANDB_ID
from pretrain.tracking.sinks import MetricSink

PROJECT = "bd3-megatron"


class WandB(MetricSink):
    """Values named ``split/name`` over the axis ``step``.

    The id of the W&B run stays in the run folder, and a resumed run goes on under it. W&B keeps what it was sent:
    steps that are done again have two points.
    """

    extra = "track"

    def __init__(self, folder: Path, resume_step: int = 0, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(folder, resume_step, config)
        wandb = self.package("wandb")
        path = folder / WANDB_ID
        if not path.exists():
            write_text(path, secrets.token_hex(4) + "\n")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.resolve().name,
                id=path.read_text("utf-8").strip(),
                resume="allow",
                dir=str(folder),
                config=dict(self.config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"log.sinks=wandb: W&B cannot be reached ({reason}); run wandb login, or set WANDB_MODE=offline"
            ) from error
        # W&B's own step must rise, and a resumed run comes back to steps that it has.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def record(self, split: str, step: int, values: Mapping[str, int | float | None]) -> None:
        named = {f"{split}/{name}": value for name, value in values.items() if value is not None}
        self._run.log({"step": step} | named)

    def close(self) -> None:
        self._run.finish()
