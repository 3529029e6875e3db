"""A watch over the ranks of a job: a rank that hangs ends it, by name, within ``parallel.timeout_minutes``.

Every rank has a thread that tells the rendezvous store, at every beat, how far its main thread is. A few ranks, the
observers, read what all have told and judge it (:mod:`pretrain.resilience.hang_detection`). The first to find that the
job hangs prints one line and publishes the verdict; every rank that can then writes its stacks, kills a silent process
of its own machine (a stopped one cannot die of SIGTERM) and exits with :data:`HUNG`.
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
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from bd3_common.exit_codes import FAILED, HUNG
from pretrain.distributed.ranks import Ranks
from pretrain.resilience.hang_detection import Observer, Process, Report, Verdict, judge, message, stack_file
from pretrain.resilience.heartbeat import Heart
from pretrain.resilience.stacks import standing, start_mark, write_stacks, write_state
from pretrain.run_folder import events

# Shares of the timeout: to judge a rank leaves time to publish it, to write stacks and to exit.
_LIMIT, _BEAT, _LAST_WORDS = 0.7, 1 / 20, 1 / 10
_LONGEST_BEAT, _LONGEST_LAST_WORDS = 5.0, 20.0  # seconds
_GOODBYE = 2.0  # seconds
_NAMED = 4  # processes in the message


class Watchdog:
    """The watch of one rank, from :func:`bd3_megatron.parallel.start` on; leaving the context says goodbye.

    A world of 1 has nobody to wait for: there the watch only writes the stacks of a main thread that stalls.

    Args:
        folder: of the run folder, for stacks, ``rank-00003.txt``.
        timeout_minutes: within it a hang is found and the job ended, counted from the last progress.
    """

    def __init__(self, ranks: Ranks, timeout_minutes: float, folder: Path):
        self.ranks, self.folder, self.timeout_minutes = ranks, folder, timeout_minutes
        timeout = 60 * timeout_minutes
        self.limit, self.interval = _LIMIT * timeout, min(_BEAT * timeout, _LONGEST_BEAT)
        self.last_words = min(_LAST_WORDS * timeout, _LONGEST_LAST_WORDS)
        self._state = (0, "at the start", True, time.monotonic())
        self._main = threading.get_ident()
        self._leaving, self._ending = threading.Event(), threading.Lock()
        self._failure = ""
        self._threads: list[threading.Thread] = []
        self._heart = Heart(folder.parent, timeout, lambda: self._state[:3], self._alone_stalled)
        if ranks.world_size > 1:
            self._join()
            for loop in (self._beats, self._answers_come):
                self._threads.append(threading.Thread(target=loop, name=f"watchdog {loop.__name__}", daemon=True))
                self._threads[-1].start()

    def beat(self) -> None:
        """From now on the run folder is this job's: the first rank's heartbeat goes there."""
        if self.ranks.rank == 0:
            self._heart.start()

    def tick(self, phase: str, may_take_long: bool = False) -> None:
        """The main thread has got further.

        Args:
            phase: for messages, as in ``in step 12``.
            may_take_long: until the next tick no progress is expected, only that the process is alive.
        """
        self._state = (self._state[0] + 1, phase, may_take_long, time.monotonic())

    @property
    def phase(self) -> str:
        """Where the main thread is, as in ``in step 12``."""
        return self._state[1]

    def close(self, error: BaseException | None = None) -> None:
        """Say goodbye: this rank is no longer waited for. Does not return while the job is being ended.

        Args:
            error: what the rank ends of. If it fails alone, the others, who would wait for it, end with it.
        """
        if self._leaving.is_set():
            return
        if isinstance(error, Exception) and not getattr(error, "collective", False):
            self._failure = f"rank {self.ranks.rank} failed ({type(error).__name__})"
        self._leaving.set()
        self._heart.stop()
        for thread in self._threads[:1]:
            thread.join(min(4 * self.interval, _GOODBYE))
        self._ending.acquire()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        self.close(error)

    # ---- the store ----

    def _join(self) -> None:
        """Agree on names in the store: it may still hold those of an earlier start of the job."""
        ranks = self.ranks
        mine = Process(ranks.rank, socket.gethostname(), os.getpid(), start_mark())
        self._connect()
        shared = [(uuid.uuid4().hex[:12], mine)]
        if ranks.rank == 0:
            names = shared[0][0]
            keys = [f"{names}/{name}" for name in ("verdict", *map(str, range(ranks.world_size)))]
            self._store.multi_set(keys, [""] * len(keys))  # reading a key that is not there would wait for it
        dist.broadcast_object_list(shared, src=0)
        self._names, self._first = shared[0]
        self._beat, self._observer, self._found = 0, Observer(), 0
        self._observers = [0, *(2**power for power in range((ranks.world_size - 1).bit_length()))]
        self._everyone = [self._key(rank) for rank in range(ranks.world_size)]
        self._answers, self._read_at = 0, time.monotonic()
        self._store.set(self._key(f"process/{ranks.rank}"), json.dumps(mine))
        dist.barrier()

    def _connect(self, seconds: float = 60.0) -> None:
        # A connection of its own: the main thread's is locked while that waits for a key.
        ranks, timeout = self.ranks, datetime.timedelta(seconds=seconds)
        self._store = dist.TCPStore(
            ranks.master_addr, ranks.master_port, is_master=False, wait_for_workers=False, timeout=timeout
        )
        self._store.set_timeout(datetime.timedelta(minutes=2 * self.timeout_minutes))  # the other thread is faster

    def _key(self, name: object) -> str:
        return f"{self._names}/{name}"

    # ---- the two threads ----

    def _beats(self) -> None:
        """Tell and read at every beat, until the main thread leaves or the job ends."""
        leaving = False
        try:
            while not leaving:
                leaving = self._leaving.wait(self.interval)
                try:
                    self._exchange(leaving)
                except RuntimeError:  # the store is gone or slow; the other thread counts for how long
                    if not leaving:
                        with contextlib.suppress(RuntimeError):
                            self._connect(self.interval)
        except Exception as error:  # a mistake in here must not look like a silent rank
            _say(f"rank {self.ranks.rank}: its watchdog stops: {error!r}")
            self._leaving.set()
            with contextlib.suppress(RuntimeError):
                self._store.set(self._key(self.ranks.rank), self._report(leaving=True).encode())

    def _answers_come(self) -> None:
        """End this rank when the store has given no answer for too long."""
        answers, quiet, before = self._answers, 0.0, time.monotonic()
        # The first rank that does not serve the store speaks; others give it time, then one on each machine does.
        speaks_first = self.ranks.rank == 1
        limit = self.limit if speaks_first else self.limit + self.interval
        while not self._leaving.wait(self.interval):
            now = time.monotonic()
            # Not more than the beat: a process that was stopped itself has nobody to blame.
            quiet, before = quiet + min(now - before, 2 * self.interval), now
            if answers != self._answers:
                answers, quiet = self._answers, 0.0
            if quiet >= limit:
                self._end_without_store(quiet, speaks_first or self.ranks.local_rank == 0)

    def _exchange(self, leaving: bool) -> None:
        self._beat += 1
        self._store.set(self._key(self.ranks.rank), self._report(leaving).encode())
        if self._failure:
            self._store.set(self._key("verdict"), json.dumps({"failed": self._failure}))
            return
        if self.ranks.rank not in self._observers:
            verdict = self._store.get(self._key("verdict"))
            self._answers += 1
        else:
            verdict, *texts = self._store.multi_get([self._key("verdict"), *self._everyone])
            self._answers += 1
            if not verdict:
                verdict = self._observe([Report.decode(text) for text in texts])
        if verdict:
            self._end(json.loads(verdict))

    def _report(self, leaving: bool) -> Report:
        progress, phase, patient, when = self._state
        waiting, place = None, ""
        if not leaving and not patient and time.monotonic() - when > self.limit / 2:
            waiting, place = standing(self._main)
        return Report(self._beat, progress, phase, patient, leaving, waiting, place)

    def _observe(self, reports: list[Report]) -> str:
        """Judge what all ranks have told; the verdict if this rank is the one to publish it, else empty."""
        now = time.monotonic()
        # What was not read cannot be judged: time counts for two beats at most.
        seen = self._observer.update(dict(enumerate(reports)), min(now - self._read_at, 2 * self.interval))
        self._read_at = now
        verdict = judge(seen, self.limit)
        if verdict is None or self.ranks.rank not in seen:
            self._found = 0
            return ""
        # The lowest observer that is not named goes first, then the others, in case it cannot.
        self._found += 1
        able = [rank for rank in self._observers if rank in seen and rank not in verdict.ranks]
        first = not able or able[0] == self.ranks.rank
        if self._found <= (0 if first else 2):
            return ""
        if self._store.add(self._key("found"), 1) > 1 and self._found < 8:  # unless the finder is lost as well
            return ""
        named = verdict.ranks[:_NAMED] if verdict.kind != "silent" else verdict.ranks
        processes = [Process(*json.loads(x)) for x in self._store.multi_get([self._key(f"process/{r}") for r in named])]
        told = message(
            verdict,
            {rank: s.report for rank, s in seen.items()},
            processes[:_NAMED],
            self.timeout_minutes,
            str(self.folder),
        )
        self._within(self.last_words, lambda: _say(told))
        self._record(told, [process.host for process in processes])
        silent = processes if verdict.kind == "silent" else []
        published = json.dumps({"silent": silent, "alive": len(seen) - len(silent)})
        self._store.set(self._key("verdict"), published)
        return published

    # ---- the end ----

    def _end(self, verdict: dict) -> None:
        """Write stacks, wait until all have, and exit; the line has been printed."""
        self._ending.acquire()
        if "failed" in verdict:
            if self.ranks.local_rank == 0:
                _say(f"rank {self.ranks.rank}: ends because {verdict['failed']}")
            os._exit(FAILED)
        deadline = time.monotonic() + self.last_words
        self._within(self.last_words, self._write_stacks)
        try:
            written = self._store.add(self._key("written"), 1)
            # Launchers end all ranks when one has ended.
            while written < verdict["alive"] and time.monotonic() < deadline:
                time.sleep(self.interval / 4)
                written = self._store.add(self._key("written"), 0)
        except RuntimeError:
            pass  # a rank that served the store has ended
        self._exit([Process(*process) for process in verdict["silent"]])

    def _end_without_store(self, quiet: float, speaks: bool) -> None:
        self._ending.acquire()
        ranks, silent = self.ranks, []
        if not ranks.store_served:  # rank 0 serves it
            verdict, silent = Verdict("silent", (0,), quiet), [self._first]
            phase = self._state[1]  # its own is not known; all are in the same
            told = message(verdict, {0: Report(phase=phase)}, silent, self.timeout_minutes, str(self.folder))
        else:
            told = (
                f"the launcher's store at {ranks.master_addr}:{ranks.master_port} has given no answer for "
                f"{quiet:.0f} s (parallel.timeout_minutes={self.timeout_minutes:g}): the job ends; "
                f"start the job again to go on from its last checkpoint"
            )
        if speaks:
            self._within(self.last_words, lambda: _say(told))
            self._record(told, [process.host for process in silent])
        self._within(self.last_words, self._write_stacks)
        time.sleep(2 * self.interval)  # the others have to find it, too
        self._exit(silent)

    def _exit(self, silent: list[Process]) -> None:
        here = [process for process in silent if process.host == socket.gethostname()]
        here = [process for process in here if start_mark(process.pid) == process.started]
        for process in here:
            path = Path(stack_file(str(self.folder), process.rank))
            self._within(self.interval, functools.partial(write_state, path, str(process), process.pid))
        for process in here:
            with contextlib.suppress(ProcessLookupError):  # a rank beside this one was faster
                os.kill(process.pid, signal.SIGKILL)
        os._exit(HUNG)

    def _alone_stalled(self) -> None:
        """A rank without others shows where it is; whether to end it is left to who started it."""
        if self.ranks.world_size == 1:
            self._write_stacks()

    def _write_stacks(self) -> None:
        _, phase, _, when = self._state
        mine = Process(self.ranks.rank, socket.gethostname(), os.getpid())
        title = f"{mine}, {phase} for {time.monotonic() - when:.1f} s"
        write_stacks(Path(stack_file(str(self.folder), self.ranks.rank)), title)

    def _record(self, told: str, hosts: list[str]) -> None:
        self._within(self.interval, lambda: events.record(self.folder.parent, "hang", text=told, hosts=hosts))

    def _within(self, seconds: float, function: Callable[[], None]) -> None:
        """Call a function that may hang itself (a pipe that nobody reads, a file system that does not answer)."""

        def tried() -> None:
            try:
                function()
            except OSError as error:
                _say(f"rank {self.ranks.rank}: {error}")

        thread = threading.Thread(target=tried, daemon=True)
        thread.start()
        thread.join(seconds)


def _say(text: str) -> None:
    os.write(2, f"{text}\n".encode())
