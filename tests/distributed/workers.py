"""What the ranks of the checkpoint tests do."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from bd3_megatron import parallel
from pretrain import checkpoint
from pretrain.bench.parity import Layout, Task, batches, make_engine


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
