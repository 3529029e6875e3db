"""A run's numbers as JSON lines: what was computed apart from how fast.

``metrics.jsonl`` holds only what the configuration, the data and the step determine, so the file of a run
that was interrupted and resumed is byte for byte that of a run that was not. Seconds, tokens/s and MFU differ
from run to run and go to ``throughput.jsonl``. Every record is one line, appended by one write: a crash can
tear the last line only.
"""

from __future__ import annotations

import json
import numbers
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bd3_common.atomic import write_bytes
from bd3_common.errors import ConfigError
from pretrain.run_folder.layout import METRICS, TENSORBOARD, THROUGHPUT


class MetricsWriter:
    """Appends records to a run folder; only one rank opens it.

    Opening drops the records of later steps than ``resume_step``, and a torn last line, so that a run
    continues from its checkpoint as if the lost steps had not been written.

    Args:
        run_dir: the run folder, which exists.
        resume_step: step of the checkpoint the run continues from; 0 for a new run.
        tensorboard: also write TensorBoard scalars under ``tensorboard/``.

    Raises:
        ConfigError: a line other than the last is not a record.
        OSError: the folder cannot be written.
    """

    def __init__(self, run_dir: Path, resume_step: int = 0, tensorboard: bool = False) -> None:
        paths = [run_dir / METRICS, run_dir / THROUGHPUT]
        kept, _ = (_truncate(path, resume_step) for path in paths)
        self._newest = kept[-2:]  # a step has one of training and one of validation
        self._metrics, self._throughput = (path.open("ab", buffering=0) for path in paths)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=resume_step + 1)

    def has(self, split: str, step: int) -> bool:
        """Whether the run had a record of this split and step when it was opened."""
        return any(record["split"] == split and record["step"] == step for record in self._newest)

    def train(self, step: int, fields: Mapping[str, Any]) -> None:
        """Record an optimizer step: loss, grad_norm, lr, tokens, ... (numbers only)."""
        self._record(self._metrics, "train", step, fields)

    def validation(self, step: int, fields: Mapping[str, Any]) -> None:
        """Record an evaluation after ``step``: nelbo and nelbo_stderr (nats per token), perplexity, ..."""
        self._record(self._metrics, "validation", step, fields)

    def throughput(self, step: int, fields: Mapping[str, Any]) -> None:
        """Record what the clock says about a step: seconds_per_step, tokens_per_second, mfu, ..."""
        self._record(self._throughput, "throughput", step, fields)

    def checkpoint(self, step: int, fields: Mapping[str, Any]) -> None:
        """Record what the clock says about a checkpoint: stall_seconds, write_seconds, bytes."""
        self._record(self._throughput, "checkpoint", step, fields)

    def sync(self) -> None:
        """Have the system write the records to the disk: those that lead to a checkpoint must not be lost before it."""
        os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._throughput.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, file: Any, split: str, step: int, fields: Mapping[str, Any]) -> None:
        values = {name: plain(value) for name, value in fields.items()}
        line = json.dumps({"step": step, "split": split} | values) + "\n"
        file.write(line.encode())
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(f"{split}/{name}", value, step)


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
    return [record for _, record in _parse(run_dir / name)]


def series(records: Iterable[Mapping[str, Any]], split: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one field: ``series(records, "validation", "perplexity")``."""
    pairs = [(r["step"], r[name]) for r in records if r["split"] == split and r.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _parse(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Whole lines of the file with what they say."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            whole = line.endswith(b"\n") and isinstance(record["step"], int) and isinstance(record["split"], str)
        except (ValueError, TypeError, KeyError):
            whole = False
        if whole:
            parsed.append((line, record))
        elif number < len(lines):
            raise ConfigError(f"{path}: line {number} is not a record; delete that line")
    return parsed


def _truncate(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Rewrite the file without the records of steps after ``last_step``; all of it stays until the rename.

    Returns:
        the records that are kept.
    """
    if not path.exists():
        return []
    kept = [(line, record) for line, record in _parse(path) if record["step"] <= last_step]
    content = b"".join(line for line, _ in kept)
    if content != path.read_bytes():
        write_bytes(path, content)
    return [record for _, record in kept]
