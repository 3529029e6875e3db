"""`bd3 bench attention`: the two-stream attention alone, beside a dense mask, causal attention and a matmul."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_common.text import counted
from bd3_megatron.attention.backends import (
    AUTO,
    PRECISIONS,
    Demand,
    candidates,
    choose,
    reason_against,
)
from bd3_megatron.attention.mask import Streams, dense_mask, live_pairs
from bd3_megatron.config import DiffusionConfig, divisors, listing
from pretrain.bench.models import checked_plot, seconds_of
from pretrain.bench.options import AttentionOptions
from pretrain.tracking.plots import MUTED, finish, new_figure, save_figure

DTYPES = {precision: getattr(torch, dtype) for dtype, precision in PRECISIONS.items()}
MATMUL = {"cpu": 1024, "cuda": 8192}  # side of the square matrices whose product is the ceiling


@dataclass(frozen=True)
class Timed:
    """A timed computation: one ``run()`` computes ``pairs`` useful (query, key) pairs of a row."""

    name: str
    run: Callable[[], Any]
    pairs: int = 0


def bench_attention(options: AttentionOptions) -> None:
    """Print a row per length, block size and backend."""
    options = _resolved(options)
    device = _device()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = [(length, block_size) for block_size in options.block_sizes for length in options.lengths]
    rows = [row for case in cases for row in _rows(options, *case, device)]
    if options.plot is not None:
        _plot(Path(options.plot), options.dtype, rows)
    if options.json_:
        print(json.dumps({"device": _name(device), **options.model_dump(exclude={"json_", "plot"}), "rows": rows}))
        return
    print(
        f"two-stream attention, forward and backward, {_name(device)}, {counted(options.threads, 'thread')}, "
        f"{options.dtype}, {options.heads} heads of {options.head_dim}, {counted(options.batch, 'row')}, "
        f"{counted(options.draws, 'draw')}"
    )
    columns = ("seconds", "dense_seconds", "ratio", "tflops", "of_causal", "of_matmul")
    print(
        f"{'length':>7}{'block':>7}{'backend':>11}" + "".join(f"{name.replace('_seconds', ''):>11}" for name in columns)
    )
    for row in rows:
        cells = ("-" if row[name] is None else f"{row[name]:.4g}" for name in columns)
        print(
            f"{row['length']:>7}{row['block_size']:>7}{row['backend']:>11}" + "".join(f"{cell:>11}" for cell in cells)
        )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _resolved(options: AttentionOptions) -> AttentionOptions:
    """Options without nulls.

    Raises:
        ConfigError: sizes that do not fit, or a backend that does not support them or does not work on this machine.
    """
    heads, groups, device = options.heads, options.kv_heads or options.heads, _device()
    checked_plot(options.plot)
    if heads % groups:
        raise ConfigError(
            f"--kv-heads={groups}: --heads={heads} is not divisible by {groups}; use {listing(divisors(heads))}"
        )
    for block_size in options.block_sizes:
        for length in options.lengths:
            if length % block_size:
                fitting = listing(divisors(length, length))
                raise ConfigError(f"--block-sizes={block_size}: {length} is not divisible by it; use {fitting}")
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    names = options.backends
    if names is None:
        demand = Demand(dtype, options.head_dim, options.lengths[0], options.lengths[0])
        usual = candidates(AUTO, device.type)
        names = tuple(cls.name for cls in usual if reason_against(cls, demand, device) is None)
    return options.model_copy(update={"kv_heads": groups, "dtype": dtype, "backends": names})


def _rows(options: AttentionOptions, length: int, block_size: int, device: torch.device) -> list[dict[str, Any]]:
    """Results of one length and block size, a row per backend; all computations take turns."""
    diffusion = DiffusionConfig(block_size=block_size, draws=options.draws)
    streams, causal = Streams.of(diffusion, length), Streams(length, 1, 0, length)
    dtype = DTYPES[options.dtype]
    chosen = [
        choose(name, streams, None, head_dim=options.head_dim, dtype=dtype, device=device) for name in options.backends
    ]
    inputs = partial(_inputs, options, dtype, device)
    scale = options.head_dim**-0.5
    ours = [Timed(b.name, _pass(b.attend, inputs(streams.tokens), scale, None), live_pairs(streams)) for b in chosen]
    peers = [Timed(f"causal {b.name}", _pass(b.causal, inputs(length)), live_pairs(causal)) for b in chosen]
    side = MATMUL[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    others = [Timed("matmul", lambda: a @ b)]
    if (dense := _dense(inputs(streams.tokens), streams)) is not None:
        others.append(Timed("dense", dense))
    paths = [*ours, *peers, *others]
    times = _take_turns(paths, options.repeats, device)
    median = {name: statistics.median(turns) for name, turns in times.items()}
    ceiling = 2 * side**3 / median["matmul"] / 1e12

    def tflops(path: Timed) -> float:  # forward 4 d per pair and head, backward 2.5 times that
        useful = 3.5 * 4 * options.head_dim * path.pairs * options.heads * options.batch
        return useful / median[path.name] / 1e12

    slower = times.get("dense")
    return [
        {
            "length": length,
            "block_size": block_size,
            "backend": path.name,
            "seconds": median[path.name],
            "dense_seconds": median.get("dense"),
            "ratio": slower and statistics.median(one / other for one, other in zip(times[path.name], slower)),
            "tflops": tflops(path),
            "causal_tflops": tflops(peer),
            "of_causal": tflops(path) / tflops(peer),
            "matmul_tflops": ceiling,
            "of_matmul": tflops(path) / ceiling,
        }
        for path, peer in zip(ours, peers)
    ]


def _inputs(options: AttentionOptions, dtype: torch.dtype, device: torch.device, tokens: int) -> list[Tensor]:
    """Query, key and value ``[tokens, b, n, d]`` that require gradients."""
    shapes = [(tokens, options.batch, n, options.head_dim) for n in (options.heads, options.kv_heads, options.kv_heads)]
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def _pass(attend: Callable[..., Tensor], qkv: list[Tensor], *more: Any) -> Callable[[], Any]:
    """One forward and one backward pass."""
    upstream = torch.randn_like(qkv[0])
    return lambda: torch.autograd.grad(attend(*qkv, *more), qkv, upstream)


def _dense(qkv: list[Tensor], streams: Streams) -> Callable[[], Any] | None:
    """SDPA with the dense mask, keys repeated beforehand; None if it does not fit the memory."""
    repeats = qkv[0].shape[2] // qkv[1].shape[2]
    try:
        query, key, value = (x.detach().permute(1, 2, 0, 3) for x in qkv)
        heads_first = [query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)]
        heads_first = [x.contiguous().requires_grad_() for x in heads_first]
        run = _pass(partial(F.scaled_dot_product_attention, attn_mask=dense_mask(streams, query.device)), heads_first)
        if query.is_cuda:
            run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return run


def _take_turns(paths: list[Timed], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every path at every turn, after one turn that is not counted."""
    turns = [[seconds_of(path.run, device) for path in paths] for _ in range(repeats + 1)]
    return {path.name: list(column) for path, column in zip(paths, zip(*turns[1:]))}


def _plot(file: Path, dtype: str, rows: list[dict[str, Any]]) -> None:
    """TFLOP/s of useful pairs against the length: a line for each backend and block size, causal attention dashed."""
    figure = new_figure(6)
    axes = figure.subplots()
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["backend"], row["block_size"]), []).append(row)
    for i, ((name, block_size), line) in enumerate(lines.items()):
        lengths, color = [row["length"] for row in line], f"C{i}"
        axes.plot(lengths, [row["tflops"] for row in line], "o-", color=color, label=f"{name}, blocks of {block_size}")
        label = f"causal, as {name}" if block_size == rows[0]["block_size"] else None
        axes.plot(lengths, [row["causal_tflops"] for row in line], "--", color=color, linewidth=1, label=label)
    axes.axhline(max(row["matmul_tflops"] for row in rows), color=MUTED, linestyle=":", label="matmul")
    axes.set(title=f"two-stream attention, {dtype}", xlabel="row length", ylabel="useful TFLOP/s", xscale="log")
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({row["length"] for row in rows}), minor=False)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    finish(axes)
    save_figure(figure, file)
