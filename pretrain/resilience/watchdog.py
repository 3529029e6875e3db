"""Hang watchdog: ends a job that hangs within ``parallel.timeout_minutes`` and names the hung ranks.

On every rank a thread writes a report on its main thread to the rendezvous store at every beat. A few ranks, the
observers, read all reports (:mod:`pretrain.resilience.hang_detection`). The first observer to find a hang prints one
line and publishes the hang; every rank then writes its stacks, kills the silent processes of its own machine (SIGTERM
does not end a stopped one) and exits with :data:`HUNG`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from bd3_common import schema
from bd3_common.exit_codes import FAILED, HUNG
from bd3_common.text import printable
from pretrain.distributed.collectives import on_rank_0
from pretrain.distributed.ranks import Ranks
from pretrain.distributed.signed_store import NotSigned, SignedStore
from pretrain.resilience.hang_detection import Hang, Observer, Process, Report, find_hang, message, stack_file
from pretrain.resilience.heartbeat import HeartbeatWriter
from pretrain.resilience.stacks import locate, start_mark, write_stacks, write_state
from pretrain.resilience.stderr import write_line
from pretrain.run_folder import events

# Fractions of the timeout. The limit leaves time to publish the hang, write stacks and exit.
_LIMIT, _BEAT, _REPORTING = 0.7, 1 / 20, 1 / 10
_LONGEST_BEAT, _LONGEST_REPORTING = 5.0, 20.0  # seconds
_LAST_REPORT = 2.0  # seconds for the last report of a rank that ends
_NAMED = 4  # processes in the message


class Published(schema.Record):
    """The end of a job, as the rank that found it tells the others.

    Attributes:
        failed: a rank that failed alone; empty for a hang.
        silent: processes without a sign of life, which the ranks on the same machine kill.
        alive: number of ranks that write their stacks.
    """

    failed: str = ""
    silent: tuple[Process, ...] = ()
    alive: schema.Count = 0


class Watchdog:
    """The watchdog of one rank, from :func:`bd3_megatron.parallel.start` to the end of the context.

    In a world of 1 it only writes the stacks of a main thread that stalls.

    Args:
        timeout_minutes: time from the last progress within which a hang is found and the job ended.
        folder: folder of the stacks (``rank-00003.txt``) in the run folder.
        key: of this start of the job; values in the store are signed with it, because any process that reaches the
            store's port can write there.
    """

    def __init__(self, ranks: Ranks, timeout_minutes: float, folder: Path, key: bytes = b""):
        self.ranks, self.folder, self.timeout_minutes, self._key_bytes = ranks, folder, timeout_minutes, key
        timeout = 60 * timeout_minutes
        self.limit, self.interval = _LIMIT * timeout, min(_BEAT * timeout, _LONGEST_BEAT)
        self.reporting = min(_REPORTING * timeout, _LONGEST_REPORTING)
        self._state = (0, "at the start", True, time.monotonic())
        self._main = threading.get_ident()
        self._leaving, self._exiting = threading.Event(), threading.Lock()
        self._failure = ""
        self._threads: list[threading.Thread] = []
        self._heartbeat = HeartbeatWriter(folder.parent, timeout, lambda: self._state[:3], self._alone_stalled)
        if ranks.world_size > 1:
            self._join()
            for loop in (self._report_loop, self._store_loop):
                self._threads.append(threading.Thread(target=loop, name=f"watchdog {loop.__name__}", daemon=True))
                self._threads[-1].start()

    def start_heartbeat(self) -> None:
        """Start rank 0's heartbeat in the run folder, after this job has claimed the folder."""
        if self.ranks.rank == 0:
            self._heartbeat.start()

    def tick(self, phase: str, may_take_long: bool = False) -> None:
        """Note progress of the main thread.

        Args:
            phase: for messages, such as ``in step 12``.
            may_take_long: until the next tick only signs of life are expected, no progress.
        """
        self._state = (self._state[0] + 1, phase, may_take_long, time.monotonic())

    @property
    def phase(self) -> str:
        """Phase of the main thread, such as ``in step 12``."""
        return self._state[1]

    def close(self, error: BaseException | None = None) -> None:
        """Stop watching this rank: the others no longer wait for it. Blocks while the watchdog ends the job.

        Args:
            error: the exception that ends the rank. Unless all ranks raise it, the others are ended, too.
        """
        if self._leaving.is_set():
            return
        if isinstance(error, Exception) and not getattr(error, "collective", False):
            self._failure = f"rank {self.ranks.rank} failed ({type(error).__name__})"
        self._leaving.set()
        self._heartbeat.stop()
        for thread in self._threads[:1]:
            thread.join(min(4 * self.interval, _LAST_REPORT))
        self._exiting.acquire()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        self.close(error)

    # ---- the store ----

    def _join(self) -> None:
        """Broadcast a prefix for keys in the store, which may still hold those of an earlier start of the job."""
        ranks = self.ranks
        mine = Process(ranks.rank, socket.gethostname(), os.getpid(), start_mark())
        self._connect()
        names = uuid.uuid4().hex[:12]
        if ranks.rank == 0:
            # Reading a missing key would block.
            keys = [f"{names}/{name}" for name in ("hang", *map(str, range(ranks.world_size)))]
            self._store.multi_set(keys, [""] * len(keys))
        self._names, *first = on_rank_0(lambda: (names, *mine))
        self._first = Process(*first)
        self._beat, self._observer, self._times_found = 0, Observer(), 0
        self._observers = [0, *(2**power for power in range((ranks.world_size - 1).bit_length()))]
        self._everyone = [self._key(rank) for rank in range(ranks.world_size)]
        self._answers, self._read_at = 0, time.monotonic()
        self._store.set(self._key(f"process/{ranks.rank}"), json.dumps(mine))
        dist.barrier()

    def _connect(self, seconds: float = 60.0) -> None:
        # A separate connection, because the main thread's is locked while it waits for a key.
        ranks, timeout = self.ranks, datetime.timedelta(seconds=seconds)
        store = dist.TCPStore(
            ranks.master_addr, ranks.master_port, is_master=False, wait_for_workers=False, timeout=timeout
        )
        store.set_timeout(datetime.timedelta(minutes=2 * self.timeout_minutes))  # the store loop ends the job earlier
        self._store = SignedStore(store, self._key_bytes)

    def _key(self, name: object) -> str:
        return f"{self._names}/{name}"

    # ---- the two loops ----

    def _report_loop(self) -> None:
        """Write and read reports at every beat, until the main thread leaves or the job ends."""
        leaving = False
        try:
            while not leaving:
                leaving = self._leaving.wait(self.interval)
                try:
                    self._exchange(leaving)
                except RuntimeError:  # the store is gone or slow; the store loop measures for how long
                    if not leaving:
                        with contextlib.suppress(RuntimeError):
                            self._connect(self.interval)
        except NotSigned as error:
            write_line(f"rank {self.ranks.rank}: {error}")
            os._exit(FAILED)
        except Exception as error:  # a bug in here must not look like a silent rank
            write_line(f"rank {self.ranks.rank}: its watchdog stops: {error!r}")
            self._leaving.set()
            with contextlib.suppress(RuntimeError):
                self._store.set(self._key(self.ranks.rank), self._report(leaving=True).encode())

    def _store_loop(self) -> None:
        """End this rank when the store has not answered for too long."""
        answers, quiet, before = self._answers, 0.0, time.monotonic()
        # Rank 1, which does not serve the store, prints the line first; then local rank 0 of each machine.
        prints_first = self.ranks.rank == 1
        limit = self.limit if prints_first else self.limit + self.interval
        while not self._leaving.wait(self.interval):
            now = time.monotonic()
            # At most two beats count: if this process was stopped meanwhile, the store is not to blame.
            quiet, before = quiet + min(now - before, 2 * self.interval), now
            if answers != self._answers:
                answers, quiet = self._answers, 0.0
            if quiet >= limit:
                self._end_without_store(quiet, prints_first or self.ranks.local_rank == 0)

    def _exchange(self, leaving: bool) -> None:
        self._beat += 1
        self._store.set(self._key(self.ranks.rank), self._report(leaving).encode())
        if self._failure:
            self._store.set(self._key("hang"), Published(failed=self._failure).model_dump_json())
            return
        if self.ranks.rank not in self._observers:
            published: str | bytes = self._store.get(self._key("hang"))
            self._answers += 1
        else:
            published, *texts = self._store.multi_get([self._key("hang"), *self._everyone])
            self._answers += 1
            if not published:
                published = self._observe([Report.decode(text) for text in texts])
        if published:
            self._end(schema.parse(published, Published, "the hang in the rendezvous store"))

    def _report(self, leaving: bool) -> Report:
        progress, phase, may_take_long, when = self._state
        waiting, place = None, ""
        if not leaving and not may_take_long and time.monotonic() - when > self.limit / 2:
            waiting, place = locate(self._main)
        return Report(self._beat, progress, phase, may_take_long, leaving, waiting, place)

    def _observe(self, reports: list[Report]) -> str:
        """Look for a hang in all ranks' reports; the published hang if this rank published one, else empty."""
        now = time.monotonic()
        # Between two reads at most two beats count: reports that were not read are not missing.
        seen = self._observer.update(dict(enumerate(reports)), min(now - self._read_at, 2 * self.interval))
        self._read_at = now
        hang = find_hang(seen, self.limit)
        if hang is None or self.ranks.rank not in seen:
            self._times_found = 0
            return ""
        # The lowest observer that does not hang publishes; the others only if it does not within a few beats.
        self._times_found += 1
        able = [rank for rank in self._observers if rank in seen and rank not in hang.ranks]
        first = not able or able[0] == self.ranks.rank
        if self._times_found <= (0 if first else 2):
            return ""
        if (
            self._store.add(self._key("found"), 1) > 1 and self._times_found < 8
        ):  # unless the first finder is lost as well
            return ""
        named = hang.ranks[:_NAMED] if hang.kind != "silent" else hang.ranks
        texts = self._store.multi_get([self._key(f"process/{rank}") for rank in named])
        processes = [schema.parse(text, Process, "a process in the rendezvous store") for text in texts]
        text = message(
            hang,
            {rank: s.report for rank, s in seen.items()},
            processes[:_NAMED],
            self.timeout_minutes,
            str(self.folder),
        )
        self._within(self.reporting, lambda: write_line(text))
        self._record(text, [process.host for process in processes])
        silent = processes if hang.kind == "silent" else []
        published = Published(silent=tuple(silent), alive=len(seen) - len(silent)).model_dump_json()
        self._store.set(self._key("hang"), published)
        return published

    # ---- exit ----

    def _end(self, published: Published) -> None:
        """Write stacks, wait until all ranks have, and exit; the line has been printed."""
        self._exiting.acquire()
        if published.failed:
            if self.ranks.local_rank == 0:
                write_line(f"rank {self.ranks.rank}: ends because {printable(published.failed)}")
            os._exit(FAILED)
        deadline = time.monotonic() + self.reporting
        self._within(self.reporting, self._write_stacks)
        try:
            written = self._store.add(self._key("written"), 1)
            # Launchers end all ranks when one has ended.
            while written < published.alive and time.monotonic() < deadline:
                time.sleep(self.interval / 4)
                written = self._store.add(self._key("written"), 0)
        except RuntimeError:
            pass  # the rank that served the store has ended
        self._exit(published.silent)

    def _end_without_store(self, quiet: float, prints: bool) -> None:
        self._exiting.acquire()
        ranks, silent = self.ranks, []
        if not ranks.store_served:  # rank 0 serves it
            silent = [self._first]
            reports = {0: Report(phase=self._state[1])}  # rank 0's own phase is unknown; all ranks are in the same
            hang = Hang("silent", (0,), quiet)
            text = message(hang, reports, silent, self.timeout_minutes, str(self.folder))
        else:
            text = (
                f"the launcher's store at {ranks.master_addr}:{ranks.master_port} has given no answer for "
                f"{quiet:.0f} s (parallel.timeout_minutes={self.timeout_minutes:g}): the job ends; "
                f"start the job again to go on from its last checkpoint"
            )
        if prints:
            self._within(self.reporting, lambda: write_line(text))
            self._record(text, [process.host for process in silent])
        self._within(self.reporting, self._write_stacks)
        time.sleep(2 * self.interval)  # the other ranks have to find it, too
        self._exit(silent)

    def _exit(self, silent: Sequence[Process]) -> None:
        here = [process for process in silent if process.host == socket.gethostname()]
        here = [process for process in here if start_mark(process.pid) == process.started]
        for process in here:
            path = Path(stack_file(str(self.folder), process.rank))
            self._within(self.interval, functools.partial(write_state, path, str(process), process.pid))
        for process in here:
            with contextlib.suppress(ProcessLookupError):  # another rank of this machine was faster
                os.kill(process.pid, signal.SIGKILL)
        os._exit(HUNG)

    def _alone_stalled(self) -> None:
        """Write the stacks of a single-process run; the supervisor may end it."""
        if self.ranks.world_size == 1:
            self._write_stacks()

    def _write_stacks(self) -> None:
        _, phase, _, when = self._state
        mine = Process(self.ranks.rank, socket.gethostname(), os.getpid())
        title = f"{mine}, {phase} for {time.monotonic() - when:.1f} s"
        write_stacks(Path(stack_file(str(self.folder), self.ranks.rank)), title)

    def _record(self, text: str, hosts: list[str]) -> None:
        self._within(self.interval, lambda: events.record(self.folder.parent, "hang", text=text, hosts=hosts))

    def _within(self, seconds: float, function: Callable[[], None]) -> None:
        """Call a function that may itself hang (pipe without reader, dead file system); wait ``seconds`` at most."""

        def tried() -> None:
            try:
                function()
            except OSError as error:
                write_line(f"rank {self.ranks.rank}: {error}")

        thread = threading.Thread(target=tried, daemon=True)
        thread.start()
        thread.join(seconds)
