"""Checkpoint writer: writes checkpoints in the background while training goes on.

``save`` copies the chunks that this rank writes to the CPU and returns. A thread per rank writes them into a file, and
rank 0 the index of all. The threads use a process group of their own: training uses the others at the same time. All
threads end with the same result. All ranks look at it at the same step boundary and raise its error there, so that no
rank waits in a collective for one that has failed.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_megatron.engine.base import Engine
from bd3_megatron.shards import Chunk, ShardedTensor
from pretrain.checkpoint import folder
from pretrain.checkpoint.index import DTYPE_NAMES, write_index
from pretrain.checkpoint.tensor_file import ChunkEntry, write_chunks
from pretrain.distributed.collectives import gather_from_ranks, on_rank_0, raise_on_all_ranks
from pretrain.run_folder import layout

# Ranks wait for the slowest disk. A rank that died is noticed at once, by its closed connection.
_TIMEOUT = datetime.timedelta(hours=2)
_CLOSE_TIMEOUT = 10.0  # seconds to wait for the thread where other ranks may be gone

ChunkKey = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Written:
    """Sizes and times of a complete checkpoint.

    Attributes:
        stall_seconds: training waited, inside ``save``.
        write_seconds: from the call of ``save`` to the complete checkpoint.
        bytes: of all files but their list.
    """

    step: int
    stall_seconds: float
    write_seconds: float
    bytes: int


class CheckpointWriter:
    """Writes an engine's state into a run folder, one checkpoint at a time. Every rank calls every method.

    Args:
        keep, keep_every: retention, see :func:`pretrain.checkpoint.folder.retire`.
        asynchronous: if False, :meth:`save` returns when the checkpoint is complete.
        report: called with every complete checkpoint, on every rank, in the caller's thread.
        check: called on rank 0 before anything in the run folder is made, published or removed; raises if it is no
            longer the folder of this run.
    """

    def __init__(
        self,
        run: Path,
        engine: Engine,
        keep: int,
        keep_every: int = 0,
        asynchronous: bool = True,
        report: Callable[[Written], None] = lambda _: None,
        check: Callable[[], None] = lambda: None,
    ):
        self.run, self.engine, self.report, self.check = run, engine, report, check
        self.keep, self.keep_every, self.asynchronous = keep, keep_every, asynchronous
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._name = on_rank_0(lambda: os.urandom(3).hex(), self._group)
        self._buffers: dict[ChunkKey, Tensor] | None = None
        self._write: _Write | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.close(error)

    def save(self, step: int, meta: Mapping[str, Any]) -> None:
        """Begin the checkpoint of ``step``; training may go on at once.

        Raises:
            OSError: the previous checkpoint, or without ``asynchronous`` this one, cannot be written. Older ones
                stay.
        """
        begin = time.perf_counter()
        self.wait()
        staged = self._stage()
        self._write = _Write(self, step, dict(meta), staged, begin)
        if not self.asynchronous:
            self._write.thread.join()
        self._write.stall_seconds = time.perf_counter() - begin
        if not self.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Raise the error of a background write on all ranks; call it at a step boundary.

        Raises:
            OSError: as :meth:`save`.
        """
        if self._write is not None:
            # Threads end at slightly different moments; once none runs, all have the same result.
            running = torch.tensor(float(self._write.thread.is_alive()), device=self.engine.world.device)
            dist.all_reduce(running)
            if running.item() == 0:
                self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint under way is complete.

        Raises:
            OSError: as :meth:`save`.
        """
        if self._write is not None:
            self._write.thread.join()
            write, self._write = self._write, None
            self.report(write.result())

    def close(self, error: BaseException | None = None) -> None:
        """Complete the checkpoint under way, if any, then end the thread and the group; raises nothing.

        Args:
            error: ended the run. After a broken connection other ranks may never finish, and the wait is short.
        """
        ended = True
        if self._write is not None:
            self._write.thread.join(_CLOSE_TIMEOUT if isinstance(error, RuntimeError) else None)
            ended = not self._write.thread.is_alive()
            self._write = None
        self._buffers = None
        if ended and self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _stage(self) -> dict[str, ShardedTensor]:
        """Copies of the chunks that this rank writes."""
        state, world = self.engine.state(), self.engine.world
        if self._buffers is None:
            chunks = _share(state, world.rank, self._group)
            shapes = {
                (name, chunk.offsets): chunk.data.shape
                for name, sharded in state.items()
                for chunk in sharded.chunks
                if (name, chunk.offsets) in chunks
            }
            self._buffers = _buffers(shapes, pinned=world.device.type == "cuda")
        staged = {}
        for name, sharded in state.items():
            chunks = []
            for chunk in sharded.chunks:
                buffer = self._buffers.get((name, chunk.offsets))
                if buffer is not None:
                    buffer.copy_(chunk.data, non_blocking=True)
                    chunks.append(Chunk(chunk.offsets, buffer))
            staged[name] = ShardedTensor(sharded.shape, tuple(chunks))
        if world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return staged


class _Write:
    """Thread that writes one checkpoint."""

    def __init__(
        self, writer: CheckpointWriter, step: int, meta: dict[str, Any], staged: dict[str, ShardedTensor], begin: float
    ):
        self.step, self.stall_seconds, self.write_seconds = step, 0.0, 0.0
        self._writer, self._meta, self._staged, self._begin = writer, meta, staged, begin
        self._bytes, self._error = 0, None
        self.thread = threading.Thread(target=self._run, name=f"checkpoint of step {step}", daemon=True)
        self.thread.start()

    def result(self) -> Written:
        """Result of the ended thread; raises its error."""
        if self._error is not None:
            raise self._error
        return Written(self.step, self.stall_seconds, self.write_seconds, self._bytes)

    def _run(self) -> None:
        try:
            self._bytes = self._save()
            self.write_seconds = time.perf_counter() - self._begin
        except BaseException as error:
            self._error = error

    def _use_device(self) -> None:
        if self._writer.engine.world.device.type == "cuda":
            torch.cuda.set_device(self._writer.engine.world.device)  # a new thread uses device 0

    def _in_run_folder(self, action: Callable[[], None]) -> None:
        """Call ``action`` on rank 0 if the folder is still that of the run; an error is raised on all ranks."""

        def checked() -> None:
            self._writer.check()
            action()

        on_rank_0(checked, self._writer._group)

    def _save(self) -> int:
        writer, group = self._writer, self._writer._group
        final = folder.folder_of(writer.run, self.step)
        partial = folder.partial_of(writer.run, self.step, writer._name)
        rank = writer.engine.world.rank
        try:
            raise_on_all_ranks(self._use_device, group)
            self._in_run_folder(lambda: folder.start(partial))
            parts = gather_from_ranks(lambda: _write_chunks(self._staged, partial, final, rank), group)
            stamps = on_rank_0(lambda: _write_index(parts, partial, final), group)
            self._in_run_folder(lambda: folder.publish(partial, final, self._meta, stamps))
        except BaseException:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                writer.check()  # a folder that is gone explains an error of a file in it
            raise
        self._in_run_folder(lambda: folder.retire(writer.run, self.step, writer.keep, writer.keep_every))
        return sum(stamp["bytes"] for stamp in stamps.values())


def _write_chunks(staged: Mapping[str, ShardedTensor], partial: Path, final: Path, rank: int) -> dict[str, Any]:
    """Write a rank's chunks; returns its :func:`pretrain.checkpoint.tensor_file.write_chunks`, empty without chunks."""
    chunks = [(name, sharded, chunk) for name, sharded in staged.items() for chunk in sharded.chunks]
    described = [
        ChunkEntry(name, DTYPE_NAMES[chunk.data.dtype], sharded.shape, chunk.offsets, tuple(chunk.data.shape))
        for name, sharded, chunk in chunks
    ]
    if not described:
        return {"tensors": {}, "files": {}}
    with _named(final):
        return write_chunks(partial / layout.tensors_name(rank), described, (chunk.data for _, _, chunk in chunks))


