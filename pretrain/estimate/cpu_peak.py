"""Peak memory of a `bd3 pretrain` process on CPU, as the system counts it (``VmHWM``, ``ru_maxrss``)."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from pretrain.estimate.prediction import Prediction

# Resident set before there is a model: interpreter and libraries after `import pretrain.trainer.loop`, measured with
# these versions, and process groups, data set, metrics and the code of the kernels that a first step brings in.
_VERSIONS = {"torch": "2.13.0", "megatron-core": "0.16.1"}
_IMPORTS = 395e6
_RUNTIME = 45e6
# What drawing the curves brings in at the end of a run (matplotlib).
_PLOTS = 22e6
# glibc keeps tensors below this in a heap, once one of their size was freed, and returns a heap to the system only from
# its end; larger ones are mappings of their own, returned when they are freed.
_MAPPED = 2**25
# What the heap takes besides, in parts of what a micro-batch makes. Torch allocates within 1 % of the count, but
# glibc before 2.38 does not give an aligned tensor the place of a freed one of its size (its bug 14581), so
# temporaries between kept tensors leave holes. First for steps of one micro-batch, then of several: the next one finds
# holes in other places than it needs. Measured 0.24 to 0.31 and 0.76 to 0.88 for qwen3, 0.2 to 0.6 and 1.0 to 1.6 for
# dit, 1.0 and 1.3 with full recomputation, where nearly all is temporary.
_HEAP_HOLES = {"gated": (0.26, 0.82), "ungated": (0.5, 1.35), "full": (1.0, 1.3)}
# The same of an evaluation; the part of the heap that training leaves whose chunks are too small for it; and the part
# at the heap's end that returns to the system before an evaluation maps its large tensors. Measured in few shapes.
_EVALUATION_HOLES = 0.5
_CHUNKS = 0.5
_RETURNED = 0.25


def process_peak(prediction: Prediction) -> dict[str, float]:
    """Bytes by part at the moment of the peak of the heaviest rank; their sum is the prediction.

    The moments compared are the evaluation before the first step, the backward pass (beside the copies for checkpoints,
    which stay from the first one on), a later evaluation, and the end of the run (copies and plots). The heap stays as
    large as the activations have made it, and what is small comes out of it later.
    """
    stage, config = prediction.heaviest, prediction.config
    state = stage.state
    every = config.checkpoint.every
    copies = 4.0 * state.owned * (4 if config.train.ema_decay > 0 else 3)
    during = copies if 0 < every < config.train.steps else 0.0
    alive = stage.activations.total + stage.working + stage.buffers
    mapped = min(prediction.mapped_activations(_MAPPED), stage.activations.total)
    mlp = "gated" if config.model.traits.gated else "ungated"
    kind = "full" if config.parallel.recompute == "full" else mlp
    holes = _HEAP_HOLES[kind][prediction.micro_batches > 1] * alive
    working = {"working memory": stage.working + stage.buffers, "holes of the heap": holes}
    training = {"activations": stage.activations.total, **working, "checkpoint copies": during}
    heap = {"activations": stage.activations.total - mapped, **working}
    room = sum(heap.values())
    small, large = prediction.evaluation(_MAPPED)
    small *= 1 + _EVALUATION_HOLES
    heap["evaluation"] = max(0.0, small - (1 - _CHUNKS) * room)
    beside = max(heap["evaluation"], heap["evaluation"] + large - _RETURNED * room)
    later = heap | {"evaluation": beside, "checkpoint copies": during}
    ending = heap | {"checkpoint copies": during or max(0.0, copies - room), "plots": _PLOTS}
    moments = ({"evaluation": small + large}, training, later, ending)
    moment = max(moments, key=lambda parts: sum(parts.values()))
    constant = {"interpreter and libraries": baseline_bytes(), "state": float(state.total + state.host)}
    return {name: value for name, value in (constant | moment).items() if value}


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
    code = "import resource, pretrain.trainer.loop; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
