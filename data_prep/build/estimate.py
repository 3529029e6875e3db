"""Estimates of a prep from a sample of the text: tokens, shards, disk, time. Nothing is written."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.build import pool
from data_prep.build.encode import SAMPLED, Reject, excerpt, in_validation, lost_line
from data_prep.build.outcome import no_documents
from data_prep.build.plan import PrepConfig, parts_of, workers_of
from data_prep.build.progress import duration
from data_prep.format.manifest import SPLITS, SplitName
from data_prep.format.remote import fetch
from data_prep.format.text_encoder import TextEncoder
from data_prep.format.tokenizer import control_ids, load_tokenizer, remarks, special_ids, token_dtype, train_bpe
from data_prep.sources import AnyDocument, Source, TokenDocument, find, read_part, split
from data_prep.sources.kinds import INPUT_KINDS
from data_prep.sources.streams import unpack

SAMPLED_FILES = 16
FETCHED_FILES = 2  # of remote sources
SAMPLE_BYTES = 4 << 20  # of text, over all sampled files
TAR_OVERHEAD = 1.002  # for samples of hundreds of rows


@dataclass(frozen=True)
class Estimate:
    """Expected result of a prep; ``seconds`` are for ``workers`` processes on this machine."""

    files: int
    stored_bytes: int
    text_bytes: float
    documents: float
    tokens: float
    rows: dict[SplitName, int]
    shards: dict[SplitName, int]
    disk_bytes: float
    work_bytes: float
    seconds: float
    workers: int
    sampled_bytes: int
    rejects: int
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The estimate as text, line by line."""
        rows, shards = (", ".join(f"{name} {n[name]:,}" for name in SPLITS) for n in (self.rows, self.shards))
        lines = [
            f"input     {self.files:,} files, {size(self.stored_bytes)}, about {size(self.text_bytes)} of text",
            f"documents about {self.documents:,.0f}",
            f"tokens    about {self.tokens:,.0f} ({self.text_bytes / self.tokens:.2f} bytes per token)",
            f"rows      {rows}",
            f"shards    {shards}",
            f"disk      {size(self.disk_bytes)}, and {size(self.work_bytes)} more until it is done",
            f"time      about {duration(self.seconds)} with {self.workers} processes",
            f"(from a sample of {size(self.sampled_bytes)} of text; nothing was written)",
        ]
        lines += self.warnings
        if self.rejects:
            lines.append(f"bad records in the sample: {self.rejects}")
        for name in SPLITS:
            if not self.rows[name]:
                lines.append(
                    f"prep will refuse this: the {name} split would get no row; use a shorter --length, another "
                    "--validation-fraction or more text"
                )
        return lines


@dataclass
class _Sample:
    """Documents from the beginnings of some files; ``stored`` estimates their stored bytes."""

    documents: list[AnyDocument]
    text_bytes: int = 0
    stored: float = 0.0
    rejects: int = 0
    first_reject: Reject | None = None
    seconds: float = 0.0


