"""Exit reasons: pure functions of an exit code, srun's messages and a run's events."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bd3_common import exit_codes
from slurm import client

# srun's messages about failed tasks, and the one after which it kills the others.
_TASKS = re.compile(r"^srun: error: (?P<hosts>\S+): tasks? (?P<tasks>[\d,-]+): (?P<how>.+)$")
_NODE = re.compile(r"^srun: error: Node failure on (?P<hosts>\S+)$")
_ABORTED = re.compile(r"Job step aborted|CANCELLED AT|_step_signal: Terminating")
_KILLS_AFTER = 3.0  # seconds, less than Slurm's KillWait
_HARDWARE = ("Killed", "Bus error")  # the task failed by itself, not because another did

# Values in a run folder's events: "asked" is a stop by a signal, "mistake" an error of the user.
Kind = Literal["done", "asked", "mistake", "bad node", "hang", "failed"]


@dataclass(frozen=True)
class ExitReason:
    """Reason why a start of a run ended, and the hosts that caused it."""

    kind: Kind
    cause: str
    bad_hosts: tuple[str, ...] = ()

    @property
    def may_restart(self) -> bool:
        """True if a restart may help."""
        return self.kind not in ("done", "mistake")


class SlurmLine(NamedTuple):
    """A line of srun or slurmstepd on stderr, ``seconds`` after the command's start."""

    seconds: float
    line: str


def exit_reason(
    code: int,
    slurm_lines: Sequence[SlurmLine],
    happened: Sequence[Mapping[str, Any]],
    bad_nodes: Mapping[str, str] | None = None,
    last_line: str = "",
) -> ExitReason:
    """The reason why a start ended.

    Args:
        code: exit code of the command. srun returns the highest of all tasks, also of tasks that it killed.
        slurm_lines: what Slurm's programs wrote to stderr.
        happened: the run's events since the start.
        bad_nodes: reason by host, from the preflight.
        last_line: the last line in rank 0's log.
    """
    last = {event["event"]: event for event in happened}
    first, killed, broken = first_failure(slurm_lines)
    if code == 0:
        return ExitReason("done", "finished")
    if "stopped" in last:
        return ExitReason("asked", f"{last['stopped'].get('signal')}: stopped at step {last['stopped'].get('step')}")
    if broken:
        return ExitReason("failed", f"node failure: {', '.join(broken)}", broken)
    if "hang" in last:
        text = str(last["hang"].get("text") or "a rank hung").partition(": the job ends")[0]
        return ExitReason("hang", text, tuple(last["hang"].get("hosts", ())))
    if bad_nodes or exit_codes.BAD_NODE in (first, code):
        named = "; ".join(f"{host}: {why}" for host, why in (bad_nodes or {}).items())
        return ExitReason("bad node", f"preflight: {named or 'a bad node'}", tuple(bad_nodes or ()))
    failed = [event for event in happened if event["event"] == "failed"]
    for event in failed:
        if event.get("mistake"):
            return ExitReason("mistake", event.get("text") or "")
    # A mistake found before there was a run folder has no event.
    if not failed and (code if first is None else first) == exit_codes.USAGE_ERROR:
        return ExitReason("mistake", last_line or "exit code 2")
    if exit_codes.STOPPED in (first, code):  # stopped by a signal, but without an event
        return ExitReason("asked", "stopped by a signal")
    if killed:
        return ExitReason("failed", f"tasks on {', '.join(killed)} were killed", killed)
    if failed:
        return ExitReason("failed", f"rank {failed[0].get('rank')} failed: {failed[0].get('text')}")
    if code == exit_codes.HUNG:
        return ExitReason("hang", "a rank hung")
    return ExitReason("failed", f"exit code {first or code}")


def first_failure(slurm_lines: Sequence[SlurmLine]) -> tuple[int | None, tuple[str, ...], tuple[str, ...]]:
    """The first failure that srun reports, leaving out tasks that srun killed.

    Returns:
        the first exit code, hosts whose tasks were killed, and hosts that have failed.
    """
    code: int | None = None
    killed: dict[str, None] = {}
    failed: dict[str, None] = {}
    aborted = math.inf
    for seconds, line in slurm_lines:
        if node := _NODE.match(line):
            failed |= dict.fromkeys(client.hosts(node["hosts"]))
        elif _ABORTED.search(line):
            aborted = min(aborted, seconds)
        elif found := _TASKS.match(line):
            exited = re.match(r"Exited with exit code (\d+)", found["how"])
            if exited and aborted == math.inf:
                code = int(exited[1]) if code is None else code
            # Ranks that lost a peer may be reported first. srun sends its own SIGKILL later than _KILLS_AFTER.
            elif found["how"].startswith(_HARDWARE) and seconds < aborted + _KILLS_AFTER:
                killed |= dict.fromkeys(client.hosts(found["hosts"]))
    return code, tuple(killed), tuple(failed)


def last_log_line(command: Sequence[str]) -> str:
    """The last line in rank 0's log, if srun's ``--output`` gives each rank one; else empty."""
    path = next((word.partition("=")[2] for word in command if word.startswith("--output=")), "")
    path = re.sub(r"%(\d*)t", lambda found: "0".zfill(int(found[1] or 1)), path)
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""
