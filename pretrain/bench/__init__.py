"""`bd3 bench`: what the pieces cost, as ratios within one run, because machines differ and are shared."""

from __future__ import annotations

import importlib

from bd3_common.errors import ConfigError
from pretrain.config.values import did_you_mean

# Name -> module:function; a function takes the arguments after the name and may return an exit code.
BENCHMARKS = {
    "attention": "pretrain.bench.attention:bench_attention",
    "step": "pretrain.bench.step:bench_step",
    "head": "pretrain.bench.head:bench_head",
    "checkpoint": "pretrain.bench.checkpoint:bench_checkpoint",
    "memory": "pretrain.bench.memory:bench_memory",
    "draws": "pretrain.bench.draws:bench_draws",
    "data": "pretrain.bench.data:bench_data",
    "parity": "pretrain.bench.parity:bench_parity",
}


def main(args: list[str]) -> int:
    """`bd3 bench NAME`; the exit code.

    Raises:
        ConfigError: no such benchmark.
    """
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: bd3 bench {'|'.join(BENCHMARKS)}   (--help after it for options)")
        return 0 if args else 2
    if args[0] not in BENCHMARKS:
        raise ConfigError(f"bd3 bench {args[0]}: unknown benchmark{did_you_mean(args[0], BENCHMARKS)}")
    module, _, function = BENCHMARKS[args[0]].partition(":")
    return getattr(importlib.import_module(module), function)(args[1:]) or 0
