#!/usr/bin/env python
"""Training by counts against noise levels: the runs and the tables of docs/science.md.

    python scripts/estimator_study.py run --arm counts --layers 4 --block-size 4 --seed 0
    python scripts/estimator_study.py queue --workers 2
    python scripts/estimator_study.py table

A run is one cell of the study and goes on where it was interrupted; ``queue`` does those that are missing, ``table``
evaluates what is there by counts and pairs every arm with the whole interval of levels of the same seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from bd3_megatron.config import DiffusionConfig
from bd3_megatron.diffusion.clips import count_law

CLIP = {"beta": 0.3, "omega": 0.8}
ARMS = {
    "full": "noise levels on the whole interval",
    "clip": "noise levels on [.3, .8]",
    "search": "noise levels on the interval that the clip search finds",
    "counts": "counts, uniform",
    "clip-weights": "uniform counts with the clip's mean weights: its weighting without its variance",
    "clip-counts": "the clip's probabilities of counts with the weights of the bound: its masks without its weighting",
    "least-variance": "the probabilities of counts that `bd3 bench counts` found on the run `counts` of seed 0",
}
LEARNING_RATES = {"full": 0.016, "clip": 0.004, "search": 0.016, "counts": 0.016}
"""the best of .004, .008 and .016 for one seed; those of counts hold for their other probabilities and weights, too"""
LEAST_VARIANCE: dict[tuple[int, int], list[float]] = {}
"""count_probabilities by layers and block size"""


def flags(arm: str, layers: int, block_size: int) -> list[str]:
    """Options of the objective."""
    size = ["--diffusion.block-size", str(block_size)]
    whole = [*size, "--diffusion.beta", "0.001", "--diffusion.omega", "1.0"]
    counts = [*whole, "--diffusion.masking", "counts"]
    law = count_law(DiffusionConfig(block_size=block_size, **CLIP))
    if arm == "full":
        return whole
    if arm == "clip":
        return [*size, "--diffusion.beta", str(CLIP["beta"]), "--diffusion.omega", str(CLIP["omega"])]
    if arm == "search":
        return [*whole, "--clip-search.every", "100"]
    if arm == "counts":
        return counts
    if arm == "clip-weights":
        return [*counts, "--diffusion.count-weights", *(f"{block_size * a:.9g}" for a in law.first)]
    if arm == "clip-counts":
        q = law.probability / law.probability.sum()
        return [*counts, "--diffusion.count-probabilities", *(f"{x:.15g}" for x in q)]
    if arm == "least-variance":
        if (layers, block_size) not in LEAST_VARIANCE:
            raise SystemExit(f"--arm={arm}: not measured for {layers} layers and B'={block_size}; use bd3 bench counts")
        q = LEAST_VARIANCE[layers, block_size]
        return [*counts, "--diffusion.count-probabilities", *(f"{x:g}" for x in q)]
    raise SystemExit(f"--arm={arm}: unknown arm; use {', '.join(ARMS)}")


def folder(options: argparse.Namespace, arm: str, layers: int, block_size: int, steps: int, seed: int) -> Path:
    return options.out / f"L{layers}-B{block_size}-{steps}" / arm / f"seed-{seed}"


def command(options: argparse.Namespace, arm: str, layers: int, block_size: int, steps: int, seed: int) -> list[str]:
    """The command that trains one cell."""
    lr = options.lr or LEARNING_RATES.get(arm, LEARNING_RATES["counts"])
    values = {
        "data.path": options.data,
        "run": folder(options, arm, layers, block_size, steps, seed),
        "model.layers": layers,
        "train.seed": seed,
        "train.steps": steps,
        "train.lr": lr,
        "train.min-lr": lr / 10,
        "eval.every": 0,
        "eval.rows": 64,
        "checkpoint.every": 500,
        "checkpoint.keep": 1,
        "log.tensorboard": "false",
        "preflight.enabled": "false",
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return ["bd3", "pretrain", "--preset", "tiny-cpu", *words, *flags(arm, layers, block_size)]


def run(options: argparse.Namespace, cell: tuple) -> subprocess.Popen | None:
    """Start a cell that is not done yet."""
    path = folder(options, *cell)
    if (path / "checkpoints" / f"step-{cell[3]:08d}" / "complete.json").is_file():
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".log").open("a") as log:
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command(options, *cell), stdout=log, stderr=log, env=environ)


def cells(options: argparse.Namespace) -> list[tuple]:
    """All cells that the options choose, seeds outermost, so that an interrupted study is a smaller one."""
    return [
        (arm, layers, size, options.steps, seed)
        for seed, layers, size, arm in itertools.product(
            options.seeds, options.layers, options.block_sizes, options.arms
        )
    ]


def queue(options: argparse.Namespace) -> int:
    """Train all missing cells, ``--workers`` at a time; a failed one is named and the others go on."""
    waiting, running, failed = cells(options), {}, []
    while waiting or running:
        while waiting and len(running) < options.workers:
            cell = waiting.pop(0)
            if (process := run(options, cell)) is not None:
                running[process] = cell
        for process in [process for process in running if process.poll() is not None]:
            cell = running.pop(process)
            print(time.strftime("%H:%M:%S"), *cell, "done" if process.returncode == 0 else "FAILED", flush=True)
            if process.returncode:
                failed.append(cell)
        time.sleep(0.5)
    return 1 if failed else 0


def evaluated(path: Path, rows: int | None) -> dict | None:
    """Sums by row of the bound by counts, kept beside the run."""
    kept = path.with_suffix(f".rows-{rows or 'all'}.json")
    if not kept.is_file():
        if not any((path / "checkpoints").glob("step-*")):
            return None
        from pretrain.checkpoint.loaded_run import load_run
        from pretrain.config.schema import EvalConfig
        from pretrain.evaluation.report import evaluate_run

        (report,) = evaluate_run(load_run(path), "ema", EvalConfig(rows=rows, draws=4))
        found = report.likelihood
        record = report.record() | {"nats": found.nats.tolist(), "row_tokens": found.tokens.tolist()}
        kept.write_text(json.dumps(record))
    return json.loads(kept.read_text())


def table(options: argparse.Namespace) -> int:
    """Markdown: mean over seeds of the bound and of the paired difference to the whole interval, with errors."""
    found: dict[tuple, dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    for cell in cells(options):
        arm, layers, size, steps, seed = cell
        path = folder(options, *cell)
        if (path / "checkpoints" / f"step-{steps:08d}").is_dir() and (result := evaluated(path, options.rows)):
            found[layers, size, steps][arm][seed] = result
    print("| layers | B' | steps | arm | seeds | NELBO | perplexity | to the whole interval | of each seed |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (layers, size, steps), arms in found.items():
        for arm, seeds in arms.items():
            values = np.array([result["nelbo"] for result in seeds.values()])
            common = [seed for seed in seeds if seed in arms.get("full", {})]
            differences = np.array([seeds[seed]["nelbo"] - arms["full"][seed]["nelbo"] for seed in common])
            each = " ".join(f"{x:+.3f}" for x in differences) if arm != "full" else "-"
            paired = _mean(differences) if arm != "full" and common else "-"
            print(
                f"| {layers} | {size} | {steps} | {arm} | {len(values)} | {_mean(values)} | "
                f"{math.exp(values.mean()):.1f} | {paired} | {each} |"
            )
    return 0


def _mean(values: np.ndarray) -> str:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{values.mean():.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "queue", "table"])
    parser.add_argument("--data", type=Path, default=Path("demo/data"), help="data set that make demo wrote")
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder of the runs")
    parser.add_argument(
        "--arms",
        "--arm",
        nargs="+",
        choices=ARMS,
        default=["full", "clip", "search", "counts"],
        metavar="ARM",
        help="; ".join(f"{name}: {what}" for name, what in ARMS.items()),
    )
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--block-sizes", "--block-size", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--seeds", "--seed", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, help="learning rate instead of the arm's own")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rows", type=int, help="validation rows of the table; all by default")
    options = parser.parse_args(args)
    if options.action == "table":
        return table(options)
    return queue(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
