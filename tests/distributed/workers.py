"""What the ranks of the tests of checkpoints and of evaluation do."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from bd3_megatron import parallel
from data_prep.reader import RowReader
from pretrain import checkpoint
from pretrain.bench import parity
from pretrain.bench.parity import Layout, Outcome, Task, batches, make_engine
from pretrain.config import EvalConfig
from pretrain.documents import Documents, DocumentTally
from pretrain.evaluate import Evaluation, evaluate
from tests.unit import fake_te


def resume(
    rank: int, size: int, store: dist.Store, run: Path, layout: Layout, task: Task, until: int, every: int = 0
) -> list[float]:
    """Go on from the run's newest checkpoint, if any, up to step ``until``, save there and, while training goes on,
    after each ``every`` steps; losses of the steps taken."""
    world = parallel.start(layout.parallel, rank, size, rank, store)
    try:
        engine = make_engine(world, layout, task)
        found = checkpoint.newest_together(run, world)
        if found is not None:
            checkpoint.restore(found, engine)
        losses = []
        with checkpoint.CheckpointWriter(run, engine, keep=10) as writer:
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
            tally, options = DocumentTally(reader), EvalConfig(rows=rows)
            micro = task.micro_batch
            result = evaluate(
                engine, reader, task.model, task.diffusion, options, micro, document_mask=True, tally=tally
            )
            found.append((result, tally.gather()))
        finally:
            parallel.stop()
    return found
