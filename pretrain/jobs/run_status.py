"""Status of a run, from its run folder and from Slurm's controller; sacct adds jobs that the controller forgot."""

from __future__ import annotations

import math
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bd3_common.errors import ConfigError
from bd3_common.text import counted, printable
from pretrain.checkpoint.folder import newest_complete, step_of
from pretrain.config.resolve import load_saved
from pretrain.resilience import heartbeat
from pretrain.run_folder import events, layout
from pretrain.tracking.console import duration, si
from pretrain.tracking.metrics import parse_record
from slurm import client
from slurm.client import SlurmError

_CONFIGS = (layout.CONFIG, layout.SWEEP)
_TAILS = (1 << 16, 1 << 20, 1 << 24)  # bytes of a file's end that are searched for its newest records
_QUIET = 600.0  # seconds without a record after which the state mentions it


def find_runs(folder: Path) -> list[Path]:
    """The run folder itself, or the folder of a sweep and its runs.

    Raises:
        ConfigError: neither.
    """
    runs = [folder, *sorted(path.parent for path in folder.glob(f"*/{layout.SWEEP}"))]
    runs = [run for run in runs if any((run / name).is_file() for name in (*_CONFIGS, layout.EVENTS))]
    if not runs:
        raise ConfigError(f"{folder}: not a run folder; give the one that bd3 pretrain or bd3 launch wrote")
    return runs


def run_status(run: Path) -> dict[str, Any]:
    """The status of a run as plain values; None where nothing is known."""
    steps, unread = _steps(run)
    happened = events.read(run)
    train, validation = _last(run / layout.METRICS, "train"), _last(run / layout.METRICS, "validation")
    speed = _last(run / layout.THROUGHPUT, "throughput")
    newest = newest_complete(run)
    checkpoint = step_of(newest) if newest else 0
    step = max(train["step"] if train else 0, checkpoint)
    pace = _plausible(speed, "seconds_per_step")
    left = None if steps is None or not pace else max(0, steps - step) * pace
    beat = heartbeat.read(run)
    jobs, trouble = _jobs(run, happened)
    found: dict[str, Any] = {
        "run": str(run),
        "jobs": jobs,
        "slurm": trouble,
        "config": unread,
        "step": step,
        "steps": steps,
        "loss": train and train.get("loss"),
        "perplexity": validation and validation.get("perplexity"),
        "tokens_per_second": _plausible(speed, "tokens_per_second"),
        "seconds_left": left,
        "record_age": _age(run / layout.METRICS),
        "checkpoint": checkpoint or None,
        "checkpoint_age": newest and _age(newest / layout.COMPLETE),
        "phase": beat.phase if beat and not beat.left else None,
        "starts": sum(event["event"] == "started" for event in happened),
        "restarts": [
            _restart(event) for event in happened if event["event"] == "ended" and event.get("kind") != "done"
        ],
        "excluded": sorted({host for event in happened for host in event.get("excluded", ())}),
    }
    return found | {"state": _state(found, happened)}


def status_lines(found: Mapping[str, Any]) -> list[str]:
    """The status of :func:`run_status` as lines for a person."""
    out = [found["run"], f"  state       {found['state']}"]
    if found["slurm"]:
        out.append(f"  Slurm       {found['slurm']}")
    if found["config"]:
        out.append(f"  config      {found['config']}")
    for job in found["jobs"]:
        where = f" on {job['nodes']}" if job["nodes"] else ""
        why = f" ({job['reason']})" if job["reason"] else ""
        out.append(
            f"  job {job['job']:<8}{job['state']}{why}{where}, {job['run_time']} of {job['time_limit']}, "
            f"{counted(job['restarts'], 'restart')}"
        )
    parts = [f"{found['step']}" + (f" of {found['steps']}" if found["steps"] else "")]
    if found["loss"] is not None:
        parts.append(f"loss {found['loss']:.4g}")
    if found["perplexity"] is not None:
        parts.append(f"validation perplexity {found['perplexity']:{'.2f' if found['perplexity'] < 1e9 else '.3g'}}")
    if found["tokens_per_second"] is not None:
        parts.append(f"{si(found['tokens_per_second'])} tok/s")
    if found["seconds_left"]:
        parts.append(f"ETA {duration(found['seconds_left'])}")
    out.append("  step        " + " | ".join(parts))
    if found["phase"] is not None:
        out.append(f"  now         {found['phase']}")
    if found["checkpoint"] is not None and found["checkpoint_age"] is not None:
        out.append(f"  checkpoint  step {found['checkpoint']}, {duration(found['checkpoint_age'])} ago")
    else:
        out.append("  checkpoint  none")
    if found["restarts"]:
        out.append(f"  ends        {len(found['restarts'])}, the last of them:")
        for end in found["restarts"][-5:]:
            out.append(f"    {end['time']}  step {end['step']}: {end['cause']}")
    if found["excluded"]:
        out.append(f"  excluded    {', '.join(found['excluded'])}")
    return [printable(line) for line in out]


