"""Peak memory of a `bd3 pretrain` process on CPU, as the system counts it (``VmHWM``, ``ru_maxrss``)."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from pretrain.prediction import Prediction

# Resident set before there is a model: interpreter and libraries after `import pretrain.train`, measured with these
# versions, and process groups, data set, metrics and the code of the kernels that a first step brings in.
_VERSIONS = {"torch": "2.13.0", "megatron-core": "0.16.1"}
_IMPORTS = 395e6
_RUNTIME = 33e6
# What drawing the curves brings in at the end of a run (matplotlib).
_PLOTS = 32e6
# glibc serves tensors below 32 MiB from its heap once one of their size was freed, and a heap returns to the system
# only from its end. Activations and the copies of a checkpoint, of many sizes, take each other's place and leave holes:
# 8 to 40 % of their sum over the shapes of docs/performance.md, while what torch has allocated is within 4 % of the
# count.
_HEAP_HOLES = 0.25


def process_peak(prediction: Prediction) -> dict[str, float]:
    """Bytes by part at the moment of the peak of the heaviest rank; their sum is the prediction.

    The moments compared are the backward pass (beside the copies of a checkpoint that is written meanwhile, if one is
    due before the last step) and the end of the run (copies and plots, activations gone).
    """
    stage, config = prediction.heaviest, prediction.config
    state = stage.state
    copies = 4.0 * state.owned * (4 if config.train.ema_decay > 0 else 3)
    every = config.checkpoint.every
    during = copies if 0 < every < config.train.steps else 0.0
    alive = stage.activations.total + stage.working + stage.buffers
    training = {
        "activations": stage.activations.total,
        "working memory": stage.working + stage.buffers,
        "holes of the heap": _HEAP_HOLES * (alive + during),
        "checkpoint copies": during,
    }
    # The copies come out of what the activations have left.
    ending = {"checkpoint copies": copies, "plots": _PLOTS}
    moment = max((training, ending), key=lambda parts: sum(parts.values()))
    held = {"interpreter and libraries": baseline_bytes(), "state": float(state.total + state.host)}
    return {name: value for name, value in (held | moment).items() if value}


def baseline_bytes() -> float:
    """Resident set of a process that has everything but a model: a constant for the versions it was measured with,
    measured now (some seconds) for others."""
    if all(_installed(name) == number for name, number in _VERSIONS.items()):
        return _IMPORTS + _RUNTIME
    return _measured_imports() + _RUNTIME


def _installed(name: str) -> str | None:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def _measured_imports() -> float:
    """Peak resident set of an interpreter that imports what training imports, bytes."""
    code = "import resource, pretrain.train; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
