"""`bd3 check`: verify a data set and show statistics of its contents."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from bd3_common.errors import ConfigError
from bd3_common.text import counted, json_line, printable, show
from data_prep.format.manifest import unigram_nats
from data_prep.verify.check import Checked, Sample, SplitContent, check
from pretrain.config.command_line import Positional, parse_options
from pretrain.tracking.histograms import bar_lines, length_bins, plot_histograms, quantile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FAULTY = 1
MOST_FILES, MOST_PAIRS, MOST_TOKENS = 50, 10, 12
SAMPLE_CHARS = 320
BORDER = " ‖ "


class CheckOptions(BaseModel):
    """Verify a data set file by file and row by row, and show what is in it: duplicate rows, lengths of documents,
    tokens, samples. Nothing is written to it. Exit code 0: it is as it was written; 1: it has faults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Positional[str] = Field(description="a data set that bd3 prep wrote: a folder or a URL")
    samples: int = Field(default=3, ge=0, le=10_000, description="rows of each split to show as text")
    seed: int = Field(default=0, ge=0, description="seed of the choice of these rows")
    plot: str | None = Field(default=None, description="PNG to write with both histograms; null: none")
    workers: int | None = Field(default=None, ge=1, description="processes; null means one per core")
    json_: bool = Field(default=False, description="print one line of JSON")


def main(args: list[str]) -> int:
    """Parse the options, check the data set and print what was found; the exit code.

    Raises:
        ConfigError, DataError: one line for the user.
    """
    options = parse_options(CheckOptions, args, "bd3 check")
    plot = Path(options.plot) if options.plot is not None else None
    if plot is not None and plot.absolute().parent.resolve().is_relative_to(Path(options.folder).resolve()):
        raise ConfigError(f"plot={options.plot}: lies in the data set, where it would be a fault; choose another place")
    found = check(
        options.folder,
        options.workers,
        options.samples,
        options.seed,
        lambda line: show(line, sys.stderr),
    )
    if plot is not None and found.splits:
        lengths = {name: content.lengths for name, content in found.splits.items()}
        plot_histograms(plot, lengths, {name: content.counts for name, content in found.splits.items()})
    if options.json_:
        print(json_line(as_json(found)))
    else:
        show("\n".join(map(printable, text_lines(found))))
    return FAULTY if found.faults else 0


def as_json(found: Checked) -> dict[str, Any]:
    """Results for ``--json``; counts of faults and duplicates are complete even where the lists are truncated."""
    result: dict[str, Any] = {
        "folder": str(found.folder),
        "ok": not found.faults,
        "faulty_files": len(found.faults),
        "faults": [{"file": path, "faults": list(why)} for path, why in islice(found.faults.items(), MOST_FILES)],
        "splits": {name: _split_json(found, name, content) for name, content in found.splits.items()},
        "duplicates": _duplicates_json(found),
        "samples": [{"split": s.split, "row": s.row, "text": sample_text(s)} for s in found.samples],
    }
    return result


def text_lines(found: Checked) -> list[str]:
    """The report for a terminal."""
    lines = [f"{path}: {why}" for path, why in islice(found.faults.items(), MOST_FILES)]
    if len(found.faults) > MOST_FILES:
        lines.append(f"... and {len(found.faults) - MOST_FILES} more files with faults")
    summary = "no faults: files, members and rows are as written"
    if found.faults:
        summary = counted(len(found.faults), "faulty file")
    lines.append(f"{found.folder}: {summary}")
    if not found.splits:
        return lines
    manifest = found.manifest
    lines.append(f"rows of {manifest.length} tokens, {manifest.recipe.packing}, vocabulary {manifest.vocab_size:,}")
    for name, content in found.splits.items():
        row = _split_json(found, name, content)
        lines.append(
            f"  {name:<10} {row['shards']:,} shards, {row['rows']:,} rows, {row['tokens']:,} tokens, "
            f"{row['documents']:,} documents"
        )
    lines += ["", *_duplicate_lines(found)]
    for name, content in found.splits.items():
        lines += ["", *_length_lines(name, _split_json(found, name, content)["lengths"])]
    lines += ["", *_token_lines(found)]
    for sample in found.samples:
        lines += ["", f"{sample.split} {sample.row}: {sample_text(sample)}"]
    return lines


