"""Checks by all ranks before the first step, at every start: nodes, links, clocks, folders and data.

Every rank gathers the measurements of all (:mod:`pretrain.preflight.probes`) and derives the same findings
(:mod:`pretrain.preflight.findings`), so all ranks continue or all raise.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bd3_common.atomic import write_bytes
from bd3_common.errors import ConfigError, user_line
from bd3_common.exit_codes import BAD_NODE
from bd3_megatron.cost import memory
from bd3_megatron.parallel import World
from data_prep.read.stream import RowStream
from pretrain.checkpoint.folder import folders as checkpoint_folders
from pretrain.config.schema import RunConfig, check_run
from pretrain.distributed.collective_errors import collective_errors, mark_collective
from pretrain.distributed.collectives import gather_from_ranks, gather_outcomes, on_rank_0, raise_on_all_ranks
from pretrain.distributed.ranks import Ranks, read_ranks
from pretrain.preflight import findings, probes
from pretrain.preflight.findings import Clock, Finding, Report
from pretrain.preflight.startup import start_ranks
from pretrain.resilience import signals
from pretrain.resilience.watchdog import Watchdog
from pretrain.run_folder import layout
from pretrain.run_folder.data import data_identity, open_data
from pretrain.run_folder.place import check_place

_LOG = logging.getLogger(__name__)
_LINES = 4  # findings in a message

Opened = tuple[RunConfig, RowStream, RowStream]


def check(config: RunConfig) -> None:
    """Check the nodes of this job for a run of this configuration.

    Raises:
        ConfigError, BadNodes: as :class:`Preflight`.
        LostRank: another rank died.
    """
    ranks = read_ranks()
    with collective_errors():
        check_run(config, ranks.world_size)
        check_place(config)
    with start_ranks(config, ranks) as job:
        preflight = Preflight(config, ranks, job.world, job.watchdog)
        preflight.nodes()
        if config.data.weights():
            config = preflight.data(lambda: open_data(config, job.world))[0]
        on_rank_0(lambda: job.run.mkdir(parents=True, exist_ok=True))
        preflight.folders(config)


class BadNodes(SystemExit):
    """Some nodes are at fault, listed in ``layout.BAD_NODES``; all ranks exit with ``BAD_NODE``."""


class Preflight:
    """Checks of one start; call the methods in their order. With ``preflight.enabled=false`` they check nothing.

    Raises:
        ConfigError: from each method, on all ranks: the run cannot start.
        BadNodes: likewise, with ``preflight.strict``: some nodes are at fault.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, world: World, watchdog: Watchdog):
        self.config, self.options, self.run = config, config.preflight, Path(config.run)
        self.ranks, self.world, self.watchdog = ranks, world, watchdog
        self.reports: list[Report] = []
        self.links: list[dict[int, float]] = []
        self.clocks: list[Clock] = []
        self.all_reduce, self.apart, self.seconds = 0.0, 0.0, 0.0
        self.findings: list[Finding] = []

    def nodes(self) -> None:
        """Check versions, GPUs and matmuls, and between ranks clocks, all-reduce and links."""
        if not self.options.enabled:
            return
        with self._timed("of the nodes"):
            options, device = self.options, self.world.device
            self.reports = gather_from_ranks(lambda: probes.report(self.ranks.local_rank, device))
            reports = self.reports
            found = findings.versions(reports) + findings.gpus(reports, options.free_gpu_memory)
            if any(finding.fatal for finding in found):
                self._conclude(found)
            scores = {rank: report.matmul for rank, report in enumerate(reports)}
            found += findings.rates(scores, reports, options.slowest, "matmul", findings.flops)
            if self.world.size > 1:
                found += self._between_ranks()
            self._conclude(found)

    def data(self, open_data: Callable[[], Opened]) -> Opened:
        """Open the data sets on all ranks; check that they are the same ones everywhere."""
        if not self.options.enabled:
            return raise_on_all_ranks(open_data)
        opened: list[Opened] = []

        def identify() -> str:
            opened.append(open_data())
            return data_identity(*opened[0][1].manifests)[:12]

        self.watchdog.tick("in the preflight of the data", may_take_long=True)  # checksums of all shards
        outcomes = gather_outcomes(identify)
        errors = [error for _, error in outcomes if error is not None]
        for error in errors:
            # An error of all nodes is no fault of nodes; a bug keeps its traceback.
            if user_line(error) is None or len(self._failed_hosts(outcomes)) == len(findings.hosts_of(self.reports)):
                raise mark_collective(error)
        lines = [None if error is None else user_line(error) for _, error in outcomes]
        self._conclude(findings.failures(lines, self.reports))
        if (differing := findings.differing([identity for identity, _ in outcomes], self.reports)) is not None:
            line = f"data set (digest of its shards): {differing}; give all nodes the same {' '.join(self._sources)}"
            self._conclude([Finding(line, fatal=True)])
        gather_from_ranks(lambda: self._look_up_shards(*opened[0][1:]))
        return opened[0]

    def folders(self, config: RunConfig) -> None:
        """Check the run and checkpoint folders, which must exist on rank 0; write the report and log its summary.

        Args:
            config: with the values that the data sets decide.
        """
        if not self.options.enabled:
            return
        with self._timed("of the folders"):
            names = on_rank_0(lambda: [path.name for path in self.run.glob(layout.CHECKPOINTS) if path.is_dir()])
            needed = self._checkpoints_to_come(config)
            found = []
            for name in ("", *names):
                found += self._folder(self.run / name, 0.0 if names and not name else needed)
            self._conclude(found)
        on_rank_0(self._write_report)
        _LOG.info(f"preflight: {self.summary()}")

    def summary(self) -> str:
        """``16 ranks on 2 nodes, matmul 612 to 655 TFLOP/s, all-reduce 180 GB/s, clocks within 3 ms, 4.1 s``"""
        ranks, nodes = len(self.reports), len(findings.hosts_of(self.reports))
        parts = [f"{ranks} rank{'s' * (ranks > 1)} on {nodes} node{'s' * (nodes > 1)}"]
        matmuls = [report.matmul for report in self.reports]
        parts.append(f"matmul {findings.spread(min(matmuls), max(matmuls), findings.flops)}")
        if ranks > 1:
            parts.append(f"all-reduce {findings.gigabytes(self.all_reduce)}")
        if nodes > 1:
            apart = f"{1e3 * self.apart:.1f} ms" if self.apart < 1 else f"{self.apart:.1f} s"
            parts.append(f"clocks within {apart}")
        return ", ".join([*parts, f"{self.seconds:.{1 if self.seconds >= 1 else 2}f} s"])

    def record(self) -> dict[str, Any]:
        """Everything measured, for JSON: FLOP/s, bytes/s, bytes and seconds."""
        reports, hosts = self.reports, {}
        for host, ranks in findings.hosts_of(reports).items():
            gpus = [reports[rank].gpu for rank in ranks if reports[rank].gpu]
            hosts[host] = {
                "ranks": ranks,
                "gpu": gpus[0].name if gpus else None,
                "free_gpu_memory": [gpu.free for gpu in gpus],
                "matmul": [round(reports[rank].matmul) for rank in ranks],
                "links": [{other: round(rate) for other, rate in self.links[rank].items()} for rank in ranks]
                if self.links
                else [],
                "clock": self.clocks[ranks[0]]._asdict() if self.clocks else None,
            }
        return {
            "time": round(time.time(), 3),
            "ranks": len(reports),
            "seconds": round(self.seconds, 3),
            "all_reduce": round(self.all_reduce),
            "versions": {name: value for name, value in reports[0].versions.items() if value != probes.ABSENT},
            "findings": [{"line": finding.line, "hosts": finding.hosts} for finding in self.findings],
            "hosts": hosts,
        }

    def _between_ranks(self) -> list[Finding]:
        reports, options, found = self.reports, self.options, []
        device = self.world.device if dist.get_backend() == "nccl" else torch.device("cpu")
        self.clocks = probes.clocks(device)
        late, self.apart = findings.clocks(self.clocks, reports, options.clock_skew)
        self.watchdog.tick("in the preflight of the links")
        self.all_reduce = probes.all_reduce_rate(device)
        measured = probes.link_rates(reports, self.world.rank, device, within=device.type == "cuda")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.links = gather_from_ranks(lambda: measured)
        for between in (False, True):
            found += findings.links(self.links, reports, options.slowest, between)
        return late + found

    def _folder(self, folder: Path, needed: float) -> list[Finding]:
        hosts = findings.hosts_of(self.reports)
        with ExitStack() as stack:
            name = on_rank_0(lambda: stack.enter_context(probes.mark(folder))) if len(hosts) > 1 else None
            places = gather_from_ranks(lambda: probes.place(folder, name) if self._is_first_of_node() else None)
        by_host = {host: places[ranks[0]] for host, ranks in hosts.items()}
        return findings.folders(f"run={folder}", by_host, needed)

    def _look_up_shards(self, *splits: RowStream) -> None:
        """Look up this node's share of the remote shards. A missing one is no fault of the node."""
        hosts = list(findings.hosts_of(self.reports))
        for split in splits if self._is_first_of_node() else ():
            probes.look_up_shards(split, hosts.index(self._mine.host), len(hosts))

    def _checkpoints_to_come(self, config: RunConfig) -> float:
        """Bytes of the checkpoints still to be written: those kept, and one more while it is written."""
        if config.model.vocab_size is None:  # no data set is given
            return 0.0
        one = memory.checkpoint_bytes(config.engine(), self.world.data_size)
        there = on_rank_0(lambda: len(checkpoint_folders(self.run)))
        return float(one * max(1, config.checkpoint.keep + 1 - there))

    def _conclude(self, found: Sequence[Finding]) -> None:
        """End the run or warn, on all ranks alike: they have the same findings."""
        self.findings += found
        fatal = [finding for finding in found if finding.fatal]
        faulty = [finding for finding in found if finding.hosts] if self.options.strict else []
        if faulty and all(finding.hosts for finding in fatal):
            on_rank_0(lambda: self._write_bad_nodes(faulty))
            signals.ignore()
            raise BadNodes(BAD_NODE)
        if fatal:
            raise mark_collective(ConfigError(_joined(fatal)))
        for finding in found:
            _LOG.warning(f"preflight: {finding.line}")

    def _write_bad_nodes(self, faulty: Sequence[Finding]) -> None:
        reasons: dict[str, str] = {}
        for finding in faulty:
            for host in finding.hosts:
                reasons[host] = "; ".join(filter(None, [reasons.get(host), finding.line]))
        self.run.mkdir(parents=True, exist_ok=True)
        self._write_report()
        named = {"hosts": list(reasons), "reasons": reasons}
        write_bytes(self.run / layout.BAD_NODES, f"{json.dumps(named, indent=1)}\n".encode())
        _LOG.warning(f"preflight: {_joined(faulty)}; preflight.strict=true: start again without {', '.join(reasons)}")

    def _write_report(self) -> None:
        """Write the measurements, one line per host: a person can read those of a thousand ranks."""
        record = self.record()
        hosts = ",\n".join(f"  {json.dumps(host)}: {json.dumps(values)}" for host, values in record["hosts"].items())
        text = json.dumps(record | {"hosts": {}}, indent=1).replace(
            '"hosts": {}\n}', f'"hosts": {{\n{hosts}\n }}\n}}\n'
        )
        write_bytes(self.run / layout.PREFLIGHT, text.encode())

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.monotonic()
        self.watchdog.tick(f"in the preflight {part}")
        try:
            yield
        finally:
            self.seconds += time.monotonic() - start
        self.watchdog.tick("before the first step", may_take_long=True)

    @property
    def _mine(self) -> Report:
        return self.reports[self.world.rank]

    @property
    def _sources(self) -> list[str]:
        return list(self.config.data.weights())

    def _is_first_of_node(self) -> bool:
        return findings.hosts_of(self.reports)[self._mine.host][0] == self.world.rank

    def _failed_hosts(self, outcomes: Sequence[tuple[Any, Exception | None]]) -> set[str]:
        return {report.host for report, (_, error) in zip(self.reports, outcomes) if error is not None}


def _joined(found: Sequence[Finding]) -> str:
    more = f" (and {len(found) - _LINES} more)" if len(found) > _LINES else ""
    return "; ".join(finding.line for finding in found[:_LINES]) + more
