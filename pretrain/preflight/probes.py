"""Measurements of a preflight: in this process alone, and between ranks.

All transfers use the group of all ranks: NCCL would take longer to make a group for each pair than to measure it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from bd3_common import PACKAGES, ROOT
from data_prep.errors import DataError
from data_prep.format.remote import list_remote
from data_prep.read.stream import RowStream
from pretrain.preflight.findings import Clock, Gpu, Place, Report, hosts_of, partners

ABSENT = "not installed"
_PACKAGES = (
    "bd3-megatron",
    "torch",
    "megatron-core",
    "transformer-engine",
    "deepspeed",
    "flash-attn",
    "flash-attn-4",
    "triton",
    "numpy",
)
_DRIVER = Path("/proc/driver/nvidia/version")
# Sides of matrices, and bytes: enough for the full rates of GPUs and networks, little for CPUs.
_SIDE = {"cuda": 8192, "cpu": 256}
_MATMULS = {"cuda": 20, "cpu": 5}
_ALL_REDUCE = {"cuda": 2**28, "cpu": 2**20}
_EXCHANGE = {"cuda": 2**26, "cpu": 2**18}
_REPEATS = 3
_CLOCK_ROUNDS = 4
SHARDS_LOOKED_UP = 2  # of each remote data set, by the first rank of each node
SEEN_WITHIN = 10.0  # seconds until a file on a shared file system must have appeared on other nodes
MARK = ".preflight-"


def host_name() -> str:
    """This node's name: Slurm's, so that a job can exclude it, or else the system's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def report(local_rank: int, device: torch.device) -> Report:
    """Measurements of this rank; the digest of the sources on the first rank of a node only."""
    gpu = None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        gpu = Gpu(torch.cuda.get_device_name(device), total, free, torch.cuda.device_count())
    sources = {"sources": source_digest()} if local_rank == 0 else {}
    return Report(host_name(), local_rank, versions(device) | sources, gpu, matmul_rate(device))


def versions(device: torch.device) -> dict[str, str]:
    """Versions of packages and drivers that affect results and speed, by name."""
    found = {"python": platform.python_version()} | {name: _installed(name) for name in _PACKAGES}
    found["torch"] = torch.__version__
    if device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
        found["cuDNN"] = str(torch.backends.cudnn.version())
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        with contextlib.suppress(OSError):
            number = re.search(r"\s(\d+\.[\d.]+)\s", _DRIVER.read_text())
            found["driver"] = number[1] if number else "unknown"
    return found


def source_digest() -> str:
    """Digest of the project's own files: checkouts of one version may differ."""
    digest = hashlib.sha256()
    for room in PACKAGES:
        for path in sorted(path for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".yaml")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of square matmuls, bf16 on a GPU and fp32 on the CPU; 0 where the GPU has no memory left for them."""
    side, cuda = _SIDE[device.type], device.type == "cuda"
    # Random, because a GPU's power depends on the numbers; not from the generators that training uses.
    generator = torch.Generator(device).manual_seed(0)
    try:
        shape, dtype = (side, side), torch.bfloat16 if cuda else torch.float32
        left, right = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(left)
        _multiply(left, right, out, device, 3 if cuda else 1)
        if cuda:  # the mean of many in a row: a GPU that is too hot lowers its clock
            seconds = _multiply(left, right, out, device, _MATMULS["cuda"]) / _MATMULS["cuda"]
        else:
            seconds = min(_multiply(left, right, out, device, 1) for _ in range(_MATMULS["cpu"]))
    except torch.OutOfMemoryError:
        return 0.0
    finally:
        if cuda:
            left = right = out = None
            torch.cuda.empty_cache()
    return 2 * side**3 / seconds


def clocks(device: torch.device) -> list[Clock]:
    """Each rank's clock against rank 0's, by rank.

    No rank leaves an all-gather before all ranks have entered it. By the times at which they enter and leave, each on
    its own clock, rank r is ahead of rank 0 by at least ``enter_r - leave_0`` and at most ``leave_r - enter_0``:
    Cristian's algorithm for all ranks at once. Several rounds narrow the bounds; the first also waits for late ranks.
    """
    size = dist.get_world_size()
    mine = torch.zeros(2, dtype=torch.int64, device=device)
    gathered = torch.empty(size, 2, dtype=torch.int64, device=device)
    low, high = [-float("inf")] * size, [float("inf")] * size
    for turn in range(_CLOCK_ROUNDS + 1):
        entered = now()
        dist.all_gather_into_tensor(gathered.view(-1), mine)
        times = gathered.tolist()  # of the round before; waits for the GPU
        left = now()
        mine = torch.tensor([entered, left], dtype=torch.int64, device=device)
        if turn:
            enter_first, leave_first = times[0]
            for rank, (enter, leave) in enumerate(times):
                low[rank] = max(low[rank], (enter - leave_first) / 1e9)
                high[rank] = min(high[rank], (leave - enter_first) / 1e9)
    return [
        Clock((a + b) / 2, abs(b - a) / 2) if rank else Clock(0.0, 0.0) for rank, (a, b) in enumerate(zip(low, high))
    ]


def now() -> int:
    """This node's clock, nanoseconds."""
    return time.time_ns()