def sample_text(sample: Sample, most: int = SAMPLE_CHARS) -> str:
    """A row on one line: white space as spaces, ``‖`` where a document starts, the middle of long ones left out."""
    texts = [" ".join(text.split()) for text in sample.documents]
    each = max(24, most // max(1, len(texts)))
    texts = [text if len(text) <= each else f"{text[: each // 2]} [...] {text[-each // 2 :]}" for text in texts]
    text = BORDER.join(texts)
    text = text if len(text) <= 2 * most else f"{text[: 2 * most]} [...]"
    return ("... " if sample.goes_on else BORDER.lstrip()) + text


def _split_json(found: Checked, name: str, content: SplitContent) -> dict[str, Any]:
    split = found.manifest.splits[name]
    counts, documents = content.counts, sum(content.lengths.values())
    return {
        "shards": len(split.shards),
        "rows": content.rows,
        "tokens": content.rows * found.manifest.length,
        "documents": content.starts,
        "text_bytes": split.text_bytes,
        "dropped_tokens": split.dropped_tokens,
        "lengths": {
            "documents": documents,
            "shortest": min(content.lengths, default=0),
            "median": quantile(content.lengths, 0.5),
            "mean": sum(length * count for length, count in content.lengths.items()) / max(1, documents),
            "p95": quantile(content.lengths, 0.95),
            "longest": max(content.lengths, default=0),
            "bins": length_bins(content.lengths),
            "cut_tokens": content.cut_tokens,
        },
        "vocabulary_used": int((counts > 0).sum()),
        "vocabulary_share": float((counts > 0).mean()),
        "entropy_nats": unigram_nats(counts, counts) if counts.any() else 0.0,
        "top_tokens": top_tokens(counts, found.tokenizer),
    }


def top_tokens(counts: np.ndarray, tokenizer: Tokenizer | None) -> list[list[Any]]:
    """[id, text, share of all] of the most frequent ids; equal counts by id."""
    order = np.argsort(-counts, kind="stable")[:MOST_TOKENS]
    total = max(1, int(counts.sum()))
    return [[int(i), token_text(tokenizer, int(i)), int(counts[i]) / total] for i in order if counts[i]]


def token_text(tokenizer: Tokenizer | None, index: int) -> str:
    """Text of an id; the vocabulary entry if the id is only part of a character."""
    if tokenizer is None:
        return ""
    text = tokenizer.decode([index], skip_special_tokens=False)
    return text if text and "\ufffd" not in text else tokenizer.id_to_token(index) or ""


def _duplicates_json(found: Checked) -> dict[str, Any] | None:
    """``*_copies``: rows of a split beyond the first of their group there; ``*_in_*``: contamination, in rows."""
    if (duplicates := found.duplicates) is None:
        return None
    rows, groups = duplicates.rows, duplicates.groups
    late = rows >= found.splits["train"].rows
    both = np.intersect1d(groups[late], groups[~late])
    shared = np.isin(groups, both)
    return {
        "groups": len(np.unique(groups)),
        "rows": len(rows),
        "train_copies": int((~late).sum()) - len(np.unique(groups[~late])),
        "validation_copies": int(late.sum()) - len(np.unique(groups[late])),
        "groups_in_both": len(both),
        "train_in_validation": int((shared & ~late).sum()),
        "validation_in_train": int((shared & late).sum()),
        "pairs": [[list(found.place(number)) for number in pair] for pair in duplicates.pairs(MOST_PAIRS)],
    }


def _duplicate_lines(found: Checked) -> list[str]:
    row = _duplicates_json(found)
    if row is None:
        return ["duplicate rows: not looked for, because shards are damaged"]
    if not row["rows"]:
        return ["duplicate rows: none, neither within a split nor across"]
    lines = [
        f"duplicate rows: {row['rows']:,} in {row['groups']:,} groups; copies within train "
        f"{row['train_copies']:,}, within validation {row['validation_copies']:,}; validation rows that are in "
        f"train {row['validation_in_train']:,}, train rows that are in validation {row['train_in_validation']:,}"
    ]
    for first, second in row["pairs"]:
        lines.append(f"  {first[0]} {first[1]} = {second[0]} {second[1]}")
    return lines


def _length_lines(name: str, row: dict[str, Any]) -> list[str]:
    lines = [
        f"{name}: tokens of {row['documents']:,} documents: shortest {row['shortest']:,}, median {row['median']:,}, "
        f"mean {row['mean']:,.0f}, 95% up to {row['p95']:,}, longest {row['longest']:,}"
    ]
    if row["cut_tokens"] is not None:
        lines.append(f"  and one that the end of the split cuts after {row['cut_tokens']:,} tokens")
    return lines + [f"  {line}" for line in bar_lines(row["bins"])]


def _token_lines(found: Checked) -> list[str]:
    lines = []
    for name, content in found.splits.items():
        row = _split_json(found, name, content)
        lines.append(
            f"{name}: {row['vocabulary_used']:,} of {found.manifest.vocab_size:,} ids used "
            f"({row['vocabulary_share']:.1%}), unigram entropy {row['entropy_nats']:.3f} nats; most frequent:"
        )
        tokens = [f"{text!r} {share:.2%}" for _, text, share in row["top_tokens"]]
        lines += [
            f"  {'  '.join(f'{token:<18}' for token in tokens[i : i + 6])}".rstrip() for i in range(0, len(tokens), 6)
        ]
    return lines
