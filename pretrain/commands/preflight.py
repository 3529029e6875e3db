"""`bd3 preflight`: check nodes, links, folders and data before a run, and start nothing."""

from __future__ import annotations

from pretrain.config.resolve import load_run_config
from pretrain.distributed.collective_errors import collective_errors


def main(args: list[str]) -> None:
    """`bd3 preflight`: the checks alone, with the options of a run; its data set, if it is given, is checked, too."""
    with collective_errors():
        config = load_run_config(args, "bd3 preflight")
    from pretrain.preflight.run import check  # imports torch: not for --help, nor for a mistyped flag

    check(config)
