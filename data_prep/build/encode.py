"""Tokenizing of one input part into token streams, a job for a worker process."""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from pydantic import Field

from bd3_common import schema
from bd3_common.atomic import atomic_file, unique_suffix, write_text
from bd3_common.errors import UserError
from bd3_common.schema import Count, InnerPath, Record, Sha256
from bd3_common.text import json_line, redacted
from data_prep.build import pool
from data_prep.errors import DataError
from data_prep.format.manifest import SPLITS, SplitName
from data_prep.format.pack import RowFormat
from data_prep.format.remote import fetch
from data_prep.format.text_encoder import TextEncoder, shared_encoder
from data_prep.sources import AnyDocument, Document, Fields, Part, TokenDocument, expand, read_part, sha256_source

BATCH_BYTES = 256 << 10  # text tokenized at once
SAMPLED = 128  # documents that are searched for characters the tokenizer loses
SAMPLED_CHARACTERS = 500  # of each of them
_SAMPLE_SEED, _EXCERPT_SEED = 2, 3  # neither that of the split nor of the tokenizer's training sample
RESULT = "done.json"
Ids: TypeAlias = "array[int] | np.ndarray"


class Reject(Record):
    """A record that cannot be used, and its offset: a byte of the decompressed file, or a row."""

    source: str
    offset: Count
    reason: str


class Encoded(Record):
    """Result of one part, written once its streams are on disk. Per split: documents, text bytes, tokens."""

    sha256: Sha256 | None  # of the whole source; in the result of its first part
    documents: dict[SplitName, Count]
    text_bytes: dict[SplitName, Count]
    tokens: dict[SplitName, Count]
    skipped: dict[str, Count]
    rejects: list[Reject]
    files: dict[InnerPath, Count]  # bytes of each stream
    sample: list[tuple[float, Count, Count]] = Field(default=[])  # place in a random order, characters, those lost
    nul_characters: Count = 0
    nul_documents: Count = 0


@dataclass(frozen=True)
class EncodeJob:
    """Arguments of :func:`encode_part`; ``folder`` is the part's own."""

    part: Part
    folder: Path
    tokenizer: Path
    controls: tuple[int, ...]  # ids that no text may give
    mask: int
    rows: RowFormat
    dtype: str
    fields: Fields
    seed: int
    validation_fraction: float
    max_rejects: int


def share(identity: str, seed: int) -> float:
    """Map a document to [0, 1) by the sha256 of ``"<seed>:<id>"`` alone."""
    digest = hashlib.sha256(f"{seed}:{identity}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") * 2.0**-64


def in_validation(identity: str, seed: int, fraction: float) -> bool:
    """True for documents of the validation split. Adding documents moves none to the other split."""
    return share(identity, seed) < fraction


