"""Options that several commands share: which checkpoint of a run, and how it is evaluated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bd3_megatron.config import MAX_ROWS, Section, Seed
from pretrain.config.command_line import Positional
from pretrain.config.schema import ESTIMATORS_HELP, EstimatorName, EvalConfig


class CheckpointOptions(Section):
    """Choice of a run's checkpoint; :func:`pretrain.checkpoint.loaded_run.load_chosen` reads it."""

    run: Positional[str] = Field(description="run folder")
    step: int | None = Field(default=None, ge=0, description="step of the checkpoint; null means the newest")
    weights: Literal["ema", "raw"] = Field(default="ema", description="EMA weights, or the last step's")


class EvaluationChoices(Section):
    """How the bound is estimated; the command has its own ``rows``."""

    estimator: EstimatorName = Field(default="counts", description=ESTIMATORS_HELP)
    draws: int = Field(
        default=1, ge=1, le=10_000, description="noise draws per row; more make the bound's estimate less noisy"
    )
    seed: Seed = Field(default=0, description="seed of the evaluation noise")
    micro_batch: int | None = Field(
        default=None, ge=1, le=MAX_ROWS, description="rows per forward pass; null means as in training"
    )

    def evaluation(self, rows: int | None) -> EvalConfig:
        """The section of an evaluation of so many rows."""
        return EvalConfig(
            estimator=self.estimator, rows=rows, draws=self.draws, seed=self.seed, micro_batch=self.micro_batch
        )
