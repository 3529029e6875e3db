"""Start-up of a job's ranks, and their shutdown: rendezvous, process groups, watchdog, log."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bd3_common import logs
from bd3_common.errors import ConfigError, user_line
from bd3_megatron import parallel
from bd3_megatron.parallel import World
from pretrain.config.schema import RunConfig
from pretrain.distributed.collectives import LostRank, lost_ranks, on_rank_0, raise_on_all_ranks
from pretrain.distributed.proof import prove_membership
from pretrain.distributed.ranks import Ranks
from pretrain.distributed.rendezvous import Meeting, rendezvous
from pretrain.resilience import signals
from pretrain.resilience.watchdog import Watchdog
from pretrain.run_folder import events, layout
from pretrain.run_folder.identity import check_folder

_LOG = logging.getLogger(__name__)


class Job:
    """One rank of a started job.

    Attributes:
        world: the process groups.
        watchdog: finds ranks that hang.
    """

    world: World
    watchdog: Watchdog

    def __init__(self, ranks: Ranks, run: Path):
        self.ranks, self.run = ranks, run
        self._lock: int | None = None
        self._run_id: str | None = None

    @property
    def phase(self) -> str:
        """Place in the run, as in ``in step 12``."""
        return self.watchdog.phase if hasattr(self, "watchdog") else "at the start"

    @property
    def owns_run_folder(self) -> bool:
        """True if this job may write into the run folder: it was not refused, and the folder is still its run's."""
        try:
            if self._run_id is not None:
                check_folder(self.run, self._run_id)
        except (ConfigError, OSError):
            return False
        return self._run_id is not None

    def take_run_folder(self, prepare: Callable[[], int], run_id: str) -> None:
        """Lock the run folder for this job.

        Args:
            prepare: locks the folder, on rank 0, and returns the lock's descriptor.
            run_id: id that the folder has then.
        """
        self._lock = on_rank_0(prepare)
        self._run_id = run_id

    def log_to_run_folder(self) -> None:
        """Write this rank's messages into the run folder, earlier ones included."""
        path = layout.rank_log(self.run, self.ranks.rank)
        raise_on_all_ranks(lambda: logs.to_file(path))

    def close(self, error: BaseException | None) -> None:
        """Stop the watchdog, unlock the run folder, and leave the process groups.

        Args:
            error: ended the job; None at its regular end.
        """
        if hasattr(self, "watchdog"):
            self.watchdog.close(error)
        if self._lock is not None and self.ranks.rank == 0:
            os.close(self._lock)
        parallel.stop()
        logs.close()


def _stop_on_signal() -> None:
    """Raise after a signal to stop: while ranks are waited for there is no step to complete."""
    if number := signals.received():
        raise signals.Stopped(signals.exit_code(number))


def _join(config: RunConfig, ranks: Ranks, meeting: Meeting | None) -> World:
    """Join the process groups; then all ranks prove themselves on the new connections."""
    place = ranks.rank, ranks.world_size, ranks.local_rank
    if meeting is None:
        return parallel.start(config.parallel, *place)
    # NCCL's own threads use the store, even while Python ends: no Python code in it.
    plain = parallel.backend_of(config.parallel) == "nccl"
    try:
        world = parallel.start(config.parallel, *place, meeting.store if plain else meeting.signed)
        prove_membership(meeting.key)
    except Exception as error:
        meeting.leave_note(error)
        raise
    return world


@contextmanager
def start_ranks(config: RunConfig, ranks: Ranks) -> Iterator[Job]:
    """This rank of a job after the rendezvous; leaving the context ends it.

    Raises:
        LostRank: the connection to another rank broke.
        ConfigError: a process without the job's secret takes part.
    """
    run = Path(config.run)
    job = Job(ranks, run)
    logs.of_rank(ranks.rank)
    try:
        with events.failures(run, ranks, lambda: job.owns_run_folder), lost_ranks(ranks.rank, lambda: job.phase):
            meeting = rendezvous(ranks, layout.job_secret(run, ranks.short_name), _stop_on_signal)
            job.world = _join(config, ranks, meeting)
            key = b"" if meeting is None else meeting.key
            job.watchdog = Watchdog(ranks, config.parallel.timeout_minutes, run / layout.HANG, key)
            yield job
    except (Exception, LostRank) as error:
        line = user_line(error) if isinstance(error, Exception) else str(error)
        # The console gets the error from bd3 itself.
        _LOG.error(line or "failed", exc_info=line is None, extra=logs.FILE_ONLY)
        raise
    finally:
        job.close(sys.exc_info()[1])