def encode_part(job: EncodeJob) -> Encoded:
    """Tokenize a part into ``<split>.tokens`` and ``<split>.starts`` (int64 offsets of documents in the stream).

    The concatenated streams of all parts do not depend on where the parts begin. Rows are cut from them.

    Raises:
        DataError: the source is damaged or has changed, or has too many bad records.
        OSError: the disk is full or cannot be written.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    source = job.part.source
    digest: str | None
    fetched = job.folder / f"fetched-{unique_suffix()}"  # two processes may run the same part
    try:
        if source.remote:
            digest, local = fetch(source.path, fetched, source.bytes), fetched
        else:
            local = Path(source.path)
            digest = sha256_source(source, local) if job.part.begin == 0 else None
        with ExitStack() as files:
            encoder = _PartEncoder(job, files)
            for document in read_part(job.part, local, job.fields, encoder.reject, encoder.skip, encoder.remove_nul):
                encoder.add(document)
            encoder.flush()
        if not source.remote and expand([source.path]) != [source]:
            raise DataError(f"{source.path}: changed while it was read; run again once it is complete")
    finally:
        with suppress(FileNotFoundError):
            fetched.unlink()
    result = encoder.result(digest)
    write_text(job.folder / RESULT, result.model_dump_json())
    return result


def read_result(folder: Path) -> Encoded | None:
    """Read the result of :func:`encode_part`; None if it has not finished or a stream is incomplete."""
    try:
        result = schema.read(folder / RESULT, Encoded)
        # A truncated stream would silently shift all rows after it.
        whole = all((folder / name).stat().st_size == size for name, size in result.files.items())
    except (FileNotFoundError, UserError):
        return None
    return result if whole else None


class _PartEncoder:
    """Collects documents into batches and writes their tokens to the streams of both splits."""

    def __init__(self, job: EncodeJob, files: ExitStack):
        self.job, self.encoder = job, shared_encoder(job.tokenizer, job.controls)
        self.entries = max(self.encoder.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        names = {(split, kind): job.folder / f"{split}.{kind}" for split in SPLITS for kind in ("tokens", "starts")}
        self.paths = list(names.values())
        places = {key: files.enter_context(atomic_file(path, sync_folder=False)) for key, path in names.items()}
        self.streams = {key: files.enter_context(path.open("wb")) for key, path in places.items()}
        self.documents, self.text_bytes, self.tokens = (dict.fromkeys(SPLITS, 0) for _ in range(3))
        self.skipped: dict[str, int] = {}
        self.rejects: list[Reject] = []
        self.sample = _LossSample(self.encoder)
        self.nul_characters = self.nul_documents = 0
        self.batch: list[AnyDocument] = []
        self.batch_bytes = 0

    def add(self, document: AnyDocument) -> None:
        self.batch.append(document)
        self.batch_bytes += len(document.ids) * 4 if isinstance(document, TokenDocument) else len(document.text)
        if self.batch_bytes >= BATCH_BYTES:
            self.flush()

    def skip(self, why: str) -> None:
        self.skipped[why] = self.skipped.get(why, 0) + 1

    def remove_nul(self, count: int) -> None:
        self.nul_characters += count
        self.nul_documents += 1

    def reject(self, offset: int, reason: str) -> None:
        source = self.job.part.source
        self.rejects.append(Reject(source=source.name, offset=offset, reason=reason))
        if len(self.rejects) > self.job.max_rejects:
            raise too_many_rejects(len(self.rejects), self.rejects[0], self.job.max_rejects)

    def flush(self) -> None:
        """Tokenize and write the batch."""
        job, batch = self.job, self.batch
        # A part has documents of one kind only.
        texts = [document.text for document in batch if not isinstance(document, TokenDocument)]
        encoded: Sequence[Ids | str]
        encoded = self.encoder.encode(texts) if texts else [self._given(document) for document in batch]
        validation = [in_validation(document.id, job.seed, job.validation_fraction) for document in batch]
        for split, wanted in zip(SPLITS, (False, True)):
            self._write(split, [n for n, found in enumerate(validation) if found is wanted], encoded)
        self.batch, self.batch_bytes = [], 0

    def _given(self, document: AnyDocument) -> np.ndarray:
        """Ids of a document of token ids, without the BOS and EOS that every document gets: none is doubled.

        Raises:
            DataError: an id is none of the tokenizer's, so the file is of another tokenizer.
        """
        assert isinstance(document, TokenDocument)
        ids, rows = document.ids, self.job.rows
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < self.entries):
            wrong = int(ids.max()) if int(ids.max()) >= self.entries else int(ids.min())
            raise DataError(
                f"{self.job.part.source.path}: document {document.offset} has the id {wrong}, and the tokenizer's ids "
                f"are 0 to {self.entries - 1}; give the tokenizer that the ids were made with"
            )
        if rows.tail and len(ids) and ids[-1] == rows.eos:
            ids = ids[:-1]
        if rows.head and len(ids) and ids[0] == rows.bos:
            ids = ids[1:]
        return ids

    def _write(self, split: SplitName, numbers: Sequence[int], ids: Sequence[Ids | str]) -> None:
        """Append documents of the batch to a split's stream."""
        taken = {n: found for n in numbers if (found := self._accepted(n, ids[n])) is not None}
        head, tail = self.job.rows.head, self.job.rows.tail
        extra = len(head) + len(tail)
        ends = np.cumsum([0, *(len(found) + extra for found in taken.values())])
        stream = np.empty(ends[-1], self.job.dtype)
        for found, begin, end in zip(taken.values(), ends.tolist(), ends[1:].tolist()):
            stream[begin : begin + len(head)] = head
            plain = found if isinstance(found, np.ndarray) else np.frombuffer(found, np.uintc)
            stream[begin + len(head) : end - len(tail)] = plain
            stream[end - len(tail) : end] = tail
        # A text without tokens adds nothing to a stream without BOS and EOS.
        starts = ends[:-1][np.diff(ends) > 0] + self.tokens[split]
        for _ in range(len(taken) - len(starts)):
            self.skip("empty")
        self.streams[split, "tokens"].write(stream.data)
        self.streams[split, "starts"].write(starts.astype("<i8").data)
        documents = [self.batch[n] for n in taken]
        size = sum(len(d.text.encode()) for d in documents if not isinstance(d, TokenDocument))
        self.documents[split] += len(starts)
        self.text_bytes[split] += size
        self.tokens[split] += len(stream)
        pool.count(size or stream.nbytes)

    def _accepted(self, number: int, ids: Ids | str) -> Ids | None:
        """``ids``, or None after rejecting the document for a reason."""
        document = self.batch[number]
        if isinstance(document, TokenDocument) and self.job.mask in ids:
            ids = f"the document has the mask (id {self.job.mask}), which no clean text may have; remove it"
        if isinstance(ids, str):
            self.reject(document.offset, ids)
            return None
        if not isinstance(document, TokenDocument):
            self.sample.offer(document)
        return ids

    def result(self, digest: str | None) -> Encoded:
        return Encoded(
            sha256=digest,
            documents=self.documents,
            text_bytes=self.text_bytes,
            tokens=self.tokens,
            skipped=self.skipped,
            rejects=self.rejects,
            sample=self.sample.entries(),
            files={path.name: path.stat().st_size for path in self.paths},
            nul_characters=self.nul_characters,
            nul_documents=self.nul_documents,
        )