def all_reduce_rate(device: torch.device) -> float:
    """Bus bandwidth of an all-reduce over all ranks, bytes/s: ``2 (n - 1) / n`` times its bytes over its seconds."""
    size = dist.get_world_size()
    buffer = torch.zeros(_ALL_REDUCE[device.type] // 4, device=device)
    seconds = _best(lambda: dist.all_reduce(buffer), device)
    return 2 * (size - 1) / size * buffer.nbytes / seconds


def link_rates(reports: Sequence[Report], rank: int, device: torch.device, within: bool) -> dict[int, float]:
    """Bytes/s in one direction, while both directions are used, by partner's rank.

    All pairs of a round exchange at the same time: first inside the nodes, then each rank with the rank of the same
    index on another node, so that a node uses all its ports, as in training.

    Args:
        within: measure inside the nodes, too. Without GPUs it says nothing, because processes share memory there.
    """
    hosts = list(hosts_of(reports).values())
    mine = next(ranks for ranks in hosts if rank in ranks)
    place = mine.index(rank)
    across = [ranks[place] for ranks in hosts if len(ranks) > place]
    size = _EXCHANGE[device.type]
    sent, received = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    found = {}
    for members in ([mine] if within else []) + [across]:
        for meets in partners(len(members)):
            other = meets.get(members.index(rank))
            if other is not None:
                seconds = _best(lambda to=members[other]: _exchange(sent, received, to), device)
                found[members[other]] = size / seconds
    return found


@contextlib.contextmanager
def mark(folder: Path) -> Iterator[str]:
    """Make a file that other nodes look for, and remove it at the end; yields its name.

    Raises:
        OSError: the folder cannot be written.
    """
    for left in folder.glob(f"{MARK}*"):  # by a job that was killed
        left.unlink(missing_ok=True)
    path = folder / f"{MARK}{uuid.uuid4().hex}"
    _write(path, b"")
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def place(folder: Path, name: str | None) -> Place:
    """Look for the file ``name`` in a folder, write another one there, and count the free bytes."""
    if name is not None and not _appears(folder / name):
        return Place(False)
    path, content = folder / f"{MARK}{uuid.uuid4().hex}", os.urandom(64)
    try:
        try:
            _write(path, content)
            if path.read_bytes() != content:
                return Place(True, "it does not read back what it wrote")
        finally:
            path.unlink(missing_ok=True)
        disk = os.statvfs(folder)
    except OSError as error:
        return Place(True, error.strerror or type(error).__name__)
    return Place(True, "", disk.f_bavail * disk.f_frsize)


def look_up_shards(stream: RowStream, share: int, shares: int) -> None:
    """Compare the sizes of a few remote shards of this share with the manifest; local ones were checked at opening.

    Raises:
        DataError: one is missing or has another size, or the server does not answer.
    """
    for reader in stream.readers:
        for shard in reader.shards[share::shares][:SHARDS_LOOKED_UP] if reader.remote else ():
            url = f"{reader.folder}/{reader.split}/{shard.name}"
            found = list_remote(url).single
            if found is None or found.bytes not in (None, shard.bytes):
                has = "a folder" if found is None else f"{found.bytes} bytes"
                raise DataError(f"{url}: {has}, the manifest says {shard.bytes}; copy the data set again")


def _appears(path: Path) -> bool:
    end = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > end:
            return False
        for folder in (path.parent.parent, path.parent):  # reading a folder makes NFS look at the server again
            with contextlib.suppress(OSError):
                os.listdir(folder)
        time.sleep(0.1)
    return True


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:  # a new file of a random name
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ABSENT


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, device: torch.device, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        torch.mm(left, right, out=out)
    _synchronize(device)
    return time.perf_counter() - start


def _exchange(sent: torch.Tensor, received: torch.Tensor, other: int) -> None:
    # In a batch, NCCL uses the group's communicator; single calls would make one for the pair.
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]):
        work.wait()


def _best(function, device: torch.device) -> float:
    """Seconds of the fastest call, after one that makes connections and waits for late ranks."""
    function()
    _synchronize(device)
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        function()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
