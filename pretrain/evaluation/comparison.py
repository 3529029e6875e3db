"""Comparison of runs on common rows and common noise: paired differences of the bound with their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bd3_common.errors import ConfigError
from pretrain.evaluation.document_likelihood import ratio, ratio_residuals
from pretrain.evaluation.report import EvaluationReport


@dataclass(frozen=True)
class Difference:
    """A run's bound less that of the first run, on the same rows.

    Attributes:
        nats: per token; negative is better than the first.
        stderr: over rows, paired: what both runs find hard, and the noise they share, cancels.
        stderr_documents: over documents, paired; NaN without document starts.
    """

    nats: float
    stderr: float
    stderr_documents: float


@dataclass(frozen=True)
class Comparison:
    """Reports of several runs, by name, on the same rows."""

    names: Sequence[str]
    reports: Sequence[EvaluationReport]

    def __post_init__(self) -> None:
        first = self.reports[0].likelihood
        for name, report in zip(self.names, self.reports):
            if len(report.likelihood.nats) != len(first.nats):
                raise ConfigError(
                    f"{name}: {len(report.likelihood.nats)} rows, {self.names[0]} has {len(first.nats)}; "
                    f"compare on one data set with --data"
                )

    def difference(self, number: int) -> Difference:
        """That of run ``number`` to run 0."""
        first, other = self.reports[0].likelihood, self.reports[number].likelihood
        nats, error = _paired(first.nats, first.tokens, other.nats, other.tokens)
        by_document = math.nan
        a, b = first.documents, other.documents
        if a is not None and b is not None and np.array_equal(a.numbers, b.numbers):
            _, by_document = _paired(a.nats, a.tokens, b.nats, b.tokens)
        return Difference(nats, error, by_document)

    def records(self) -> list[dict[str, Any]]:
        """One record for each run, for JSON."""
        found = []
        for number, (name, report) in enumerate(zip(self.names, self.reports)):
            record: dict[str, Any] = {"run": name} | report.record()
            if number:
                d = self.difference(number)
                values = {"difference": d.nats, "difference_stderr": d.stderr}
                values["difference_stderr_documents"] = d.stderr_documents
                record |= {key: None if math.isnan(x) else x for key, x in values.items()}
            found.append(record)
        return found

    def rows(self) -> list[list[str]]:
        """Cells of a table: run, step, B', NELBO, perplexity, difference to the first run."""
        cells = []
        for number, (name, report) in enumerate(zip(self.names, self.reports)):
            result, paired = report.result, "-"
            if number:
                d = self.difference(number)
                paired = f"{d.nats:+.4f} +- {_known(d.stderr, d.stderr_documents)}"
            nelbo = f"{result.nelbo:.4f} +- {_known(result.nelbo_stderr, report.likelihood.document_stderr)}"
            perplexity = f"{result.perplexity:.2f} +- {result.perplexity_stderr:.2f}"
            cells.append([name, str(report.step), str(report.block_size), nelbo, perplexity, paired])
        return cells


HEADER = ["run", "step", "B'", "NELBO +- over rows (documents)", "perplexity", "to the first +- over rows (documents)"]


def _known(rows: float, documents: float) -> str:
    return f"{rows:.4f}" + ("" if math.isnan(documents) else f" ({documents:.4f})")


def _paired(a: np.ndarray, a_tokens: np.ndarray, b: np.ndarray, b_tokens: np.ndarray) -> tuple[float, float]:
    """Difference of two ratios of sums over the same samples, b's less a's, and its standard error."""
    difference = ratio(b, b_tokens)[0] - ratio(a, a_tokens)[0]
    residuals = ratio_residuals(b, b_tokens) - ratio_residuals(a, a_tokens)
    count = len(residuals)
    return difference, float(residuals.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
