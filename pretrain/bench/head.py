"""`bd3 bench head`: head and cross-entropy in chunks of masked rows, beside whole logits of masked and of all rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from bd3_common.text import counted
from bd3_megatron import parallel
from bd3_megatron.config import ParallelConfig
from bd3_megatron.diffusion.batches import predicted_positions
from bd3_megatron.layers.head import VocabularyShard, linear_cross_entropy
from pretrain.bench.attention import DTYPES
from pretrain.bench.models import seconds_of
from pretrain.bench.options import HeadOptions


def bench_head(options: HeadOptions) -> None:
    """Print a row per vocabulary: seconds, ratios, and the part of a matmul's rate."""
    torch.set_num_threads(options.threads)
    world = parallel.start(ParallelConfig())
    try:
        rows = [_row(options, size, world.device) for size in options.vocab_sizes]
    finally:
        parallel.stop()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if options.json_:
        print(json.dumps({"device": device, "rows": rows}))
        return
    print(
        f"head and cross-entropy, {device}, {counted(options.threads, 'thread')}, hidden {options.hidden}, "
        f"{options.rows} rows, {options.mask_rate:.0%} masked; seconds"
    )
    columns = ("seconds", "gathered_seconds", "every_row_seconds", "ratio", "of_matmul")
    print(f"{'vocabulary':>10}" + "".join(f"{name.removesuffix('_seconds'):>12}" for name in columns))
    for row in rows:
        print(f"{row['vocab_size']:>10}" + "".join(f"{row[name]:>12.4g}" for name in columns))


def _row(options: HeadOptions, columns: int, device: torch.device) -> dict[str, Any]:
    dtype = DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, options.hidden, generator=generator).to(device, dtype).requires_grad_()
        for n in (options.rows, columns)
    )
    labels = torch.randint(0, columns - 1, (options.rows,), generator=generator).to(device)
    factors = (torch.rand(options.rows, generator=generator) < options.mask_rate).float()
    picked, factors = predicted_positions(factors).to(device), factors.to(device)
    shard = VocabularyShard.of_this_rank(columns, never=(columns - 1,))

    def chunked() -> Tensor:
        return linear_cross_entropy(hidden[picked], weight, None, labels[picked], factors[picked], shard)

    def gathered() -> Tensor:
        logits = shard.forbid(F.linear(hidden[picked], weight)).float()
        return (vocab_parallel_cross_entropy(logits, labels[picked]) * factors[picked]).sum()

    def every_row() -> Tensor:
        logits = shard.forbid(F.linear(hidden, weight)).float()
        return (vocab_parallel_cross_entropy(logits, labels) * factors).sum()

    count = len(picked)
    product = torch.randn(count, columns, device=device, dtype=dtype)
    paths: dict[str, Callable[[], Any]] = {
        name: lambda loss=loss: torch.autograd.grad(loss(), (hidden, weight))
        for name, loss in (("chunked", chunked), ("gathered", gathered), ("every_row", every_row))
    } | {"matmul": lambda: product @ weight.detach()}
    turns = [[seconds_of(run, device) for run in paths.values()] for _ in range(options.repeats + 1)][1:]
    times = dict(zip(paths, zip(*turns)))
    median = {name: statistics.median(column) for name, column in times.items()}
    return {
        "vocab_size": columns,
        "rows": count,
        "seconds": median["chunked"],
        "gathered_seconds": median["gathered"],
        "every_row_seconds": median["every_row"],
        "ratio": statistics.median(a / b for a, b in zip(times["chunked"], times["every_row"])),
        "of_gathered": statistics.median(a / b for a, b in zip(times["chunked"], times["gathered"])),
        # Logits, gradient by rows and gradient by weight are three products of this size.
        "of_matmul": 3 * median["matmul"] / median["chunked"],
        "tflops": 3 * 2 * count * columns * options.hidden / median["chunked"] / 1e12,
    }
