"""Names of all files and folders in a run folder."""

from __future__ import annotations

from pathlib import Path

from pretrain.config import CONFIG_FILE, TOKENIZER_FILE

CONFIG = CONFIG_FILE
"""the resolved configuration"""
SWEEP = "sweep.yaml"
"""the configuration of a folder of runs that `bd3 launch --sweep` made"""
RUN_ID = "run_id.json"
"""id of the run, and its parents' ids"""
TOKENIZER = TOKENIZER_FILE
ORIGIN = "origin.safetensors"
"""what the run keeps of the checkpoint it was imported from"""
VERSIONS = "versions.txt"
"""versions of the packages that the last start used"""

METRICS = "metrics.jsonl"
"""losses, norms and evaluations: the same bytes after any number of interruptions"""
THROUGHPUT = "throughput.jsonl"
"""speed and times"""
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id.txt"
"""id of the W&B run that this run is written to"""
CURVES = "curves.png"

EVENTS = "events.jsonl"
"""starts, signals, hangs, failures"""
HEARTBEAT = "heartbeat.json"
"""time of rank 0's last progress"""
PREFLIGHT = "preflight.json"
"""measurements of the last preflight"""
BAD_NODES = "suspects.json"
"""nodes at fault according to the preflight, for the supervisor"""

CHECKPOINTS = "checkpoints"
COMPLETE = "complete.json"
"""list of a checkpoint's files, written last"""
INDEX = "index.json"
"""tensors of a checkpoint, and where their chunks are"""
TENSORS = ".safetensors"
"""suffix of a checkpoint's files of tensors"""
OLD_INDEX = ".metadata"
"""index of a checkpoint that torch's distributed checkpoint wrote"""
OLD_TENSORS = ".distcp"
_CHECKPOINT_PREFIX = "step-"

SKIPPED_RANGES = "skips.json"
"""steps left out after loss spikes"""
SKIPPED_BATCHES = "skipped"
"""a file for each batch without a finite loss and gradient"""

HANG = "hang"
"""stacks of the ranks of a job that hung"""
PROFILE = "profile"
OUT_OF_MEMORY = "oom"
"""snapshots of GPU memory"""
LOGS = "logs"
"""messages of every rank; logs of Slurm's jobs"""

LAUNCH = "launch"
"""a numbered folder for each submission"""
LAUNCH_CODE = "code"
LAUNCH_SCRIPT = "job.sbatch"
LAUNCH_ENVIRONMENT = "environment.txt"
LAUNCH_RUNS = "runs.txt"


def checkpoint_name(step: int) -> str:
    """Folder of a checkpoint in :data:`CHECKPOINTS`."""
    return f"{_CHECKPOINT_PREFIX}{step:08d}"


def checkpoint_step(name: str) -> int | None:
    """Step of a checkpoint's folder; None for the name of another file."""
    step = name.removeprefix(_CHECKPOINT_PREFIX)
    if not name.startswith(_CHECKPOINT_PREFIX) or not (step.isascii() and step.isdecimal()):
        return None
    return int(step) if checkpoint_name(int(step)) == name else None  # one name for each step


def tensors_name(rank: int) -> str:
    """File of the chunks that a rank wrote."""
    return f"rank-{rank:05d}{TENSORS}"


def partial_checkpoint_name(step: int, writer: str) -> str:
    """Folder of a checkpoint that ``writer`` is writing."""
    return f".{checkpoint_name(step)}.{writer}{_PARTIAL}"


def is_partial_checkpoint(name: str) -> bool:
    """True for :func:`partial_checkpoint_name` of any step and writer."""
    return name.startswith(f".{_CHECKPOINT_PREFIX}") and name.endswith(_PARTIAL)


_PARTIAL = ".partial"


def rank_log(run: Path, rank: int) -> Path:
    """Log of a rank."""
    return run / LOGS / f"rank-{rank:05d}.log"


def job_secret(run: Path, job: str) -> Path:
    """File of a job's secret, which exists while its ranks meet."""
    return run / f".job-secret-{job}"


def stack_name(rank: int) -> str:
    """File in :data:`HANG` with the stacks of a rank."""
    return f"rank-{rank:05d}.txt"


def trace_file(run: Path, first: int, last: int, rank: int) -> Path:
    """Profile of steps ``first`` to ``last``; torch compresses a file named ``.gz``."""
    return run / PROFILE / f"steps-{first}-{last}.rank-{rank}.json.gz"


def memory_snapshot(run: Path, rank: int) -> Path:
    """Snapshot of a GPU's memory when it ran out."""
    return run / OUT_OF_MEMORY / f"rank-{rank}.pickle"


def skipped_batch(run: Path, step: int) -> Path:
    """Rows of the batch of a step that was skipped."""
    return run / SKIPPED_BATCHES / f"step-{step:08d}.json"


def skipped_batches(run: Path) -> dict[int, Path]:
    """Files of :func:`skipped_batch` by step."""
    found = {path.stem.removeprefix("step-"): path for path in (run / SKIPPED_BATCHES).glob("step-*.json")}
    return {int(step): path for step, path in found.items() if step.isdecimal()}
