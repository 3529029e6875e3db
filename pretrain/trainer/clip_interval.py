"""The clip interval of a run: that of the configuration, or the one its searches have found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bd3_megatron.diffusion.clips import default_grid
from bd3_megatron.engine.base import Engine
from data_prep.read.stream import RowStream
from pretrain.checkpoint.clip_state import COLUMNS, read_clip_state
from pretrain.config.schema import RunConfig
from pretrain.evaluation.clip_search import search


class ClipInterval:
    """Noise levels that are drawn from now on, and how they came about.

    Args:
        meta: of the checkpoint that the run goes on from; empty for a new run.

    Raises:
        ConfigError: the meta holds no interval.
    """

    def __init__(self, config: RunConfig, meta: Mapping[str, Any]):
        self.config = config
        self.diffusion, self.history = read_clip_state(config, meta)

    def due(self, step: int) -> bool:
        """True if a search belongs after this step and has not been made: none after the last, where nothing trains."""
        every = self.config.clip_search.every
        made = bool(self.history) and self.history[-1][0] == step
        return bool(every) and 0 < step < self.config.train.steps and step % every == 0 and not made

    def search(
        self, step: int, engine: Engine, validation: RowStream, progress: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Search with the engine's current weights and take what is found; the numbers of the search for metrics."""
        config = self.config
        options = config.clip_search
        found = search(
            engine,
            validation,
            config.model,
            self.diffusion,
            options,
            step // options.every,
            config.eval.micro_batch or config.train.micro_batch,
            config.data.document_mask,
            progress,
        )
        best = found.best
        low, high = found.interval
        moved = found.interval != (self.diffusion.beta, self.diffusion.omega)
        before = float(found.variances[best] - found.differences[best])
        now = float(found.variances[best]) if moved else before
        self.diffusion = self.diffusion.model_copy(update={"beta": low, "omega": high})
        values = (step, low, high, now, before, float(found.errors[best]))
        self.history.append([float(value) for value in values])
        fields = dict(zip(COLUMNS[1:], values[1:])) | {"best_variance": float(found.variances[best])}
        grid = options.grid or default_grid(self.diffusion.block_size)
        for (low, high), variance, error in zip(grid, found.variances, found.errors):
            fields |= {f"variance_{low:g}-{high:g}": float(variance), f"stderr_{low:g}-{high:g}": float(error)}
        return fields

    def describe(self) -> str:
        """The last search in one line."""
        _, low, high, now, before, error = self.history[-1]
        return (
            f"clip interval [{low:g}, {high:g}], variance of the block loss {now:.3g} "
            f"(before the search {before:.3g}, standard error of a difference {error:.2g})"
        )

    def state(self) -> dict[str, Any]:
        """Values for a checkpoint's meta."""
        if not self.config.clip_search.every:
            return {}
        return {"beta": self.diffusion.beta, "omega": self.diffusion.omega, "clip_history": self.history}
