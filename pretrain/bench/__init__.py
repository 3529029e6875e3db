"""`bd3 bench`: benchmarks, whose results are ratios within one run because machines differ and are shared."""

from __future__ import annotations

import importlib
from functools import partial

from bd3_megatron.config import Section
from pretrain.bench import options as o
from pretrain.config.command_line import parse_options
from pretrain.config.subcommands import run_subcommand

BENCHMARKS: dict[str, type[Section]] = {
    "attention": o.AttentionOptions,
    "step": o.StepOptions,
    "head": o.HeadOptions,
    "checkpoint": o.CheckpointOptions,
    "memory": o.MemoryOptions,
    "draws": o.DrawsOptions,
    "counts": o.CountsOptions,
    "data": o.DataOptions,
    "parity": o.ParityOptions,
}
"""options of each benchmark; ``bench_NAME`` of the module of that name takes them"""


def main(args: list[str]) -> int:
    """`bd3 bench NAME`; the exit code.

    Raises:
        ConfigError: no such benchmark.
    """
    commands = {name: partial(_run, name) for name in BENCHMARKS}
    usage = f"usage: bd3 bench {'|'.join(BENCHMARKS)}   (--help after it for options)"
    return run_subcommand("bd3 bench", "benchmark", commands, lambda: usage, args)


def _run(name: str, args: list[str]) -> int | None:
    options = parse_options(BENCHMARKS[name], args, f"bd3 bench {name}")
    module = importlib.import_module(f"pretrain.bench.{name}")
    code: int | None = getattr(module, f"bench_{name}")(options)
    return code
