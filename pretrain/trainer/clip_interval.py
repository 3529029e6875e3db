"""The clip interval of a run: that of the configuration, or the one its searches have found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bd3_common.errors import ConfigError
from bd3_common.text import shorten
from bd3_megatron.engine.base import Engine
from data_prep.read.stream import RowStream
from pretrain.config.schema import RunConfig
from pretrain.evaluation.clip_search import search

_COLUMNS = ("step", "beta", "omega", "variance", "variance_before", "difference_stderr")


class ClipInterval:
    """Noise levels that are drawn from now on, and how they came about.

    Args:
        meta: of the checkpoint that the run goes on from; empty for a new run.

    Raises:
        ConfigError: the meta holds no interval.
    """

    def __init__(self, config: RunConfig, meta: Mapping[str, Any]):
        self.config, self.diffusion = config, config.diffusion
        self.history: list[list[float]] = []
        """searches so far: step, beta, omega, variance of the block loss there and on the interval before, and the
        standard error of their difference"""
        if config.clip_search.every and meta:
            self.history = [list(map(float, row)) for row in meta.get("clip_history", [])]
            low, high = meta.get("beta", config.diffusion.beta), meta.get("omega", config.diffusion.omega)
            if not (isinstance(low, float | int) and isinstance(high, float | int) and 0 < low <= high <= 1):
                raise ConfigError(f"checkpoint: its clip interval is [{shorten(low)}, {shorten(high)}], not in (0, 1]")
            self.diffusion = config.diffusion.model_copy(update={"beta": float(low), "omega": float(high)})

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
        return dict(zip(_COLUMNS[1:], values[1:])) | {"best_variance": float(found.variances[best])}

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
