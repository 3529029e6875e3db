"""TensorBoard scalars under ``tensorboard/`` in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.run_folder.layout import TENSORBOARD
from pretrain.tracking.sinks import MetricSink


class TensorBoard(MetricSink):
    """Scalars named ``split/name``. TensorBoard hides those that a resumed run writes once more."""

    def __init__(self, folder: Path, resume_step: int = 0, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(folder, resume_step, config)
        board = self.package("torch.utils.tensorboard")
        self._writer = board.SummaryWriter(str(folder / TENSORBOARD), purge_step=resume_step + 1)

    def record(self, split: str, step: int, values: Mapping[str, int | float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()