def _write_index(parts: Sequence[Mapping[str, Any]], partial: Path, final: Path) -> dict[str, Any]:
    """Write the index of all ranks' chunks; returns the stamps of all files."""
    with _named(final):
        return write_index(partial, parts)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the checkpoint in an error of the disk, instead of a file in the partial folder, which is removed."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def save_checkpoint(run: Path, engine: Engine, step: int, meta: Mapping[str, Any], keep: int) -> Path:
    """Write the engine's state as the checkpoint of ``step``, keep the newest ``keep``, and return its folder.

    Raises:
        OSError: the disk is full or not writable; older checkpoints stay.
    """
    with CheckpointWriter(run, engine, keep, asynchronous=False) as writer:
        writer.save(step, meta)
    return folder.folder_of(run, step)


def _buffers(shapes: Mapping[ChunkKey, torch.Size], pinned: bool) -> dict[ChunkKey, Tensor]:
    """fp32 tensors of these shapes in one allocation, because the system rounds each pinned one up."""
    sizes = [shape.numel() for shape in shapes.values()]
    parts = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=pinned).split(sizes)
    return {chunk: part.view(shape) for (chunk, shape), part in zip(shapes.items(), parts)}


def _share(state: Mapping[str, ShardedTensor], rank: int, group: dist.ProcessGroup) -> set[ChunkKey]:
    """Chunks that this rank writes: those that no other rank has, and its part of those that several ranks have."""
    sizes = {
        (name, chunk.offsets): chunk.data.nbytes
        for name, sharded in state.items()
        if not sharded.duplicate
        for chunk in sharded.chunks
    }
    digest = hashlib.sha256(repr(sorted(sizes)).encode()).hexdigest()
    digests = gather_from_ranks(lambda: digest, group)
    replicas = [other for other, theirs in enumerate(digests) if theirs == digest]
    loads = dict.fromkeys(replicas, 0)
    mine = set()
    for chunk in sorted(sizes, key=lambda chunk: (-sizes[chunk], chunk)):
        writer = min(replicas, key=loads.__getitem__)
        loads[writer] += sizes[chunk]
        if writer == rank:
            mine.add(chunk)
    return mine
