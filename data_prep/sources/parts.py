"""Cutting files into parts that tasks can read side by side."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from data_prep.sources.kinds import Part, Source
from data_prep.sources.parquet import group_bytes


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
    """Neighbouring row groups together until they reach the target."""
    sizes = group_bytes(source, Path(source.path))
    total = sum(sizes)
    parts, begin, held = [], 0, 0
    for end, size in enumerate(sizes, start=1):
        held += size
        if held >= target_bytes or end == len(sizes):
            before, after = (source.bytes * sum(sizes[:edge]) // (total or 1) for edge in (begin, end))
            parts.append(Part(source, begin, end, stored=after - before))
            begin, held = end, 0
    return parts or [Part(source, 0, 0, stored=source.bytes)]
