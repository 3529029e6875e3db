"""Profiles: a trace of a few steps, and a snapshot of allocations when memory runs out."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bd3_common.atomic import atomic_file
from bd3_common.errors import ConfigError
from pretrain.config.schema import ProfileConfig, RunConfig
from pretrain.run_folder.layout import PROFILE, memory_snapshot, trace_file

_LOG = logging.getLogger(__name__)
# Steps before a trace with profile.start=0: the first ones compile kernels and allocate buffers.
_WARM_UP = 2


class Profiler:
    """Traces the configured steps of this start of a run; writes ``<run>/profile/steps-N-M.rank-R.json.gz``.

    The trace is in Chrome's format (chrome://tracing, ui.perfetto.dev). Traced steps take longer than others.

    Args:
        folder: the run folder.
        rank: this process's rank.
        step: number of steps done before this process started.
    """

    def __init__(self, options: ProfileConfig, folder: Path, rank: int, step: int):
        self.options, self.folder, self.rank = options, folder, rank
        self._first = step + 1 + _WARM_UP if options.start == 0 else options.start
        self._profile: profile | None = None
        self._last: int | None = None
        if self._first is None or rank not in options.ranks:
            self._first = None
        elif self._first <= step:
            _LOG.warning(
                f"profile.start={self._first}: the run goes on after step {step}; use 0 or a later step for a trace"
            )
            self._first = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace step ``number`` (1 is the first), which runs inside the context, if it is a configured one."""
        if number == self._first:
            self._start()
        if self._profile is None:
            yield
            return
        with record_function(f"step {number}"):
            yield
        self._last = number
        if number == self._first + self.options.steps - 1:
            self.close()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        options = self.options
        self._profile = profile(activities=activities, record_shapes=options.shapes, profile_memory=options.memory)
        self._profile.start()

    def close(self) -> None:
        """Write the trace of the steps so far, if there is one; errors are logged as warnings."""
        if self._profile is None:
            if self._first is not None and self._last is None:
                _LOG.warning(
                    f"profile.start={self.options.start}: no trace, because the run ended before step {self._first}"
                )
            return
        traced, self._profile = self._profile, None
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            traced.stop()
            if self._last is not None:  # else the first step failed
                self._write(traced, self._last)
        except (OSError, RuntimeError) as error:
            _LOG.warning(f"no trace in {self.folder / PROFILE}: {' '.join(str(error).split())}")

    def _write(self, traced: profile, last: int) -> None:
        path = trace_file(self.folder, self._first, last, self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, suffix=path.suffix) as temporary:  # torch compresses a file named .gz
            traced.export_chrome_trace(str(temporary))
        _LOG.info(f"trace of steps {self._first} to {last}: {path}")


def record_allocations(options: ProfileConfig) -> None:
    """Record the stacks of the newest ``profile.memory_history`` allocations on this process's GPU."""
    if options.memory_history and torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=options.memory_history)


@contextlib.contextmanager
def out_of_memory(
    config: RunConfig, rank: int, phase: Callable[[], str], dump: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Turn torch's out-of-memory error into one line, and leave a snapshot in ``<run>/oom/rank-N.pickle``.

    Args:
        phase: returns the phase of the run, such as ``in step 12``.
        dump: writes the snapshot; None means torch's, on CUDA.

    Raises:
        ConfigError: memory ran out; names keys to change, and the snapshot.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        requested = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        where = f"{phase()} rank {rank} ran out of memory" + (f" when it asked for {requested[1]}" if requested else "")
        key, remedies = _remedies(config, "evaluation" in where)
        snapshot = _snapshot(memory_snapshot(Path(config.run), rank), dump)
        raise ConfigError(f"{key}: {where}; use {' or '.join(remedies)}; {snapshot}") from None


def _remedies(config: RunConfig, evaluating: bool) -> tuple[str, list[str]]:
    """The key to change, and one or two settings that need less memory, the cheapest in time first."""
    train, parallel, model = config.train, config.parallel, config.model
    if evaluating:
        rows = config.eval.micro_batch or train.micro_batch
        key, smaller = f"eval.micro_batch={rows}", [f"eval.micro_batch={rows // 2}"] if rows > 1 else []
    else:
        rows = train.micro_batch
        fitting = [size for size in range(1, rows) if rows % size == 0]
        key, smaller = f"train.micro_batch={rows}", [f"train.micro_batch={size}" for size in fitting[-1:]]
        if parallel.recompute != "full":
            smaller.append(f"parallel.recompute={'selective' if parallel.recompute == 'none' else 'full'}")
        if config.zero.stage == 0 and not parallel.distributed_optimizer:
            smaller.append("parallel.distributed_optimizer=true on more ranks")
    wider = 2 * parallel.tensor
    if all(size % wider == 0 for size in (model.heads, model.groups, model.ffn)):
        smaller.append(f"parallel.tensor={wider}")
    return key, (smaller or ["a smaller model"])[:2]


def _snapshot(path: Path, dump: Callable[[str], None] | None) -> str:
    """Write the snapshot and return a message that names it or the error."""
    if dump is None:
        if not torch.cuda.is_available():
            return "there is no snapshot without CUDA"
        dump = torch.cuda.memory._dump_snapshot
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, suffix=path.suffix) as temporary:
            dump(str(temporary))
    except (OSError, RuntimeError) as error:
        return f"no snapshot could be written: {' '.join(str(error).split())}"
    return f"pytorch.org/memory_viz shows what was allocated from {path}"