def estimate(config: PrepConfig) -> Estimate:
    """Tokenize a sample and scale it up. ``bpe:N`` trains on the sample, so its figures are rougher.

    Raises:
        DataError: an error that prep would raise for the sample.
    """
    listing = find(config.inputs)
    sources = listing.sources
    sample = _read(config, sources)
    if not sample.documents:
        rejects = [sample.first_reject] if sample.first_reject else []
        raise no_documents(config, rejects, where="at the beginning of the input")
    written = [document for document in sample.documents if not isinstance(document, TokenDocument)]
    texts = [document.text for document in written]
    entries = config.bpe_size
    tokenizer = load_tokenizer(config.tokenizer) if entries is None else train_bpe(texts, entries)
    special = special_ids(tokenizer, config.bos, config.eos, config.mask, config.pad)
    warnings = remarks(config.tokenizer, special, config.mask) if entries is None else []
    encoder = TextEncoder(tokenizer, control_ids(special))
    form = config.rows(special)
    with pool.one_thread():
        encoder.encode(texts[:1])  # the first call sets up
        began = time.process_time()
        encoded = iter(encoder.encode(texts))
        ids = [d.ids if isinstance(d, TokenDocument) else next(encoded) for d in sample.documents]
        sizes = [0 if isinstance(found, str) else len(found) for found in ids]
        lengths = np.array(sizes) + len(form.head) + len(form.tail)
        seconds = sample.seconds + time.process_time() - began
        characters = [encoder.lost(excerpt(document)) for document in written[:: len(written) // SAMPLED + 1]]
    if lost := sum(lost for _, lost in characters):
        warnings.append(lost_line(lost / sum(size for size, _ in characters)))
    total = sum(source.bytes for source in sources)
    scale = total / sample.stored
    validation = np.array([in_validation(d.id, config.seed, config.validation_fraction) for d in sample.documents])
    # The split of a small sample varies by chance; the whole follows the fraction.
    fractions = {"train": 1 - config.validation_fraction, "validation": config.validation_fraction}
    if scale <= 1:
        fractions = {"train": (lengths * ~validation).sum() / lengths.sum(), "validation": 0.0}
        fractions["validation"] = 1 - fractions["train"]
    tokens = float(lengths.sum() * scale)
    rows = {name: int(tokens * fractions[name] // form.width) for name in SPLITS}
    itemsize = token_dtype(special.vocab_size).itemsize
    workers = workers_of(config)
    passes = 1 if entries is None else 1.2  # training a tokenizer reads all text once more
    return Estimate(
        files=len(sources),
        stored_bytes=total,
        text_bytes=sample.text_bytes * scale,
        documents=len(ids) * scale,
        tokens=tokens,
        rows=rows,
        shards={name: -(-rows[name] // config.rows_per_shard) for name in SPLITS},
        disk_bytes=sum(rows.values()) * config.length * itemsize * TAR_OVERHEAD,
        work_bytes=tokens * itemsize + 8 * len(ids) * scale,
        seconds=seconds * scale * passes / min(workers, len(parts_of(sources))),
        workers=workers,
        sampled_bytes=sample.text_bytes,
        rejects=sample.rejects,
        warnings=(*listing.lines(), *warnings),
    )


def _read(config: PrepConfig, sources: Sequence[Source]) -> _Sample:
    """Read the beginnings of some files, evenly spaced over all."""
    most = min(FETCHED_FILES if any(source.remote for source in sources) else SAMPLED_FILES, len(sources))
    chosen = [sources[i] for i in np.linspace(0, len(sources) - 1, most).round().astype(int)]
    sample = _Sample([])
    with tempfile.TemporaryDirectory() as folder:
        for source in chosen:
            path = Path(source.path)
            if source.remote:
                path = Path(folder) / "fetched"
                fetch(source.path, path, source.bytes)
            _read_beginning(config, source, path, SAMPLE_BYTES // len(chosen), sample)
    return sample


def _read_beginning(config: PrepConfig, source: Source, path: Path, most: int, sample: _Sample) -> None:
    """Read up to ``most`` bytes of text and estimate their stored bytes."""

    def reject(offset: int, reason: str) -> None:
        sample.rejects += 1
        sample.first_reject = sample.first_reject or Reject(source=source.name, offset=offset, reason=reason)

    began, read = time.process_time(), 0
    last: int | None = 0
    (part, *_) = split(source, source.bytes + 1)
    for document in read_part(part, path, config.fields, reject, lambda why: None):
        sample.documents.append(document)
        read += document.ids.nbytes if isinstance(document, TokenDocument) else len(document.text.encode())
        last = document.offset
        if read >= most:
            break
    else:
        last = None
    sample.seconds += time.process_time() - began
    sample.text_bytes += read
    sample.stored += source.bytes if last is None else _stored(source, path, last)


def _stored(source: Source, path: Path, offset: int) -> float:
    """Stored bytes of a file before ``offset``, which is in the unit of its kind."""
    stored = INPUT_KINDS.instance(source.kind).stored_before(source, path, offset)
    if stored is not None:
        return stored
    if source.compression is None:
        return float(max(offset, 1))
    with path.open("rb") as file:
        stream, buffer = unpack(source, file), memoryview(bytearray(1 << 16))
        while offset > 0 and (count := stream.readinto(buffer[: min(offset, len(buffer))])):
            offset -= count
        return float(max(file.tell(), 1))


def size(count: float) -> str:
    """``"1.5 GB"``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
