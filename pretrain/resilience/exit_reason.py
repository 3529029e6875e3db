"""How an attempt at a run ended: from its exit code, srun's words and the run's events. Judging only, no doing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bd3_common import exit_codes
from slurm import client

# srun's words on tasks that ended badly, and the word after which it ends the others itself.
_TASKS = re.compile(r"^srun: error: (?P<hosts>\S+): tasks? (?P<tasks>[\d,-]+): (?P<how>.+)$")
_NODE = re.compile(r"^srun: error: Node failure on (?P<hosts>\S+)$")
_ABORTED = re.compile(r"Job step aborted|CANCELLED AT|_step_signal: Terminating")
_KILLS_AFTER = 3.0  # seconds, less than Slurm's KillWait
_HARDWARE = ("Killed", "Bus error")  # of a task that no other task has harmed

Kind = Literal["done", "asked", "mistake", "bad node", "hang", "failed"]


@dataclass(frozen=True)
class Ending:
    """How an attempt ended, and the hosts to blame for it."""

    kind: Kind
    cause: str
    suspects: tuple[str, ...] = ()

    @property
    def again(self) -> bool:
        """Whether another start may help."""
        return self.kind not in ("done", "mistake")


class Word(NamedTuple):
    """A line of stderr, ``seconds`` after the start of what wrote it."""

    seconds: float
    line: str


def judge(
    code: int,
    words: Sequence[Word],
    happened: Sequence[Mapping[str, Any]],
    preflight: Mapping[str, str] | None = None,
    last_word: str = "",
) -> Ending:
    """How an attempt ended.

    Args:
        code: of its command. srun's is the highest of all tasks', and it may have ended some itself.
        words: what the command wrote to stderr.
        happened: the run's events since its start.
        preflight: reason by host, when it found bad ones.
        last_word: the last line in the first rank's log.
    """
    last = {event["event"]: event for event in happened}
    first, killed, broken = first_failure(words)
    if code == 0:
        return Ending("done", "finished")
    if "stopped" in last:
        return Ending("asked", f"{last['stopped'].get('signal')}: stopped at step {last['stopped'].get('step')}")
    if broken:
        return Ending("failed", f"node failure: {', '.join(broken)}", broken)
    if "hang" in last:
        text = str(last["hang"].get("text", "a rank hung")).partition(": the job ends")[0]
        return Ending("hang", text, tuple(last["hang"].get("hosts", ())))
    if preflight or first == exit_codes.BAD_NODE or code == exit_codes.BAD_NODE:
        named = "; ".join(f"{host}: {why}" for host, why in (preflight or {}).items())
        return Ending("bad node", f"preflight: {named or 'a bad node'}", tuple(preflight or ()))
    failed = [event for event in happened if event["event"] == "failed"]
    for event in failed:
        if event.get("mistake"):
            return Ending("mistake", event.get("text", ""))
    if not failed and (
        first == exit_codes.USAGE_ERROR or (first is None and code == exit_codes.USAGE_ERROR)
    ):  # before there was a run folder
        return Ending("mistake", last_word or "exit code 2")
    if exit_codes.STOPPED in (first, code):  # asked before there was a run folder to say so
        return Ending("asked", "stopped by a signal")
    if killed:
        return Ending("failed", f"tasks on {', '.join(killed)} were killed", killed)
    if failed:
        return Ending("failed", f"rank {failed[0].get('rank')} failed: {failed[0].get('text')}")
    if code == exit_codes.HUNG:
        return Ending("hang", "a rank hung")
    return Ending("failed", f"exit code {first or code}")


def first_failure(words: Sequence[Word]) -> tuple[int | None, tuple[str, ...], tuple[str, ...]]:
    """What srun tells of tasks that ended badly by themselves, not because it ended them.

    Returns:
        the first exit code, hosts whose tasks were killed, and hosts that have failed.
    """
    code, killed, failed, aborted = None, {}, {}, math.inf
    for seconds, line in words:
        if node := _NODE.match(line):
            failed |= dict.fromkeys(client.hosts(node["hosts"]))
        elif _ABORTED.search(line):
            aborted = min(aborted, seconds)
        elif found := _TASKS.match(line):
            exited = re.match(r"Exited with exit code (\d+)", found["how"])
            if exited and aborted == math.inf:
                code = int(exited[1]) if code is None else code
            # Those that feel another's death may be faster to end; srun kills what does not heed SIGTERM, but later.
            elif found["how"].startswith(_HARDWARE) and seconds < aborted + _KILLS_AFTER:
                killed |= dict.fromkeys(client.hosts(found["hosts"]))
    return code, tuple(killed), tuple(failed)


def last_word(command: Sequence[str]) -> str:
    """The last line in the first rank's log, where srun's ``--output`` says that ranks have logs of their own."""
    path = next((word.partition("=")[2] for word in command if word.startswith("--output=")), "")
    path = re.sub(r"%(\d*)t", lambda found: "0".zfill(int(found[1] or 1)), path)
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""


def fruitless_starts(happened: Sequence[Mapping[str, Any]], lineage: str) -> int:
    """Starts of this lineage in a row, the last ones, that ended without a new checkpoint.

    What was preempted or interrupted is not counted. A warning of the time limit is: a limit that leaves no time for
    one step would go on for ever.
    """
    count = 0
    for event in reversed(happened):
        if event["event"] != "ended":
            continue
        progress = event.get("kind") == "done" or event.get("step", 0) > event.get("before", 0)
        if progress or event.get("lineage") != lineage:
            break
        count += event.get("kind") != "asked" or not str(event.get("cause", "")).startswith(("SIGTERM", "SIGINT"))
    return count
