"""JSON lines in the run folder: the record of the run, always written.

``metrics.jsonl`` has only what the configuration, the data and the step determine, so the file of a run that was
interrupted and resumed is byte for byte that of a run that was not. Seconds, tokens/s and MFU differ from run to run
and go to ``throughput.jsonl``. Every record is one line: a crash can tear the last line only.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bd3_common.atomic import open_append, write_bytes
from bd3_common.errors import ConfigError
from bd3_common.lines import append_line
from pretrain.run_folder.layout import METRICS, THROUGHPUT
from pretrain.tracking.metrics import parse_records
from pretrain.tracking.sinks import MetricSink

_LOG = logging.getLogger(__name__)
_TIMED = ("throughput", "checkpoint")


class RecordFile:
    """A file of records, open to append by this process alone.

    Attributes:
        kept: the records that it had when it was opened.
        count, bytes: records in the file, and their size.

    Raises:
        ConfigError: a line other than the last is not a record.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        self.kept = _truncate(path, last_step)
        self._file = os.fdopen(open_append(path), "ab", buffering=0)
        status = os.fstat(self._file.fileno())
        self._inode = (status.st_dev, status.st_ino)
        self.count, self.bytes = len(self.kept), status.st_size

    def append(self, line: bytes) -> None:
        """Append a record, whole or not at all.

        Raises:
            ConfigError: the file was removed, replaced or changed since the last record.
            OSError: it cannot be written.
        """
        self._check()
        append_line(self._file.fileno(), line)
        self.count, self.bytes = self.count + 1, self.bytes + len(line)

    def sync(self) -> None:
        """Have the system write the file to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _check(self) -> None:
        try:
            status = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            status = None
        if status is None or (status.st_dev, status.st_ino) != self._inode:
            problem = "was removed, replaced, or moved with its folder"
        elif status.st_size != self.bytes:
            problem = f"has {status.st_size} bytes instead of {self.bytes}: another process changed it"
        else:
            return
        raise ConfigError(f"{self.path}: {problem} under the run, which ends; start it again from its last checkpoint")


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
        self.metrics, self.throughput = (RecordFile(folder / name, resume_step) for name in (METRICS, THROUGHPUT))
        self._newest = self.metrics.kept[-3:]  # a step has one of training, of validation and of a clip search

    def has(self, split: str, step: int) -> bool:
        """True if the run had a record of this split and step when it was opened."""
        return any(record["split"] == split and record["step"] == step for record in self._newest)

    def record(self, split: str, step: int, values: Mapping[str, int | float | None]) -> None:
        line = json.dumps({"step": step, "split": split, **values}) + "\n"
        (self.throughput if split in _TIMED else self.metrics).append(line.encode())

    def sync(self) -> None:
        self.metrics.sync()

    def close(self) -> None:
        self.metrics.close()
        self.throughput.close()


def _truncate(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Rewrite the file without the records of steps after ``last_step``; all of it stays until the rename.

    Returns:
        the records that are kept.
    """
    if not path.exists():
        return []
    parsed = parse_records(path)
    kept = [(line, record) for line, record in parsed if record["step"] <= last_step]
    content, found = b"".join(line for line, _ in kept), path.read_bytes()
    torn = len(found) - sum(len(line) for line, _ in parsed)
    if torn:
        _LOG.warning(f"{path}: the last line was torn; its {torn} bytes are cut off")
    if content != found:
        write_bytes(path, content)
    return [record for _, record in kept]
