"""Loss spikes and steps without a finite loss: skipped batches, and resumes from before a spike.

Losses and norms are equal on all ranks, so every rank's :class:`StabilityMonitor` decides the same. Its state after a
resume follows from ``metrics.jsonl`` up to the resumed step, so a killed run decides as one that was not killed.

A step without a finite loss and gradient makes no update (:mod:`bd3_megatron.engine.base`); its batch is recorded.
After a loss spike the run goes back to a checkpoint from before it and skips the batches around it, as in PaLM
(arXiv 2204.02311, section 5.1). The skipped range is on the disk before anything is undone. A checkpoint records how
many ranges it knows, so one that has trained on a batch skipped later is never used again.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bd3_common import schema
from bd3_common.atomic import write_bytes, write_text
from bd3_common.errors import ConfigError
from bd3_common.schema import Count, OpenRecord
from bd3_megatron.engine.base import StepResult
from bd3_megatron.parallel import World
from pretrain.checkpoint.folder import Checkpoint, folders, read_listing, step_of
from pretrain.checkpoint.reader import newest_on_all_ranks
from pretrain.config.schema import GuardConfig, RunConfig
from pretrain.distributed.collective_errors import mark_collective
from pretrain.distributed.collectives import gather_from_ranks, on_rank_0
from pretrain.distributed.wire_types import crosses_ranks
from pretrain.run_folder import layout
from pretrain.tracking.metrics import read_metrics
from pretrain.trainer.batches import Batches

_LOG = logging.getLogger(__name__)
_NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation


@crosses_ranks
@dataclass(frozen=True)
class Range:
    """Skipped steps ``first`` to ``last``; the losses of steps ``spike_first`` to ``spike_last`` were a spike."""

    first: Count
    last: Count
    spike_first: Count
    spike_last: Count


class _Ranges(OpenRecord):
    """The file of ranges."""

    ranges: list[Range]


@crosses_ranks
@dataclass(frozen=True)
class History:
    """State of the monitor, derived from the records of a run.

    Attributes:
        skipped: steps without an update.
        nonfinite: steps of the last ``guard.window`` without a finite loss and gradient.
        losses: (step, loss) of the last updates, as many as the spike detector needs.
    """

    skipped: int
    nonfinite: list[int]
    losses: list[tuple[int, float]]


class SpikeDetector:
    """Detector of losses that are high for several steps in a row; it depends on the last losses alone.

    A loss is high above ``median + spike * 1.4826 * MAD`` of the ``spike_window`` losses before it (MAD: median
    absolute deviation). With fewer losses before it, none is high.
    """

    def __init__(self, config: GuardConfig):
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.high: list[int] = []

    def observe(self, step: int, loss: float) -> tuple[int, int] | None:
        """Add the loss of a step; returns first and last step of the spike that it completes, or None."""
        limit = self.limit()
        self.high = [*self.high, step] if limit is not None and loss > limit else []
        self.losses.append(loss)
        return (self.high[0], step) if len(self.high) >= self.config.spike_patience else None

    def limit(self) -> float | None:
        """Threshold above which the next loss is high; None while too few are known."""
        if self.config.spike is None or len(self.losses) < self.config.spike_window:
            return None
        median = statistics.median(self.losses)
        spread = statistics.median([abs(loss - median) for loss in self.losses])
        return median + self.config.spike * _NORMAL * spread


class StabilityMonitor:
    """Monitor of loss spikes and nonfinite losses, and list of skipped batches. All ranks call it.

    Args:
        batches: of the run, for the rows of a batch.
    """

    def __init__(self, config: RunConfig, run: Path, batches: Batches, world: World):
        self.config, self.options, self.run = config, config.guard, run
        self._batches, self._world = batches, world
        self.ranges: list[Range] = on_rank_0(lambda: read_ranges(run))
        self.spike: tuple[int, int] | None = None

    def resume(self, step: int) -> None:
        """Restore the state after ``step`` steps from the records of the run."""
        history = on_rank_0(lambda: self._at(step))
        self.skipped, self.nonfinite, self.spike = history.skipped, history.nonfinite, None
        self._detector = SpikeDetector(self.options)
        for earlier, loss in history.losses:
            self._detector.observe(earlier, loss)

    def skips(self, step: int) -> bool:
        """True if the batch of step ``step`` (1 is the first) is to be skipped."""
        by_hand = any(first <= step <= last for first, last in self.options.ranges())
        return by_hand or any(found.first <= step <= found.last for found in self.ranges)

    def fields(self, result: StepResult | None) -> dict[str, Any]:
        """Fields of a step for ``metrics.jsonl``; a skipped batch (None) has no gradient norm."""
        if result is None:
            return {"loss": None, "skipped": 1}
        numbers = {"loss": result.loss, "grad_norm": result.grad_norm}
        values = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        return values if result.applied else values | {"skipped": 1}

    def after(self, step: int, result: StepResult | None, lr: float) -> None:
        """Count a recorded step; sets ``self.spike`` if the step completes a loss spike.

        Raises:
            ConfigError: too many steps without a finite loss and gradient.
        """
        if result is None or not result.applied:
            self.skipped += 1
        if result is None:
            return
        if result.applied:
            self.spike = self._detector.observe(step, result.loss) if self.options.spike is not None else None
            return
        nonfinite = gather_from_ranks(lambda: (self._world.data_rank, result.nonfinite_batches))
        path = on_rank_0(lambda: self._write_batch(step, result, nonfinite))
        limit, window = self.options.nonfinite, self.options.window
        self.nonfinite = [earlier for earlier in [*self.nonfinite, step] if earlier > step - window]
        _LOG.warning(
            f"step {step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}: no update "
            f"({len(self.nonfinite)} of guard.nonfinite={limit} in {window} steps); its batch is in {path}"
        )
        if len(self.nonfinite) >= limit:
            raise mark_collective(
                ConfigError(
                    f"guard.nonfinite={limit}: no finite loss and gradient in steps "
                    f"{' '.join(map(str, self.nonfinite))} (batches in {path.parent}); lower train.lr={lr:g} in "
                    f"another --run, or go on with --guard.skip {self.nonfinite[0]}-{step}, or raise guard.nonfinite"
                )
            )

    def go_back(self) -> Checkpoint:
        """Skip the batches around ``self.spike`` from now on; returns the newest checkpoint from before the spike.

        Raises:
            ConfigError: the run went back ``guard.spike_limit`` times already, or there is no such checkpoint.
        """
        first, last = self.spike
        options, known = self.options, list(self.ranges)
        begin, end = max(1, first - options.spike_before), last + options.spike_after
        cause = f"the losses of steps {first} to {last} are a spike (last {self._detector.losses[-1]:.4g})"
        if len(known) >= options.spike_limit:
            raise mark_collective(
                ConfigError(
                    f"guard.spike_limit={options.spike_limit}: {cause}, and {len(known)} ranges of steps are left out "
                    f"already ({self.run / layout.SKIPPED_RANGES}); lower train.lr={self.config.train.lr:g} in "
                    f"another --run, or raise guard.spike_limit"
                )
            )
        found = newest_on_all_ranks(
            self.run,
            self._world,
            usable=lambda step, meta: step < begin and not undone(known, step, meta),
        )
        if found is None:
            raise mark_collective(
                ConfigError(
                    f"guard.spike={options.spike:g}: {cause}, and there is no checkpoint from before step {begin}; "
                    f"start another --run with --guard.skip {begin}-{end} or a lower train.lr, or a smaller "
                    f"checkpoint.every"
                )
            )
        self.ranges = [*known, Range(begin, end, first, last)]
        on_rank_0(lambda: self._remember())
        _LOG.warning(
            f"{cause}: going back to step {found.step} and leaving out steps {begin} to {end} "
            f"({len(self.ranges)} of guard.spike_limit={options.spike_limit}, {self.run / layout.SKIPPED_RANGES})"
        )
        return found

    def _remember(self) -> None:
        ranges = [asdict(found) for found in self.ranges]
        write_text(self.run / layout.SKIPPED_RANGES, json.dumps({"ranges": ranges}, indent=1) + "\n")
        _remove_undone(self.run, self.ranges)

    def _at(self, step: int) -> History:
        _remove_undone(self.run, self.ranges)
        for other, path in layout.skipped_batches(self.run).items():
            if other > step:
                path.unlink()
        return read_history(self.run, step, self.options)

    def _write_batch(self, step: int, result: StepResult, nonfinite: Sequence[tuple[int, tuple[int, ...]]]) -> Path:
        """Write the rows of a step's global batch; rows of micro-batches with a nonfinite loss are marked."""
        batches, train = self._batches, self.config.train
        stream, position = batches.stream, step - 1
        slots = stream.slots(position, batches.global_batch, 0, 1)
        epochs, numbers = stream.at(position * batches.global_batch + slots)
        flagged: set[int] = set()
        for rank, micros in nonfinite:
            mine = stream.slots(position, batches.global_batch, rank, self._world.data_size).tolist()
            flagged.update(slot for n in micros for slot in mine[n * train.micro_batch : (n + 1) * train.micro_batch])
        rows = [
            {"slot": slot, "epoch": epoch, "number": number, **place} | ({"suspect": True} if slot in flagged else {})
            for slot, epoch, number, place in zip(
                slots.tolist(), epochs.tolist(), numbers.tolist(), stream.locate(numbers)
            )
        ]
        head = {
            "step": step,
            "reason": "loss" if not math.isfinite(result.loss) else "gradient norm",
            "loss": str(result.loss),
            "grad_norm": str(result.grad_norm),
            "split": stream.readers[0].split,
            "noise_seed": batches.noise_seed,
        }
        lines = ",\n  ".join(map(json.dumps, rows))
        path = layout.skipped_batch(self.run, step)
        path.parent.mkdir(exist_ok=True)
        write_bytes(path, f'{json.dumps(head)[:-1]},\n "rows": [\n  {lines}\n ]}}\n'.encode())
        return path


