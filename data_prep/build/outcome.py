"""Results of all parts of a prep: checks of the data set, and its manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from data_prep.build.assemble import ShardJob, Stream, counts_of, recorded_shard
from data_prep.build.encode import Encoded, Reject, lost_characters, too_many_rejects
from data_prep.build.plan import PrepConfig
from data_prep.errors import DataError
from data_prep.format.manifest import REJECTS, SPLITS, Manifest, Recipe, SourceFile, Split, SplitName, unigram_nats
from data_prep.format.tokenizer import SpecialIds, token_dtype
from data_prep.sources import Part

Jobs = Mapping[SplitName, Sequence[ShardJob]]


def all_rejects(results: Sequence[Encoded]) -> list[Reject]:
    return [reject for result in results for reject in result.rejects]


def check_rejects(config: PrepConfig, results: Sequence[Encoded]) -> None:
    """Raise DataError if the bad records of all parts exceed ``max_rejects``."""
    rejects = all_rejects(results)
    if len(rejects) > config.max_rejects:
        raise too_many_rejects(len(rejects), rejects[0], config.max_rejects)


def check_documents(config: PrepConfig, results: Sequence[Encoded]) -> None:
    """Raise DataError if a split has no document."""
    rejects = all_rejects(results)
    counts = {name: sum(result.documents[name] for result in results) for name in SPLITS}
    documents = sum(counts.values())
    if not documents:
        raise no_documents(config, rejects, sum(sum(result.skipped.values()) for result in results))
    for name, count in counts.items():
        if not count:
            bad = f"; {len(rejects)} bad records, the first: {_told(rejects[0])}" if rejects else ""
            raise DataError(
                f"validation_fraction={config.validation_fraction}: none of {documents} documents falls into "
                f"the {name} split; change --validation-fraction or --seed, or give more documents{bad}"
            )


def no_documents(
    config: PrepConfig, rejects: Sequence[Reject], skipped: int = 0, where: str = "in the input"
) -> DataError:
    """The error for an input without documents, with the reason of the first bad record if there is one.

    Args:
        skipped: documents left out.
    """
    found = f"no documents {where}" + (f" ({skipped} were left out)" if skipped else "")
    if rejects:  # whose reason has a remedy
        return DataError(f"{found}: {_told(rejects[0])}")
    return DataError(f"{config.inputs[0]}: {found}; give files with text")


def _told(reject: Reject) -> str:
    return f"{reject.source} at {reject.offset}: {reject.reason}"


def check_rows(config: PrepConfig, jobs: Jobs, results: Sequence[Encoded]) -> None:
    """Raise DataError if a split has no row."""
    for name in SPLITS:
        if not jobs[name]:
            raise DataError(
                f"length={config.length}: the {sum(r.documents[name] for r in results)} documents of the {name} "
                f"split fill no row ({sum(r.tokens[name] for r in results)} tokens); use a shorter --length, another "
                "--validation-fraction or more text"
            )


def make_manifest(
    config: PrepConfig,
    recipe: Recipe,
    special: SpecialIds,
    tokenizer_sha256: str,
    parts: Sequence[Part],
    results: Sequence[Encoded],
    streams: Mapping[SplitName, Stream],
    jobs: Jobs,
) -> Manifest:
    """The manifest of a data set whose shards are all finished; equal for every number of parts and processes."""
    splits = {
        name: split_record(
            streams[name],
            jobs[name],
            recipe.documents,
            documents=sum(result.documents[name] for result in results),
            text_bytes=sum(result.text_bytes[name] for result in results),
        )
        for name in SPLITS
    }
    others = {why for result in results for why in result.skipped} - {"short", "long"}
    skipped = {why: sum(result.skipped.get(why, 0) for result in results) for why in ("short", "long", *sorted(others))}
    return Manifest(
        package_version=package_version(),
        length=config.length,
        **vocabulary(special),
        tokenizer_sha256=tokenizer_sha256,
        recipe=recipe,
        sources=_source_files(parts, results),
        rejects=len(all_rejects(results)),
        skipped={why: count for why, count in skipped.items() if count},
        lost_characters=lost_characters(entry for result in results for entry in result.sample) or None,
        nul_characters=sum(result.nul_characters for result in results),
        nul_documents=sum(result.nul_documents for result in results),
        **validation_unigram(jobs),
        splits=splits,
    )


def validation_unigram(jobs: Jobs) -> dict[str, Any]:
    """Fields of the manifest that compare the validation split with the train split."""
    nats = unigram_nats(counts_of(jobs["validation"]), counts_of(jobs["train"]) + 1)
    return {"validation_unigram_nats": nats, "validation_unigram_perplexity": math.exp(nats)}


def vocabulary(special: SpecialIds) -> dict[str, Any]:
    """Fields of the manifest that the tokenizer decides."""
    ids = {f"{name}_id": getattr(special, name) for name in ("bos", "eos", "mask", "pad")}
    return {"vocab_size": special.vocab_size, "dtype": token_dtype(special.vocab_size).str} | ids


def _source_files(parts: Sequence[Part], results: Sequence[Encoded]) -> list[SourceFile]:
    """The input files; the first part of each has its sha256."""
    return [
        SourceFile(name=part.source.name, bytes=part.source.bytes, sha256=result.sha256)
        for part, result in zip(parts, results)
        if part.begin == 0 and result.sha256 is not None
    ]


def split_record(
    stream: Stream, jobs: Sequence[ShardJob], starts: bool, documents: int, text_bytes: int, lost: int = 0
) -> Split:
    """The manifest's record of a split whose shards are all finished.

    Args:
        starts: the data set stores where documents start.
        documents, text_bytes: of the whole split.
        lost: tokens behind the stream that are not there (:class:`~data_prep.format.manifest.Tail`).
    """
    shards = [shard for job in jobs if (shard := recorded_shard(job)) is not None]
    rows = sum(shard.rows for shard in shards)
    counts = counts_of(jobs)
    return Split(
        documents=documents,
        text_bytes=text_bytes,
        rows=rows,
        tokens=rows * stream.rows.length,
        dropped_tokens=stream.tokens - rows * stream.rows.width,
        unigram_entropy=unigram_nats(counts, counts),
        shards=shards,
        tail=stream.tail(starts, lost),
    )


LEFT_OUT = {
    "short": "documents too short",
    "long": "documents too long",
    "empty": "documents without a token",
    "member": "texts of a tar beside the .txt of their sample",
    "unnamed": "members of a tar without an extension",
    "hidden": "hidden members of a tar",
}
"""reasons for leaving documents out, as the summary has them, by the keys of ``Manifest.skipped``"""


def totals(manifest: Manifest) -> dict[str, int]:
    """Documents: ``read + left_out + rejected = all``."""
    read = sum(split.documents for split in manifest.splits.values())
    left_out = sum(manifest.skipped.values())
    found = {"read": read, "left_out": left_out, "rejected": manifest.rejects}
    return {**found, "all": sum(found.values())}


def summary_lines(manifest: Manifest) -> list[str]:
    """Lines about the documents of a data set: what became of them, and what was left out."""
    lines = []
    if manifest.nul_characters:
        lines.append(
            f"removed {manifest.nul_characters} NUL characters (U+0000) from {manifest.nul_documents} documents"
        )
    counts = totals(manifest)
    lines.append(
        f"documents: {counts['read']} read + {counts['left_out']} left out + {counts['rejected']} rejected "
        f"= {counts['all']} in all"
    )
    left_out = [f"{count} {LEFT_OUT.get(why, why)}" for why, count in manifest.skipped.items()]
    if left_out:
        lines.append(f"left out: {', '.join(left_out)}")
    if manifest.rejects:
        lines.append(f"rejected: {manifest.rejects} bad records, listed in {REJECTS}")
    return lines


def package_version() -> str:
    """Version of this package, for manifests."""
    try:
        return metadata.version("bd3-megatron")
    except metadata.PackageNotFoundError:
        return "unknown"
