"""`bd3 pretrain`: train a model, or continue a run. One process is one rank."""

from __future__ import annotations

from pretrain.config.resolve import load_run_config
from pretrain.distributed.collective_errors import collective_errors


def main(args: list[str]) -> None:
    """`bd3 pretrain`: train, or go on from the newest checkpoint of the same run folder."""
    with collective_errors():
        config = load_run_config(args)
    from pretrain.trainer.loop import train  # imports torch: not for --help, nor for a mistyped flag

    train(config)
