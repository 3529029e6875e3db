"""Metric sinks: places that the numbers of a run are written to. Rank 0 alone opens them."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from bd3_common.errors import ConfigError
from bd3_common.registry import Registry


class MetricSink(ABC):
    """One place for the numbers of a run, open from the start or resume of the run to its end.

    A run that resumes, or that goes back after a loss spike, opens its sinks anew with the step of the checkpoint:
    records of later steps come once more.

    Args:
        folder: the run folder, which exists.
        resume_step: step of the checkpoint that the run continues from; 0 for a new run.
        config: the resolved configuration as nested plain values.

    Raises:
        ConfigError: it cannot be opened: one line with the remedy.
        OSError: the folder cannot be written.
    """

    extra: ClassVar[str] = ""
    """extra of bd3-megatron that installs the packages of this sink, for the message where one is missing"""

    def __init__(self, folder: Path, resume_step: int = 0, config: Mapping[str, Any] | None = None) -> None:
        self.folder, self.resume_step, self.config = folder, resume_step, config or {}

    @abstractmethod
    def record(self, split: str, step: int, values: Mapping[str, int | float | None]) -> None:
        """Write the numbers of one step.

        Args:
            split: ``train`` (loss, grad_norm, lr, tokens), ``validation`` (nelbo in nats per token, perplexity),
                ``clip_search`` (beta, omega, variance), ``throughput`` (tokens_per_second, mfu, seconds_per_step) or
                ``checkpoint`` (stall_seconds, bytes).
            step: optimizer steps done, from 1.
            values: numbers by name; None: no value.
        """

    def sync(self) -> None:  # noqa: B027
        """Make what was recorded last a crash: called before each checkpoint."""

    def close(self) -> None:  # noqa: B027
        """Write what is left and close."""

    @classmethod
    def package(cls, name: str) -> ModuleType:
        """Import a package that not every installation has.

        Raises:
            ConfigError: it is not installed; the line names the extra that installs it.
        """
        try:
            return importlib.import_module(name)
        except ImportError as error:
            sink = cls.__module__.rpartition(".")[2]
            remedy = f"pip install 'bd3-megatron[{cls.extra}]'" if cls.extra else f"install {name.partition('.')[0]}"
            raise ConfigError(
                f"log.sinks={sink}: {name} cannot be imported ({error}); {remedy}, or leave the sink out"
            ) from error


METRIC_SINKS = Registry(MetricSink, "metric sink", "log.sinks", "bd3_megatron.metric_sinks")
