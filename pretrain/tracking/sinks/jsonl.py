"""JSON lines in the run folder: the record of the run, always written.

``metrics.jsonl`` has only what the configuration, the data and the step determine, so the file of a run that was
interrupted and resumed is byte for byte that of a run that was not. Seconds, tokens/s and MFU differ from run to run
and go to ``throughput.jsonl``. Every record is one line, appended by one write: a crash can tear the last line only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bd3_common.atomic import write_bytes
from pretrain.run_folder.layout import METRICS, THROUGHPUT
from pretrain.tracking.metrics import parse_records
from pretrain.tracking.sinks import MetricSink

_TIMED = ("throughput", "checkpoint")


class Jsonl(MetricSink):
    """Appends records to ``metrics.jsonl`` and ``throughput.jsonl``.

    Opening drops the records of later steps than ``resume_step``, and a torn last line, so that a run continues from
    its checkpoint as if the lost steps had not been written.

    Raises:
        ConfigError: a line other than the last is not a record.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, resume_step: int = 0, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(folder, resume_step, config)
        paths = [folder / METRICS, folder / THROUGHPUT]
        kept, _ = (_truncate(path, resume_step) for path in paths)
        self._newest = kept[-2:]  # a step has one of training and one of validation
        self._metrics, self._throughput = (path.open("ab", buffering=0) for path in paths)

    def has(self, split: str, step: int) -> bool:
        """True if the run had a record of this split and step when it was opened."""
        return any(record["split"] == split and record["step"] == step for record in self._newest)

    def record(self, split: str, step: int, values: Mapping[str, int | float | None]) -> None:
        line = json.dumps({"step": step, "split": split, **values}) + "\n"
        (self._throughput if split in _TIMED else self._metrics).write(line.encode())

    def sync(self) -> None:
        os.fsync(self._metrics.fileno())

    def close(self) -> None:
        self._metrics.close()
        self._throughput.close()


def _truncate(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Rewrite the file without the records of steps after ``last_step``; all of it stays until the rename.

    Returns:
        the records that are kept.
    """
    if not path.exists():
        return []
    kept = [(line, record) for line, record in parse_records(path) if record["step"] <= last_step]
    content = b"".join(line for line, _ in kept)
    if content != path.read_bytes():
        write_bytes(path, content)
    return [record for _, record in kept]
