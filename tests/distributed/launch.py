"""`bd3 pretrain` on several ranks that can be killed one by one, started as torchrun's agent would start them."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from pretrain import cli
from tests.polling import TIMEOUT
from tests.unit import commands
from tests.unit.commands import Done


class Job:
    """A started job: its ranks, and what they print in ``folder/rank<n>.out`` and ``.err``.

    Args:
        before: called in the processes of these ranks first.
    """

    def __init__(
        self, args: Sequence[object], size: int, folder: Path, before: dict[int, Callable[[], None]] | None = None
    ):
        # torchrun's agent serves the store, and outlives the ranks.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.logs = [folder / f"rank{rank}" for rank in range(size)]
        self.ranks = [
            commands.start(
                *args,
                log=self.logs[rank],
                before=functools.partial(_prepare, rank, size, self._store.port, (before or {}).get(rank)),
            )
            for rank in range(size)
        ]

    def finish(self, timeout: float = TIMEOUT) -> list[Done]:
        """Wait for all ranks; a rank that does not end is killed and has the code -9."""
        end = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        for process in self.ranks:
            process.kill()
            process.join()
        texts = [[log.with_suffix(x).read_text(errors="replace") for x in (".out", ".err")] for log in self.logs]
        return [Done(process.exitcode, *text) for process, text in zip(self.ranks, texts)]

    @property
    def running(self) -> bool:
        """True while no rank has ended."""
        return all(process.exitcode is None for process in self.ranks)


def _prepare(rank: int, size: int, port: int, before: Callable[[], None] | None) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    cli.RANK_0_PRINTS = 0.1  # no launcher here ends the other ranks
    if before is not None:
        before()
