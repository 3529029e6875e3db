"""Progress of a run for people: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from bd3_common import logs

_LOG = logging.getLogger(__name__)


class Throughput:
    """Speed over a moving window of steps.

    Args:
        step, tokens: optimizer steps and data tokens (L per row, not 2L) done before the first :meth:`mark`.
        useful_flops: FLOPs per data token of the work this objective needs; None leaves ``mfu`` out.
        model_flops: 6 N, the usual FLOPs per token; None leaves ``mfu_6nd`` out.
        peak_flops: FLOP/s of all devices together at their peak.
        window: steps the speed is taken over.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        step: int = 0,
        tokens: int = 0,
        *,
        useful_flops: float | None = None,
        model_flops: float | None = None,
        peak_flops: float | None = None,
        window: int = 50,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._flops = {"mfu": useful_flops, "mfu_6nd": model_flops}
        self._peak = peak_flops
        self._idle = 0.0
        self._marks: deque[tuple[float, int, int]] = deque([(self._now(), step, tokens)], maxlen=window + 1)

    def useful_flops(self, per_token: float) -> None:
        """The objective needs so many FLOPs per data token from now on."""
        self._flops["mfu"] = per_token

    def mark(self, step: int, tokens: int) -> dict[str, float]:
        """Note that ``step`` is done, with ``tokens`` data tokens in all; the speed of the window.

        Returns:
            ``seconds_per_step``, ``tokens_per_second`` and, where their FLOPs are known, ``mfu`` and
            ``mfu_6nd`` as fractions of the peak; empty while no time has passed.
        """
        self._marks.append((self._now(), step, tokens))
        (start, first_step, first_tokens), (end, *_) = self._marks[0], self._marks[-1]
        seconds, steps = end - start, step - first_step
        if seconds <= 0 or steps <= 0:
            return {}
        rate = (tokens - first_tokens) / seconds
        speed = {"seconds_per_step": seconds / steps, "tokens_per_second": rate}
        if self._peak:
            speed |= {name: rate * flops / self._peak for name, flops in self._flops.items() if flops}
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of an evaluation or a checkpoint."""
        start = self._clock()
        try:
            yield
        finally:
            self._idle += self._clock() - start

    def _now(self) -> float:
        return self._clock() - self._idle


class Progress:
    """Shows the steps of a run: a bar if ``stream`` is a terminal, else a log message every ``every`` steps.

    Args:
        total_steps: optimizer steps of the whole run.
        start_step: steps done before this process began.
        every: steps between lines where there is no terminal; the first and the last step always have one.
    """

    def __init__(self, total_steps: int, start_step: int = 0, every: int = 10, stream: TextIO | None = None) -> None:
        self._total, self._start, self._every = total_steps, start_step, every
        self._stream = stream if stream is not None else sys.stderr
        self._bar = self._task = None
        if self._stream.isatty():
            self._bar, self._task = _bar(self._stream, total_steps, start_step)
            self._messages = contextlib.ExitStack()
            self._messages.enter_context(logs.console_through(self._print_above))

    def update(self, step: int, fields: Mapping[str, Any]) -> None:
        """Show that ``step`` is done. Known fields: loss, grad_norm, lr, steps_skipped, seconds_per_step,
        tokens_per_second, mfu and mfu_6nd; those that are missing are not shown."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=describe(step, self._total, fields))
        elif step % self._every == 0 or step in (self._start + 1, self._total):
            _LOG.info(describe(step, self._total, fields))

    def _print_above(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop drawing; the bar's last state stays."""
        if self._bar is not None:
            self._bar.stop()
            self._messages.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def describe(step: int, total: int, fields: Mapping[str, Any]) -> str:
    """``step 4/40 | loss 3.214 | grad 0.52 | lr 1.0e-03 | 12.3k tok/s | MFU 41% (6ND 38%) | ETA 0:12:05``"""
    parts = [f"step {step}/{total}"]
    for name, key, form in (("loss", "loss", ".4g"), ("grad", "grad_norm", ".3g"), ("lr", "lr", ".1e")):
        if fields.get(key) is not None:
            parts.append(f"{name} {fields[key]:{form}}")
    if fields.get("steps_skipped"):
        parts.append(f"skipped {fields['steps_skipped']}")
    if fields.get("tokens_per_second") is not None:
        parts.append(f"{si(fields['tokens_per_second'])} tok/s")
    shares = [
        f"{name} {100 * fields[key]:.1f}%"
        for name, key in (("MFU", "mfu"), ("6ND", "mfu_6nd"))
        if fields.get(key) is not None
    ]
    if shares:
        parts.append(f"{shares[0]} ({shares[1]})" if len(shares) == 2 else shares[0])
    if fields.get("seconds_per_step") is not None:
        parts.append(f"ETA {duration((total - step) * fields['seconds_per_step'])}")
    return " | ".join(parts)


def si(value: float) -> str:
    """Three digits and a thousands letter: ``12345 -> "12.3k"``."""
    for letter in ("", "k", "M", "G"):
        if value < 999.5 or letter == "G":
            break
        value /= 1000
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{letter}"


def duration(seconds: float) -> str:
    """``3725 -> "1:02:05"``, ``200000 -> "2 d 7:33:20"``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hour}:{minute:02d}:{second:02d}"


def _bar(stream: TextIO, total: int, start: int) -> tuple[Any, Any]:
    """A started bar above a line of numbers, and its task."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
    from rich.table import Table
    from rich.text import Text

    class Stacked(Progress):
        def make_tasks_table(self, tasks: Any) -> Table:
            table = Table.grid(expand=True)
            for task in tasks:
                table.add_row(super().make_tasks_table([task]))
                table.add_row(Text(task.fields["numbers"], overflow="fold"))
            return table

    columns: list[ProgressColumn] = [BarColumn(bar_width=None), TextColumn("{task.percentage:>3.0f}%")]
    bar = Stacked(*columns, console=Console(file=stream), expand=True)
    task = bar.add_task("", total=total, completed=start, numbers="starting")
    bar.start()
    return bar, task