def read_history(run: Path, step: int, options: GuardConfig) -> History:
    """Derive the history of a run's first ``step`` steps from its records."""
    records = [r for r in read_metrics(run) if r["split"] == "train" and r["step"] <= step]
    nonfinite = [r["step"] for r in records if r.get("skipped") and "grad_norm" in r]
    last = (r for r in reversed(records) if not r.get("skipped") and r.get("loss") is not None)
    wanted = options.spike_window + options.spike_patience if options.spike is not None else 0
    losses = [(r["step"], r["loss"]) for r, _ in zip(last, range(wanted))][::-1]
    return History(
        skipped=sum(1 for r in records if r.get("skipped")),
        nonfinite=[earlier for earlier in nonfinite if earlier > step - options.window],
        losses=losses,
    )


def read_ranges(run: Path) -> list[Range]:
    """Ranges that a run skips after spikes, in the order of the decisions.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return schema.read(run / layout.SKIPPED_RANGES, _Ranges, "put back what bd3 pretrain wrote", ConfigError).ranges
    except (FileNotFoundError, NotADirectoryError):
        return []


def undone(ranges: Sequence[Range], step: int, meta: Mapping[str, Any]) -> bool:
    """True for a checkpoint that has trained on batches skipped later: it knows too few ranges for its step."""
    return any(step >= found.first for found in ranges[meta.get("skips", 0) :])


def check_skips(run: Path, options: GuardConfig, step: int) -> None:
    """Check that a run that goes on from ``step`` has not trained on a batch of ``guard.skip``.

    Raises:
        ConfigError: it has; names the checkpoint to go back to.
    """
    if not options.skip or step == 0:
        return
    trained = [r["step"] for r in read_metrics(run) if r["split"] == "train" and not r.get("skipped")]
    for text, (first, last) in zip(options.skip, options.ranges()):
        done = [number for number in trained if first <= number <= min(last, step)]
        if done:
            steps = [step_of(path) for path in folders(run)]
            before = [number for number in steps if number < done[0]]
            back = (
                f"remove the checkpoints after that of step {before[-1]} from {run / layout.CHECKPOINTS} to go back "
                f"to it"
                if before
                else "there is no checkpoint from before it, so use another --run"
            )
            raise ConfigError(
                f"guard.skip={text}: step {done[0]} is trained already, and the run goes on from step {step}; "
                f"{back}, or give steps from {step + 1} on"
            )


def _remove_undone(run: Path, ranges: Sequence[Range]) -> None:
    """Remove checkpoints that will never be used again, so that retention does not count them."""
    for path in folders(run) if ranges else ():
        listing = read_listing(path)
        if isinstance(listing, dict) and undone(ranges, listing["step"], listing["meta"]):
            shutil.rmtree(path, ignore_errors=True)
