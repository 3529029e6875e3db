"""Gradient noise scale: how many rows a batch may have before its gradient is more signal than noise.

From the norms of two gradients of the same weights, of B_s and of B rows, follow estimates of the squared norm of the
mean gradient and of the trace of the covariance of a row's gradient; their ratio is the noise scale (arXiv 1812.06162,
appendix A.1). Both estimates are noisy: plots and readers average them over steps before they divide. They take rows as
independent; strata spread over the batch make the noise of its rows a little less than that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from bd3_megatron import parallel
from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.engine.base import Engine, StepResult
from pretrain.config.schema import RunConfig

_LOG = logging.getLogger(__name__)


class NoiseScale:
    """Measures every ``log.noise_scale_every`` steps, with half of every rank's rows."""

    def __init__(self, config: RunConfig):
        self.config, self.every = config, config.log.noise_scale_every
        self.rows = 0
        """rows of the smaller batch, over all ranks"""

    def half_norm(self, step: int, engine: Engine, batches: Sequence[Batch]) -> float | None:
        """Norm of the gradient of half of the rows of the step's batches, with its weights and dropout.

        Returns:
            None where it is not due, or cannot be measured: a message says why, once.
        """
        if not self.every or step % self.every:
            return None
        train, draws = self.config.train, self.config.diffusion.draws
        if train.micro_batch > 1:
            taken = train.micro_batch // 2
            parts = [batch.part(draws, slice(0, taken)) for batch in batches]
            self.rows = train.global_batch * taken // train.micro_batch
        elif len(batches) > 1 and self.config.parallel.interleave == 1:
            parts = list(batches[: len(batches) // 2])
            self.rows = train.global_batch * len(parts) // len(batches)
        else:
            reason = "micro-batches of one row, and with parallel.interleave none can be left out; raise "
            if len(batches) == 1:
                reason = "each rank has one row a step; raise train.global_batch and "
            self._stop(f"{reason}train.micro_batch")
            return None
        parallel.seed_dropout(train.seed, step - 1)
        norm = engine.gradient_norm(parts)
        if norm is None:
            self._stop("this engine has no gradient without an update")
        return norm

    def fields(self, half: float | None, result: StepResult | None) -> Mapping[str, float | None]:
        """Numbers for metrics: ``gradient_signal``, the squared norm of the mean gradient; ``gradient_noise``, the
        trace of a row's covariance; ``noise_scale``, their ratio in rows, None if the signal is drowned."""
        if half is None or result is None or not (math.isfinite(half) and result.applied):
            return {}
        large, small = self.config.train.global_batch, self.rows
        signal = (large * result.grad_norm**2 - small * half**2) / (large - small)
        noise = (half**2 - result.grad_norm**2) / (1 / small - 1 / large)
        scale = noise / signal if signal > 0 else None
        return {"gradient_signal": signal, "gradient_noise": noise, "noise_scale": scale}

    def _stop(self, reason: str) -> None:
        _LOG.warning(f"log.noise_scale_every={self.every}: not measured: {reason}")
        self.every = 0
