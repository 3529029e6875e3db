"""Histograms of a data set: bars for a terminal, a PNG for people with a browser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pretrain.tracking.plots import ACCENT, INK, new_figure, save_figure

BAR = 40  # columns of the longest bar


def length_bins(lengths: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """(shortest, longest, documents) in bins of one octave: 0, 1, 2-3, 4-7, ...; none between filled ones is left out.

    Args:
        lengths: tokens of a document -> documents.
    """
    counts: dict[int, int] = {}
    for length, count in lengths.items():
        octave = max(length, 0).bit_length()
        counts[octave] = counts.get(octave, 0) + count
    if not counts:
        return []
    octaves = range(min(counts), max(counts) + 1)
    return [(1 << o >> 1, max(0, (1 << o) - 1), counts.get(o, 0)) for o in octaves]


def bar_lines(bins: list[tuple[int, int, int]]) -> list[str]:
    """One line a bin: ``    512-1023     48  ████████``; anything above zero shows."""
    most = max((count for *_, count in bins), default=0)
    labels = [str(low) if low == high else f"{low}-{high}" for low, high, _ in bins]
    width = max(map(len, labels), default=0)
    digits = len(f"{most:,}")
    return [
        f"{label:>{width}}  {count:>{digits},}  {'█' * math.ceil(BAR * count / most)}".rstrip()
        for label, (_, _, count) in zip(labels, bins)
    ]


def quantile(lengths: Mapping[int, int], share: float) -> int:
    """The smallest length that at least ``share`` of the documents do not exceed."""
    need, seen = share * sum(lengths.values()), 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= need:
            return length
    return 0


def plot_histograms(path: Path, lengths: Mapping[str, Mapping[int, int]], counts: Mapping[str, np.ndarray]) -> None:
    """Write a PNG: documents by length in quarters of an octave, and tokens by rank of frequency.

    Args:
        path: written atomically.
        lengths: by split, tokens of a document -> documents.
        counts: by split, occurrences of every id ``[V]``.

    Raises:
        OSError: it cannot be written.
    """
    figure = new_figure(10)
    left, right = figure.subplots(1, 2)
    longest = max((max(found, default=1) for found in lengths.values()), default=1)
    edges = 2.0 ** np.arange(0, math.log2(max(longest, 1)) + 0.5, 0.25) - 0.5  # whole numbers lie between edges
    for (name, found), colour in zip(lengths.items(), (INK, ACCENT)):
        places = np.maximum(np.array(list(found), float), 1)  # an empty document goes into the first bin
        left.hist(places, bins=edges, weights=list(found.values()), histtype="step", color=colour, label=name)
    for (name, found), colour in zip(counts.items(), (INK, ACCENT)):
        ranked = np.sort(found[found > 0])[::-1]
        right.plot(np.arange(1, len(ranked) + 1), ranked / ranked.sum(), color=colour, label=name)
    left.set(title="documents by length", xlabel="tokens", ylabel="documents", xscale="log")
    right.set(title="tokens by frequency", xlabel="rank", ylabel="share of tokens", xscale="log", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    save_figure(figure, path)