def _steps(run: Path) -> tuple[int | None, str | None]:
    """``train.steps`` of the run's configuration, or the reason why it cannot be read."""
    config = next((run / name for name in _CONFIGS if (run / name).is_file()), None)
    if config is None:
        return None, None
    try:
        return load_saved(config).train.steps, None
    except ConfigError as error:  # written by another version, or not by bd3
        return None, str(error)


def _state(found: Mapping[str, Any], happened: Sequence[Mapping[str, Any]]) -> str:
    active = [job["state"] for job in found["jobs"] if job["state"] in client.ACTIVE]
    if found["steps"] is not None and (found["checkpoint"] or 0) >= found["steps"] and not client.RUNNING & set(active):
        return "finished"
    if active:
        quiet = found["record_age"] is not None and found["record_age"] > _QUIET and active[0] in client.RUNNING
        return active[0].lower() + (f", but no record for {duration(found['record_age'])}" if quiet else "")
    last = next((event for event in reversed(happened) if event["event"] != "launched"), None)
    if last is None:
        return "not started"
    if last["event"] in ("ended", "stopped", "failed", "lost", "hang"):
        cause = last.get("cause") or last.get("text") or last.get("signal")
        return f"ended at step {found['step']}: {cause}"
    return "training, or ended without a record" if last["event"] in ("started", "attempt") else last["event"]


def _jobs(run: Path, happened: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    """Records of this run's last jobs that Slurm still knows, and the error if it cannot be reached."""
    numbers = [number for event in happened for number in event.get("jobs", [event.get("job")]) if number]
    jobs: dict[str, dict[str, Any]] = {}
    for number in list(dict.fromkeys(numbers))[-20:]:
        try:
            found = client.tasks(number)
        except SlurmError as error:
            return list(jobs.values()), str(error)
        for task in found or client.accounted(number):
            jobs[_name(task)] = {
                "job": _name(task),
                "state": (task.get("JobState") or "UNKNOWN").split()[0],
                "reason": "" if task.get("Reason", "None") == "None" else task["Reason"],
                "restarts": int(task.get("Restarts", "0")),
                "nodes": "" if task.get("NodeList") in (None, "(null)") else task["NodeList"],
                "run_time": task.get("RunTime", ""),
                "time_limit": task.get("TimeLimit", ""),
            }
    return list(jobs.values()), None


def _name(task: Mapping[str, str]) -> str:
    if "ArrayTaskId" in task:
        return f"{task.get('ArrayJobId', task['JobId'])}_{task['ArrayTaskId']}"
    return task.get("JobId", "")


def _restart(event: Mapping[str, Any]) -> dict[str, Any]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    return {"time": when, "step": event.get("step"), "kind": event.get("kind"), "cause": event.get("cause")}


def _plausible(record: Mapping[str, Any] | None, name: str) -> float | None:
    """A number of a record that a person can read; None for NaN and nonsense."""
    value = (record or {}).get(name)
    return value if value is not None and math.isfinite(value) and 0 <= value < 1e15 else None


def _last(path: Path, split: str) -> dict[str, Any] | None:
    """The newest record of a split near the file's end: evaluations may be thousands of steps apart."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for its writer
            raise ConfigError(f"{path}: is not a regular file; remove it")
        size = found.st_size
        for number, bytes_ in enumerate(_TAILS):
            if number and size <= _TAILS[number - 1]:
                break
            with path.open("rb") as file:
                file.seek(max(0, size - bytes_))
                tail = file.read(bytes_)
            if (newest := _newest_of(split, tail.splitlines())) is not None:
                return newest
    except FileNotFoundError:
        pass
    return None


def _newest_of(split: str, lines: Sequence[bytes]) -> dict[str, Any] | None:
    word = split.encode()
    for line in reversed(lines):
        if word not in line:  # most lines are steps
            continue
        record = parse_record(line)
        if record is not None and record["split"] == split:
            return record
    return None


def _age(path: Path) -> float | None:
    """Seconds since a file was written."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return None
