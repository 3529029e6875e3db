"""Findings of a preflight: slow ranks, and nodes with other versions, clocks or folders than the rest.

Pure functions of measurements gathered from all ranks, so every rank has the same findings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from pretrain.distributed.wire_types import crosses_ranks
from pretrain.resilience.hang_detection import spans
from slurm.environment import compress_hosts

GIB = 2**30
# Memory that the process itself takes of its GPU by then: its context and the first communicator's buffers.
OWN_MEMORY = 2 * GIB


@crosses_ranks
class Gpu(NamedTuple):
    """A rank's GPU; memory in bytes. ``seen`` is the number of GPUs that the rank's process sees."""

    name: str
    total: int
    free: int
    seen: int


@crosses_ranks
@dataclass(frozen=True)
class Report:
    """Measurements of one rank.

    Attributes:
        versions: by name; all ranks must have the same.
        gpu: None on the CPU.
        matmul: FLOP/s; 0 where the GPU had no memory left for it.
    """

    host: str
    local_rank: int
    versions: Mapping[str, str] = field(default_factory=dict)
    gpu: Gpu | None = None
    matmul: float = 0.0


class Clock(NamedTuple):
    """Offset of a rank's clock from rank 0's (positive: ahead), and its uncertainty; seconds."""

    offset: float
    uncertainty: float


@crosses_ranks
class Place(NamedTuple):
    """A node's view of a folder that all nodes share.

    Attributes:
        sees: the first node's file is there.
        error: of writing there; empty if it worked.
        free: bytes.
    """

    sees: bool
    error: str = ""
    free: int = 0


@dataclass(frozen=True)
class Finding:
    """A fault, as one line: place, value, remedy.

    Attributes:
        hosts: nodes at fault, which ``preflight.strict`` excludes.
        fatal: the run cannot start with this, strict or not.
    """

    line: str
    hosts: tuple[str, ...] = ()
    fatal: bool = False


def hosts_of(reports: Sequence[Report]) -> dict[str, list[int]]:
    """Ranks by host, hosts in the order of their first rank."""
    ranks: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        ranks.setdefault(report.host, []).append(rank)
    return ranks


def partners(members: int, rounds: int = 3) -> list[dict[int, int]]:
    """Partner of each member in the first ``rounds`` rounds of a round-robin tournament, by the circle method.

    No two members meet twice. In each round every member has a partner, but one where their number is odd.
    """
    even = members + members % 2
    made = []
    for turn in range(min(rounds, even - 1)):
        pairs = [(turn, even - 1)]
        pairs += [((turn + k) % (even - 1), (turn - k) % (even - 1)) for k in range(1, even // 2)]
        meet = [pair for pair in pairs if max(pair) < members]
        made.append({one: other for pair in meet for one, other in (pair, pair[::-1])})
    return made


def slow(scores: Mapping[Hashable, float], share: float) -> tuple[float, list[Any]]:
    """Median of the scores, and names with a score below ``share`` of it: always fewer than half."""
    if not scores:
        return 0.0, []
    middle = median(scores.values())
    return middle, [name for name, score in scores.items() if score < share * middle]


def differing(values: Sequence[Hashable], reports: Sequence[Report]) -> str | None:
    """``"2.11.0 on node[1-3], 2.12.0 on node4"``, the most frequent value first; None if all ranks have the same.

    Where ranks of one host differ, the ranks are listed.
    """
    if len(set(values)) < 2:
        return None
    by_host = {host: {values[rank] for rank in ranks} for host, ranks in hosts_of(reports).items()}
    words = []
    for value in sorted(set(values), key=lambda value: (-values.count(value), values.index(value))):
        alike = [host for host, found in by_host.items() if found == {value}]
        ranks = [r for r, found in enumerate(values) if found == value and len(by_host[reports[r].host]) > 1]
        named = ([compress_hosts(alike)] if alike else []) + ([_ranks(ranks)] if ranks else [])
        words.append(f"{value} on {' and '.join(named)}")
    return ", ".join(words)


def versions(reports: Sequence[Report]) -> list[Finding]:
    """Findings for packages, drivers and sources that differ between ranks."""
    found = []
    for name in dict.fromkeys(name for report in reports for name in report.versions):
        # Some are looked up by the first rank of a host only.
        having = [report for report in reports if name in report.versions]
        text = differing([report.versions[name] for report in having], having)
        if text is not None:
            found.append(Finding(f"{name}: {text}; all nodes must have the same", fatal=True))
    return found


def gpus(reports: Sequence[Report], free_share: float) -> list[Finding]:
    """Findings for GPUs of another kind than most, too few GPUs on a node, and GPUs that others occupy."""
    if all(report.gpu is None for report in reports):
        return []
    found = []
    kinds = ["no GPU" if r.gpu is None else f"{r.gpu.name} ({r.gpu.total / GIB:.0f} GiB)" for r in reports]
    if (text := differing(kinds, reports)) is not None:
        usual = max(dict.fromkeys(kinds), key=kinds.count)
        others = tuple(dict.fromkeys(r.host for r, kind in zip(reports, kinds) if kind != usual))
        found.append(Finding(f"GPU: {text}; the slowest one sets the pace, use nodes of one kind", others))
    for host, ranks in hosts_of(reports).items():
        here = [report.gpu for rank in ranks if (report := reports[rank]).gpu]
        seen = max((gpu.seen for gpu in here), default=0)
        if here and 1 < seen < len(ranks):
            found.append(Finding(f"{host}: {seen} GPUs for {len(ranks)} ranks; start one rank per GPU", fatal=True))
        occupied = []
        for rank in ranks:
            gpu = reports[rank].gpu
            if gpu and (reports[rank].matmul == 0 or min(gpu.free + OWN_MEMORY, gpu.total) < free_share * gpu.total):
                occupied.append(f"{_device(reports, rank)} has {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free")
        if occupied:
            line = f"{host}: {_some(occupied)} (preflight.free_gpu_memory={free_share:g}); "
            full = any(reports[rank].gpu and reports[rank].matmul == 0 for rank in ranks)
            found.append(Finding(f"{line}look with nvidia-smi for a process of another job", (host,), fatal=full))
    return found


def rates(
    scores: Mapping[int, float], reports: Sequence[Report], share: float, name: str, unit: Callable[[float], str]
) -> list[Finding]:
    """A finding for each host with ranks slower than ``share`` of the median over ranks.

    Args:
        scores: by rank, more is better; 0 is another check's finding.
        name: of the measurement, as in ``matmul``.
        unit: formats a score.
    """
    middle, named = slow({rank: score for rank, score in scores.items() if score > 0}, share)
    found = []
    for host, ranks in hosts_of(reports).items():
        here = [rank for rank in ranks if rank in named]
        if here:
            scored = [f"{_device(reports, rank)} {unit(scores[rank])}" for rank in here]
            line = f"{host}: {name} is slow: {_some(scored)}, median {unit(middle)} (preflight.slowest={share:g})"
            found.append(Finding(f"{line}; exclude the node until it is repaired", (host,)))
    return found


def links(
    measured: Sequence[Mapping[int, float]], reports: Sequence[Report], share: float, between: bool
) -> list[Finding]:
    """Findings for ranks that are slow with every partner, and for slow pairs whose ranks are fast with others.

    A pair is as slow as the slower of its two ranks. So a rank's rate is that of the best of its pairs; it has three
    of them (:func:`partners`), because some partners may be slow.

    Args:
        measured: bytes/s in one direction by partner's rank, of each rank.
        between: links between nodes, not inside of them.
    """
    where = "network to other nodes" if between else "link to GPUs of the node"
    mine = [
        {other: rate for other, rate in pairs.items() if (reports[other].host != report.host) == between}
        for report, pairs in zip(reports, measured)
    ]
    best = {rank: max(pairs.values()) for rank, pairs in enumerate(mine) if pairs}
    found = rates(best, reports, share, where, gigabytes)
    middle, named = slow(best, share)
    single = [
        f"{_place(reports, rank)} to {_place(reports, other)} {gigabytes(rate)}"
        for rank, pairs in enumerate(mine)
        for other, rate in pairs.items()
        if rank < other and rate < share * middle and rank not in named and other not in named
    ]
    if single:
        line = f"slow links: {_some(single)}, median {gigabytes(middle)} (preflight.slowest={share:g})"
        found.append(Finding(f"{line}; both ends are fast with others"))
    return found


def clocks(measured: Sequence[Clock], reports: Sequence[Report], limit: float) -> tuple[list[Finding], float]:
    """Findings for hosts whose clocks certainly differ by more than ``limit`` seconds from the median host's.

    Args:
        measured: against rank 0, by rank.

    Returns:
        the findings, and the largest possible difference of two clocks, seconds.
    """
    by_host = {host: measured[ranks[0]] for host, ranks in hosts_of(reports).items()}
    order = sorted(by_host, key=lambda host: by_host[host].offset)
    middle = order[(len(order) - 1) // 2]
    ends = [(clock.offset - clock.uncertainty, clock.offset + clock.uncertainty) for clock in by_host.values()]
    found: list[Finding] = []
    for host, clock in by_host.items():
        if host == middle:
            continue
        apart = clock.offset - by_host[middle].offset
        unsure = clock.uncertainty + by_host[middle].uncertainty
        if abs(apart) - unsure > limit:
            line = f"{host}: its clock is {abs(apart):.1f} s {'ahead of' if apart > 0 else 'behind'} {middle}'s"
            # With two hosts, either may be wrong.
            hosts = (host,) if len(by_host) > 2 else tuple(by_host)
            found.append(Finding(f"{line} (preflight.clock_skew={limit:g}); set it by NTP", hosts))
    return found, max(high for _, high in ends) - min(low for low, _ in ends)


def folders(key: str, places: Mapping[str, Place], needed: float = 0.0) -> list[Finding]:
    """Findings for nodes that cannot write into a folder or see another one there, and for too little space.

    Args:
        key: of the configuration, as in ``run=runs/a``.
        places: by host; the first host wrote the file that all should see.
        needed: bytes.
    """
    first, *_ = places
    found = []
    blind = [host for host, place in places.items() if not place.sees]
    if blind:
        verb = "does" if len(blind) == 1 else "do"
        line = f"{key}: {compress_hosts(blind)} {verb} not see what {first} wrote; the folder must be on a file system"
        found.append(Finding(f"{line} that all nodes share", _few(blind, places), fatal=True))
    errors: dict[str, list[str]] = {}
    for host, place in places.items():
        if place.sees and place.error:
            errors.setdefault(place.error, []).append(host)
    for error, hosts in errors.items():
        line = f"{key}: {compress_hosts(hosts)} cannot write there ({error}); mend rights or mount, or use another"
        found.append(Finding(line, _few(hosts, places), fatal=True))
    if not found and places[first].free < needed:
        line = f"{key}: {places[first].free / 1e9:.1f} GB are free, the checkpoints to come take {needed / 1e9:.1f} GB"
        found.append(Finding(f"{line} (checkpoint.keep and one more); make room"))
    return found


def failures(errors: Sequence[str | None], reports: Sequence[Report]) -> list[Finding]:
    """Findings for errors of ranks, each error once, with its hosts unless all have it."""
    hosts = hosts_of(reports)
    found = []
    for error in dict.fromkeys(filter(None, errors)):
        failed = list(dict.fromkeys(reports[rank].host for rank, other in enumerate(errors) if other == error))
        where = f" (on {compress_hosts(failed)}, {len(failed)} of {len(hosts)} nodes)" if len(hosts) > 1 else ""
        found.append(Finding(error + where * (len(failed) < len(hosts)), _few(failed, hosts), fatal=True))
    return found


def gigabytes(rate: float) -> str:
    """``1.8e11 -> "180 GB/s"``"""
    return f"{_three(rate / 1e9)} GB/s"


def flops(rate: float) -> str:
    """``6.12e14 -> "612 TFLOP/s"``"""
    return f"{_three(rate / 1e12)} TFLOP/s" if rate >= 1e12 else f"{_three(rate / 1e9)} GFLOP/s"


def spread(low: float, high: float, unit: Callable[[float], str]) -> str:
    """``"612 to 655 TFLOP/s"``; one number where both look the same."""
    one, other = unit(low), unit(high)
    if one == other:
        return one
    number, _, name = one.rpartition(" ")
    return f"{number if other.endswith(name) else one} to {other}"


def _few(hosts: Sequence[str], all_hosts: Mapping[str, Any]) -> tuple[str, ...]:
    """The hosts if they are fewer than half; else none, because the fault is not theirs."""
    return tuple(hosts) if 2 * len(hosts) < len(all_hosts) else ()


def _device(reports: Sequence[Report], rank: int) -> str:
    return f"rank {rank}" if reports[rank].gpu is None else f"rank {rank} (GPU {reports[rank].local_rank})"


def _place(reports: Sequence[Report], rank: int) -> str:
    return f"{reports[rank].host} {_device(reports, rank)}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {spans(ranks).replace(' ', '')}"


def _some(words: Sequence[str], most: int = 4) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def _three(value: float) -> str:
    """Three digits: 612, 45.3, 0.123."""
    value = float(f"{value:.3g}")  # 99.96 is 100
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(0, digits), 6)}f}"
