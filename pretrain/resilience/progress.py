"""Progress of a run by its run folder: newest step, finished or not, starts without a new checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.checkpoint.folder import newest_complete, step_of
from pretrain.run_folder import events


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint; 0 if there is none."""
    found = newest_complete(run)
    return step_of(found) if found else 0


def finished(run: Path, steps: int) -> bool:
    """True if a run has nothing left to do. One that was stopped in its last evaluation still has that to do."""
    if newest_step(run) < steps:
        return False
    ends = [e for e in events.read(run) if e["event"] in ("stopped", "finished") or e.get("kind") == "done"]
    return not ends or ends[-1]["event"] != "stopped"


def starts_without_progress(happened: Sequence[Mapping[str, Any]], lineage: str) -> int:
    """Number of last starts in a row of a lineage that ended without a new checkpoint.

    Preemptions and interruptions do not count. Warnings of the time limit do: a job whose limit leaves no time for one
    step would be requeued for ever.

    Args:
        happened: the run's events.
        lineage: a job with its restarts, or a chain of jobs.
    """
    count = 0
    for event in reversed(happened):
        if event["event"] != "ended":
            continue
        progress = event.get("kind") == "done" or (event.get("step") or 0) > (event.get("before") or 0)
        if progress or event.get("lineage") != lineage:
            break
        count += event.get("kind") != "asked" or not str(event.get("cause", "")).startswith(("SIGTERM", "SIGINT"))
    return count