class _LossSample:
    """Characters that the tokenizer loses in a random sample of documents, which does not depend on parts."""

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder
        self._last_first: list[tuple[float, str]] = []  # a heap: the negative place, and the excerpt

    def offer(self, document: Document) -> None:
        """Take a document if it is among the first ``SAMPLED`` of a random order."""
        place = -share(document.id, _SAMPLE_SEED)
        if len(self._last_first) < SAMPLED:
            heapq.heappush(self._last_first, (place, excerpt(document)))
        elif place > self._last_first[0][0]:
            heapq.heapreplace(self._last_first, (place, excerpt(document)))

    def entries(self) -> list[tuple[float, int, int]]:
        """(place, characters, those lost) of the documents."""
        return sorted((-place, *self.encoder.lost(text)) for place, text in self._last_first)


def excerpt(document: Document) -> str:
    """Some characters in a row from anywhere in a document, the same each time."""
    spare = len(document.text) - SAMPLED_CHARACTERS
    begin = int(share(document.id, _EXCERPT_SEED) * (spare + 1)) if spare > 0 else 0
    return document.text[begin : begin + SAMPLED_CHARACTERS]


def lost_characters(samples: Iterable[tuple[float, int, int]]) -> float:
    """Share of characters that the tokenizer loses, from the samples of all parts."""
    first = heapq.nsmallest(SAMPLED, samples)
    return sum(lost for *_, lost in first) / max(1, sum(size for _, size, _ in first))


def lost_line(fraction: float) -> str:
    """Warning about lost characters."""
    return (
        f"the tokenizer loses {fraction:.2%} of the characters, spaces not counted, in a sample of {SAMPLED} documents "
        "or fewer: it has no token for them; use one with bytes, for example bpe:N"
    )


def too_many_rejects(count: int, first: Reject, most: int) -> DataError:
    """The error for more bad records than ``max_rejects``."""
    where = f"{first.source} at {first.offset}: {first.reason}"
    if most == 0:
        return DataError(where)
    return DataError(f"{where}; that is the first of {count} bad records, and max_rejects={most}")


def rejects_text(rejects: Sequence[Reject]) -> str:
    """Contents of ``rejects.jsonl``: one JSON object a line."""
    return "".join(redacted(json_line(reject.model_dump())) + "\n" for reject in rejects)
