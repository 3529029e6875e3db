"""`bd3 bench`: benchmarks, whose results are ratios within one run because machines differ and are shared."""

from __future__ import annotations

import importlib

from bd3_common.errors import ConfigError
from bd3_megatron.config import Section
from pretrain.bench import options as o
from pretrain.config.command_line import parse_options
from pretrain.config.values import did_you_mean

BENCHMARKS: dict[str, type[Section]] = {
    "attention": o.AttentionOptions,
    "step": o.StepOptions,
    "head": o.HeadOptions,
    "checkpoint": o.CheckpointOptions,
    "memory": o.MemoryOptions,
    "draws": o.DrawsOptions,
    "data": o.DataOptions,
    "parity": o.ParityOptions,
}
"""options of each benchmark; ``bench_NAME`` of the module of that name takes them"""


def main(args: list[str]) -> int:
    """`bd3 bench NAME`; the exit code.

    Raises:
        ConfigError: no such benchmark.
    """
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: bd3 bench {'|'.join(BENCHMARKS)}   (--help after it for options)")
        return 0 if args else 2
    name, *rest = args
    if name not in BENCHMARKS:
        raise ConfigError(f"bd3 bench {name}: unknown benchmark{did_you_mean(name, BENCHMARKS)}")
    options = parse_options(BENCHMARKS[name], rest, f"bd3 bench {name}")
    module = importlib.import_module(f"pretrain.bench.{name}")
    return getattr(module, f"bench_{name}")(options) or 0
