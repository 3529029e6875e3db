"""The supervisor's child process: run a command to its end, forward signals to it, end it when it hangs."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bd3_common import safe_path
from bd3_common.errors import ConfigError
from pretrain.resilience import signals
from pretrain.resilience.exit_reason import SlurmLine
from pretrain.resilience.heartbeat import HeartbeatMonitor
from pretrain.run_folder import events

_POLL, _KILL_AFTER = 1.0, 60.0  # seconds between reads of the heartbeat, and from SIGTERM to SIGKILL for a hung command
_DRAIN = 5.0  # seconds that stderr is read after the command's end: processes that it left behind may keep it open
_MOST_LINES = 10_000  # of Slurm's programs


class SignalForwarder:
    """Notes the signals that this process gets and forwards some of them to its child. The process lives on.

    Slurm signals the ranks of a job itself, but SIGUSR1 may reach the batch script only (``--signal=B:USR1@300``):
    srun forwards it to the ranks, while SIGTERM would make srun kill them. Outside of a job SIGTERM is forwarded, too;
    Ctrl-C is not, because a terminal sends it to all processes.
    """

    def __init__(self, in_job: bool):
        self.signals: set[int] = set()
        self.process: subprocess.Popen[str] | None = None
        self._forwarded = {signal.SIGUSR1} if in_job else {signal.SIGUSR1, signal.SIGTERM}
        for number in signals.SIGNALS:
            signal.signal(number, self._handle)

    @property
    def stop_requested(self) -> bool:
        """SIGTERM or SIGINT has come: no further start."""
        return bool(self.signals & {signal.SIGTERM, signal.SIGINT})

    def _handle(self, number: int, frame: object) -> None:
        self.signals.add(number)
        if self.process is not None and number in self._forwarded:
            self.process.send_signal(number)


def run_command(
    command: Sequence[str], run: Path, forwarder: SignalForwarder | None = None
) -> tuple[int, list[SlurmLine]]:
    """Run a command to its end, or end it when the run's heartbeat stops.

    Returns:
        its exit code (128 + signal, as in a shell), and what Slurm's programs wrote to its stderr.

    Raises:
        ConfigError: the command cannot be started.
    """
    begin, lines, over = time.monotonic(), list[SlurmLine](), threading.Event()
    monitor = HeartbeatMonitor(run)
    try:
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, errors="replace", env=safe_path.inherited()
        )
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}; give the command that starts the run after --") from None

    def watch_heartbeat() -> None:
        while not over.wait(_POLL):
            if (trouble := monitor.trouble(time.monotonic())) is not None:
                events.record(run, "hang", text=trouble, hosts=[])
                process.terminate()  # srun ends all tasks, with SIGKILL where SIGTERM does not
                if not over.wait(_KILL_AFTER):
                    process.kill()
                return

    def copy_stderr() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            if line.startswith(("srun:", "slurmstepd")) and len(lines) < _MOST_LINES:
                lines.append(SlurmLine(time.monotonic() - begin, line.rstrip("\n")))

    if forwarder is not None:
        forwarder.process = process
    watcher, reader = (threading.Thread(target=loop, daemon=True) for loop in (watch_heartbeat, copy_stderr))
    watcher.start()
    reader.start()
    code = process.wait()
    over.set()
    watcher.join()
    reader.join(_DRAIN)
    if forwarder is not None:
        forwarder.process = None
    return (128 - code if code < 0 else code), list(lines)
