"""Functions that the ranks of tests run: training, resumes, evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bd3_megatron import parallel
from bd3_megatron.diffusion.clips import ClipChoice
from bd3_megatron.engine.base import Engine, StepResult
from bd3_megatron.shards import ShardedTensor
from data_prep.read.reader import RowReader
from pretrain.bench import parity
from pretrain.bench.parity import Layout, Outcome, Task, batches, make_engine
from pretrain.checkpoint.reader import newest_on_all_ranks, restore
from pretrain.checkpoint.writer import CheckpointWriter
from pretrain.config.schema import ClipSearchConfig, EvalConfig
from pretrain.evaluation.clip_search import search
from pretrain.evaluation.document_likelihood import Documents
from pretrain.evaluation.likelihood import Evaluation, evaluate
from tests.unit import fake_te


def resume(
    rank: int, size: int, store: dist.Store, run: Path, layout: Layout, task: Task, until: int, every: int = 0
) -> list[float]:
    """Train from the run's newest checkpoint, if any, to step ``until``; returns the losses of these steps.

    Checkpoints are written there and, in the background, after each ``every`` steps.
    """
    world = parallel.start(layout.parallel, rank, size, rank, store)
    try:
        engine = make_engine(world, layout, task)
        found = newest_on_all_ranks(run, world)
        if found is not None:
            restore(found, engine)
        losses = []
        with CheckpointWriter(run, engine, keep=10) as writer:
            for step in range(found.step if found else 0, until):
                writer.poll()
                parallel.seed_dropout(0, step)
                losses.append(engine.train_step(batches(world, task, step), lr=1e-3).loss)
                if step + 1 == until or (every and (step + 1) % every == 0):
                    writer.save(step + 1, {})
        return losses
    finally:
        parallel.stop()


def resume_each(rank: int, size: int, store: dist.Store, runs: list[tuple]) -> list[list[float]]:
    """:func:`resume` for each of ``runs`` (its arguments from ``run`` on), one after the other."""
    return [resume(rank, size, dist.PrefixStore(str(n), store), *args) for n, args in enumerate(runs)]


def train_with_te(rank: int, size: int, store: dist.Store, runs: list[tuple[str, Layout, Task]]) -> list[Outcome]:
    """:func:`pretrain.bench.parity.train` where Transformer Engine seems to be installed."""
    with fake_te.installed():
        return parity.train(rank, size, store, runs)


def resume_with_te(rank: int, size: int, store: dist.Store, runs: list[tuple]) -> list[list[float]]:
    """:func:`resume_each` where Transformer Engine seems to be installed."""
    with fake_te.installed():
        return resume_each(rank, size, store, runs)


def evaluate_each(
    rank: int, size: int, store: dist.Store, data: Path, layouts: list[Layout], task: Task, rows: int
) -> list[tuple[Evaluation, Documents]]:
    """Evaluation of the first rows of a data set and of their documents, which attention keeps to, by layout."""
    found = []
    for n, layout in enumerate(layouts):
        world = parallel.start(layout.parallel, rank, size, rank, dist.PrefixStore(str(n), store))
        try:
            engine, reader = make_engine(world, layout, task), RowReader(data, "validation")
            options, micro = EvalConfig(rows=rows), task.micro_batch
            result = evaluate(
                engine,
                reader,
                task.model,
                task.diffusion,
                options,
                micro,
                document_mask=True,
                by_document=True,
                whole_documents=True,
            )
            found.append((result.summarize(), result.documents))
        finally:
            parallel.stop()
    return found


def search_each(
    rank: int,
    size: int,
    store: dist.Store,
    data: Path,
    layouts: list[Layout],
    task: Task,
    options: ClipSearchConfig,
    uniform: bool = False,
) -> list[ClipChoice]:
    """A search for the clip interval by layout; with ``uniform`` of a model that predicts all tokens alike."""
    found = []
    for n, layout in enumerate(layouts):
        world = parallel.start(layout.parallel, rank, size, rank, dist.PrefixStore(str(n), store))
        try:
            engine, reader = make_engine(world, layout, task), RowReader(data, "validation")
            if uniform:
                weights = parity._weights(task.model)
                engine.set_weights(weights | {"output_layer.weight": 0 * weights["output_layer.weight"]})
            found.append(search(engine, reader, task.model, task.diffusion, options, 1, task.micro_batch))
        finally:
            parallel.stop()
    return found


def measure_each(
    rank: int, size: int, store: dist.Store, layouts: list[Layout], task: Task
) -> list[tuple[dict[str, float | None], float | None]]:
    """Statistics over the blocks of a step, and the norm of its gradient without an update, by layout."""
    found = []
    for n, layout in enumerate(layouts):
        world = parallel.start(layout.parallel, rank, size, rank, dist.PrefixStore(str(n), store))
        try:
            engine = make_engine(world, layout, task)
            made = batches(world, task, 0)
            norm = engine.gradient_norm(made)
            found.append((dict(engine.train_step(made, 1e-3, statistics=True).blocks), norm))
        finally:
            parallel.stop()
    return found


@dataclass(frozen=True)
class Skipping:
    """A training in which one micro-batch of one step was spoiled on one rank.

    Attributes:
        results: of every step.
        unchanged: all of this rank's state, model weights included, was bit for bit the same after that step.
        updates: number that the engine counts in the end.
        state: this rank's chunks in the end.
    """

    results: list[StepResult]
    unchanged: bool
    updates: int
    state: dict[str, ShardedTensor]


def train_spoiled(
    rank: int, size: int, store: dist.Store, runs: list[tuple[str, Layout, Task]], spoiled: int
) -> list[Skipping]:
    """Train each of the named ``runs``; the last micro-batch of step ``spoiled`` has a weight that is NaN."""
    found = []
    for name, layout, task in runs:
        world = parallel.start(layout.parallel, rank, size, rank, dist.PrefixStore(name, store))
        try:
            engine, results, unchanged = make_engine(world, layout, task), [], False
            for step in range(task.steps):
                made = batches(world, task, step)
                if step == spoiled and world.data_rank == world.data_size - 1:
                    weight = made[-1].weight
                    weight.view(-1)[weight.flatten().nonzero()[0]] = math.nan
                before = _all_of(engine, task, world) if step == spoiled else {}
                parallel.seed_dropout(0, step)
                results.append(engine.train_step(made, lr=1e-3))
                if step == spoiled:
                    after = _all_of(engine, task, world)
                    unchanged = before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
            found.append(Skipping(results, unchanged, engine.updates, parity.copied(engine.state())))
        finally:
            parallel.stop()
    return found


def _all_of(engine: Engine, task: Task, world: parallel.World) -> dict[str, torch.Tensor]:
    """This rank's chunks, and what the model computes with its own copy of the weights."""
    found = {
        f"{name} {chunk.offsets}": chunk.data.detach().clone()
        for name, sharded in engine.state().items()
        for chunk in sharded.chunks
    }
    return found | {"nll": torch.cat(engine.forward(batches(world, task, task.steps)))}
