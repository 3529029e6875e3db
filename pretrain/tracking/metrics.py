"""The numbers of a run: the writer that gives them to metric sinks, and the reader of the run's own record."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from bd3_common import schema
from bd3_common.errors import ConfigError, UserError
from bd3_common.schema import Count, Record
from pretrain.run_folder.layout import METRICS
from pretrain.tracking.sinks import METRIC_SINKS, MetricSink

_LOG = logging.getLogger(__name__)

MAX_RECORDS = 4 << 30
"""bytes of a record of metrics: a run of millions of steps has some hundred MB"""


class MetricRecord(Record):
    """One line of the record: besides step and split only numbers."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)
    __pydantic_extra__: dict[str, int | float | bool | None]

    step: Count
    split: str


class MetricsWriter:
    """Gives the numbers of a run to its sinks; rank 0 alone opens it.

    Args:
        run_dir: the run folder, which exists.
        resume_step: step of the checkpoint the run continues from; 0 for a new run.
        sinks: names of :data:`METRIC_SINKS` besides ``jsonl``, which is always written.
        config: the resolved configuration as nested plain values, for sinks that show it.
        expected: :meth:`position` when the checkpoint was written; a warning names records that are gone since.

    Raises:
        ConfigError: a sink cannot be opened, or a line of the run's record is damaged.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_step: int = 0,
        sinks: Iterable[str] = (),
        config: Mapping[str, Any] | None = None,
        expected: Mapping[str, Any] | None = None,
    ) -> None:
        from pretrain.tracking.sinks.jsonl import Jsonl

        self._record_file = Jsonl(run_dir, resume_step)
        _warn_of_missing(run_dir / METRICS, resume_step, expected or {}, self.position())
        self._sinks: list[MetricSink] = [self._record_file]
        try:
            for name in dict.fromkeys(sinks):
                if name != "jsonl":
                    self._sinks.append(METRIC_SINKS.load(name)(run_dir, resume_step, config))
        except BaseException:
            self.close()
            raise

    def has(self, split: str, step: int) -> bool:
        """True if the run had a record of this split and step when it was opened."""
        return self._record_file.has(split, step)

    def position(self) -> dict[str, int]:
        """Number of records in the run's record, and their bytes: a checkpoint says which of them belong to it."""
        file = self._record_file.metrics
        return {"records": file.count, "record_bytes": file.bytes}

    def train(self, step: int, fields: Mapping[str, Any]) -> None:
        """Record an optimizer step: loss, grad_norm, lr, tokens, ... (numbers only)."""
        self._record("train", step, fields)

    def validation(self, step: int, fields: Mapping[str, Any]) -> None:
        """Record an evaluation after ``step``: nelbo and nelbo_stderr (nats per token), perplexity, ..."""
        self._record("validation", step, fields)

    def clip_search(self, step: int, fields: Mapping[str, Any]) -> None:
        """Record a search for the clip interval: beta, omega, variance of the block loss there and before, ..."""
        self._record("clip_search", step, fields)

    def throughput(self, step: int, fields: Mapping[str, Any]) -> None:
        """Record the speed of a step by the clock: seconds_per_step, tokens_per_second, mfu, ..."""
        self._record("throughput", step, fields)

    def checkpoint(self, step: int, fields: Mapping[str, Any]) -> None:
        """Record the cost of a checkpoint by the clock: stall_seconds, write_seconds, bytes."""
        self._record("checkpoint", step, fields)

    def sync(self) -> dict[str, int]:
        """Have the system write the records to the disk: those that lead to a checkpoint must not be lost before it.

        Returns:
            :meth:`position`.
        """
        for sink in self._sinks:
            sink.sync()
        return self.position()

    def close(self) -> None:
        """Close the sinks."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, split: str, step: int, fields: Mapping[str, Any]) -> None:
        values = {name: plain(value) for name, value in fields.items()}
        for sink in self._sinks:
            sink.record(split, step, values)


def _warn_of_missing(path: Path, step: int, expected: Mapping[str, Any], found: Mapping[str, int]) -> None:
    """Name the records up to a checkpoint's step that the file has no longer."""
    counts = [count if isinstance(count := expected.get(name), int) else 0 for name in ("records", "record_bytes")]
    if found["records"] < counts[0]:
        lost = f"{counts[0] - found['records']} of {counts[0]} records"
    elif found["record_bytes"] < counts[1] and found["records"] == counts[0]:
        lost = f"{counts[1] - found['record_bytes']} of {counts[1]} bytes"
    else:
        return
    _LOG.warning(f"{path}: {lost} up to step {step} are gone since its checkpoint was written; the run goes on without")


def plain(value: Any) -> int | float | None:
    """A number of Python, NumPy or torch as an int or float that JSON writes with all its digits.

    Raises:
        TypeError: the value is not one number.
    """
    if hasattr(value, "item"):
        value = value.item()
    if value is None or (isinstance(value, numbers.Real) and not isinstance(value, bool)):
        return value if value is None or isinstance(value, int) else float(value)
    raise TypeError(f"a metric is a number, not {value!r}")


def read_metrics(run_dir: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """Records of a run in the order written: ``{"step": 10, "split": "train", "loss": 3.2, ...}``.

    A torn last line is left out; a run that has no file yet gives an empty list.

    Raises:
        ConfigError: a line other than the last is not a record.
    """
    return [record for _, record in parse_records(run_dir / name)]


def series(records: Iterable[Mapping[str, Any]], split: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one field: ``series(records, "validation", "perplexity")``."""
    pairs = [(r["step"], r[name]) for r in records if r["split"] == split and r.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def parse_records(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Whole lines of the file with their records; a torn last line is left out.

    Raises:
        ConfigError: a line other than the last is not a record.
    """
    if not path.exists():
        return []
    lines = schema.read_bytes(path, ConfigError, MAX_RECORDS).splitlines(keepends=True)
    parsed = []
    for number, line in enumerate(lines, start=1):
        record = parse_record(line)
        if record is not None and line.endswith(b"\n"):
            parsed.append((line, record))
        elif number < len(lines):
            raise ConfigError(f"{path}: line {number} is not a record; delete that line")
    return parsed


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if it holds none."""
    try:
        return schema.parse(line, MetricRecord, METRICS, nan=True).model_dump()
    except UserError:
        return None
