"""Cutting files into parts that tasks can read side by side."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path

from data_prep.sources.kinds import Part, Source
from data_prep.sources.parquet import group_sizes


def split(source: Source, target_bytes: int = 64 << 20) -> list[Part]:
    """Cut a file into parts of about ``target_bytes`` stored bytes each, without reading it.

    Plain JSONL and text is cut by size alone, and local Parquet between row groups, from its footer; packed
    files, tars and remote Parquet are one part. Every document starts in exactly one part, and the parts in order
    give the documents in the order of the file. A part of a remote file is read from a copy of the whole file.

    Raises:
        DataError: local Parquet whose footer cannot be read, or pyarrow is missing.
    """
    target_bytes = max(1, target_bytes)
    if source.kind == "parquet" and not source.remote:
        return _row_groups(source, target_bytes)
    if source.compression is not None or source.kind not in ("jsonl", "text"):
        return [Part(source, 0, source.bytes)]
    count = max(1, round(source.bytes / target_bytes))
    edges = [source.bytes * i // count for i in range(count + 1)]
    return [Part(source, begin, end) for begin, end in pairwise(edges)]


def _row_groups(source: Source, target_bytes: int) -> list[Part]:
    """Neighbouring row groups together until they reach the target; their stored sizes are taken by proportion."""
    edges = [0, *accumulate(group_sizes(source, Path(source.path)))]
    stored = [source.bytes * edge // (edges[-1] or 1) for edge in edges]
    parts, begin, last = [], 0, len(edges) - 1
    for end in range(1, last + 1):
        if stored[end] - stored[begin] >= target_bytes or end == last:
            parts.append(Part(source, begin, end, stored=stored[end] - stored[begin]))
            begin = end
    return parts or [Part(source, 0, 0, stored=source.bytes)]
