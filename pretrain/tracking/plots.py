"""Curves of a run: a PNG for people with a browser, a line of blocks for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_common.atomic import atomic_file
from pretrain.run_folder.layout import CURVES
from pretrain.tracking.metrics import read_metrics, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCKS = "▁▂▃▄▅▆▇█"
INK, ACCENT, MUTED = "#1f3b57", "#c4572f", "#8a9097"


def plot_curves(
    run_dir: Path, out: str = CURVES, reference: Mapping[str, float] | None = None, loss_name: str = "NELBO estimate"
) -> Path:
    """Plot training loss and validation perplexity against the step; returns the path of the PNG.

    Where the records have statistics over blocks, they get two plots more: the nll by number of masked tokens, and the
    variance of the block loss with the gradient noise scale.

    Args:
        run_dir: run folder with ``metrics.jsonl``.
        out: file name in the run folder; written under a temporary name and renamed.
        reference: perplexities drawn as horizontal lines, for example ``{"unigram": 512.3}``.
        loss_name: what the training loss is; a clipped one is no bound.
    """
    records = read_metrics(run_dir)
    details = any("block_variance" in record or "gradient_noise" in record for record in records)
    figure = new_figure(10, 8 if details else 4)
    plots = figure.subplots(2 if details else 1, 2).ravel()
    _loss(plots[0], records, loss_name)
    _perplexity(plots[1], records, reference or {})
    if details:
        _by_count(plots[2], records)
        _variance(plots[3], records)
    for axes in plots:
        axes.set_xlabel("optimizer step")
        finish(axes)
    path = run_dir / out
    save_figure(figure, path)
    return path


def new_figure(width: float, height: float = 4) -> Figure:
    """An empty figure of ``width`` times ``height`` inches.

    Settings are matplotlib's defaults: it would take those of a ``matplotlibrc`` in the current folder.
    """
    import matplotlib

    matplotlib.rcdefaults()
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def finish(axes: Axes) -> None:
    """Style a finished plot: grid, spines and legend."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the finite values around each position, ``window`` (odd) of them, fewer at the ends."""
    half = window // 2
    means = []
    for at in range(len(values)):
        near = [value for value in values[max(0, at - half) : at + half + 1] if math.isfinite(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def ascii_curve(values: Sequence[float], label: str = "", width: int = 48) -> str:
    """One row of blocks with the first and the last value: ``train loss  8.31 █▆▄▃▂▁ 4.02``.

    Longer curves are averaged down to ``width`` columns; a column without a finite value is a space.
    """
    head = f"{label}  " if label else ""
    if not values:
        return f"{head}(no values)"
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    chunks = [[v for v in values[a:b] if math.isfinite(v)] for a, b in pairwise(edges)]
    heights = [sum(chunk) / len(chunk) if chunk else None for chunk in chunks]
    finite = [height for height in heights if height is not None]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    row = "".join(" " if h is None else BLOCKS[round((h - low) * scale)] for h in heights)
    return f"{head}{values[0]:.4g} {row} {values[-1]:.4g}"


def _loss(axes: Axes, records: list[dict[str, Any]], name: str) -> None:
    steps, losses = series(records, "train", "loss")
    window = len(losses) // 40 * 2 + 1
    axes.set_title(f"training loss ({name})")
    axes.set_ylabel("nats per token")
    if not steps:
        return
    axes.plot(steps, losses, color=INK, alpha=0.3, linewidth=0.8, label="each record")
    axes.plot(steps, smooth(losses, window), color=INK, linewidth=1.8, label=f"mean of {window} records")
    known, bounds = series(records, "train", "bound")
    if known:
        near = len(bounds) // 40 * 2 + 1
        axes.plot(known, smooth(bounds, near), color=ACCENT, linewidth=1.5, label="likelihood bound, from the counts")


def _by_count(axes: Axes, records: list[dict[str, Any]]) -> None:
    with_blocks = next((record for record in records if "block_variance" in record), {})
    names = [name for name in with_blocks if name.startswith("nll_by_count_")]
    axes.set_title("nll of a masked token, by masked tokens in its block")
    axes.set_ylabel("nats")
    for number, name in enumerate(names):
        steps, values = series(records, "train", name)
        shade = 0.25 + 0.75 * number / max(len(names) - 1, 1)
        few = len(names) <= 8 or number % 5 == 0  # of at most 16
        label = name.removeprefix("nll_by_count_") if few else None
        axes.plot(steps, smooth(values, len(values) // 40 * 2 + 1), color=INK, alpha=shade, linewidth=1.3, label=label)


def _variance(axes: Axes, records: list[dict[str, Any]]) -> None:
    steps, values = series(records, "train", "block_variance")
    axes.set_title("variance of the block loss, and gradient noise scale")
    axes.set_ylabel("nats² per token²; rows")
    axes.set_yscale("log")
    if steps:
        axes.plot(steps, smooth(values, len(values) // 40 * 2 + 1), color=INK, linewidth=1.5, label="block loss")
    measured, noise = series(records, "train", "gradient_noise")
    _, signal = series(records, "train", "gradient_signal")
    if measured:
        window = max(5, len(noise) // 10 * 2 + 1)
        means = zip(smooth(noise, window), smooth(signal, window))
        scales = [n / s if s > 0 and n > 0 else math.nan for n, s in means]
        axes.plot(measured, scales, color=ACCENT, linewidth=1.5, label="gradient noise scale, rows")


def _perplexity(axes: Axes, records: list[dict[str, Any]], reference: Mapping[str, float]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [r for r in records if r["split"] == "validation" and r.get("nelbo") is not None]
    axes.set_title("validation perplexity (upper bound, exp NELBO)")
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    if rows:
        centre = [_exp(r["nelbo"]) for r in rows]
        errors = [r.get("nelbo_stderr") or 0.0 for r in rows]
        below = [c - _exp(r["nelbo"] - e) for r, c, e in zip(rows, centre, errors)]
        above = [_exp(r["nelbo"] + e) - c for r, c, e in zip(rows, centre, errors)]
        steps = [r["step"] for r in rows]
        style = {"color": ACCENT, "marker": "o", "markersize": 3.5, "linewidth": 1.5, "capsize": 3}
        axes.errorbar(steps, centre, yerr=[below, above], label="model (± one standard error)", **style)
    for name, value in reference.items():
        axes.axhline(value, color=MUTED, linestyle="--", linewidth=1.2, label=f"{name} {value:.4g}")


def _exp(nats: float) -> float:
    return math.exp(min(nats, 100.0))  # a model gone wrong still gives a picture
