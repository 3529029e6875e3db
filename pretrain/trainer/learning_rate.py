"""Learning rate schedule: a function of the step."""

from __future__ import annotations

import math

from pretrain.config.schema import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Learning rate of step ``step`` (0 is the first): linear warm-up, then constant or decay to ``min_lr``."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.decay == "constant":
        return train.lr
    done = min(1.0, (step + 1 - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    left = 1 - done if train.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return train.min_lr + (train.lr - train.min_lr) * left
