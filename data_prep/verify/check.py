"""Verification of a data set: faults, duplicate rows, lengths of documents, token counts, samples."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bd3_common.schema import read_bytes
from data_prep.build import pool
from data_prep.build.progress import Progress, Report
from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.format.manifest import (
    INDEX_VERSION,
    MANIFEST,
    REJECTS,
    SPLITS,
    TOKENIZER,
    Manifest,
    Split,
    SplitName,
    load_manifest,
    shard_path,
    unigram_nats,
)
from data_prep.format.remote import is_remote
from data_prep.format.shards import shard_name
from data_prep.format.tokenizer import load_tokenizer, special_ids, token_dtype
from data_prep.read.reader import RowReader
from data_prep.verify.duplicates import Duplicates, find_duplicates
from data_prep.verify.walk import Reasons, Rules, Walked, WalkJob, walk_shard

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CLOSE = 1e-6  # nats by which sums of logarithms may differ between machines


@dataclass
class SplitContent:
    """Contents of one split."""

    rows: int = 0
    starts: int = 0
    # [V] int64: occurrences of every id, position 0 of each row left out
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    lengths: Counter[int] = field(default_factory=Counter)  # tokens of a document -> documents
    cut_tokens: int | None = None  # stored tokens of a last document that is cut at the end of the split
    whole: bool = False  # all rows were found at the manifest's offsets


@dataclass
class Sample:
    """A row as text, by document; ``goes_on``: the first one began in an earlier row."""

    split: SplitName
    row: int
    goes_on: bool
    documents: list[str]


@dataclass
class Checked:
    """Result of :func:`check`. ``duplicates`` is None if damage prevents comparing rows."""

    folder: Path | str  # a path, or the URL of a remote data set
    faults: dict[str, Reasons]  # by path
    manifest: Manifest | None = None
    tokenizer: Tokenizer | None = None
    splits: dict[SplitName, SplitContent] = field(default_factory=dict)
    duplicates: Duplicates | None = None
    samples: list[Sample] = field(default_factory=list)

    def place(self, number: int) -> tuple[SplitName, int]:
        """Split and row of a row number of :class:`~data_prep.verify.duplicates.Duplicates`."""
        train = self.splits[SPLITS[0]].rows
        return (SPLITS[0], number) if number < train else (SPLITS[1], number - train)


def check(
    folder: str | Path,
    workers: int | None = None,
    samples: int = 3,
    seed: int = 0,
    report: Report = lambda line: None,
) -> Checked:
    """Verify all files of a data set and count their contents. Nothing is written.

    Args:
        folder: a data set of ``bd3 prep``, or its URL.
        workers: processes; None: one for each core that this process may run on.
        samples: rows of each split to decode, chosen by ``seed``.
        report: called with one line of text every few seconds.

    Raises:
        DataError: there is no data set in ``folder``, or a worker died. Damage is in the result.
    """
    if is_remote(folder):
        from data_prep.verify.check_remote import check_remote  # which derives from this module's class

        return check_remote(str(folder).rstrip("/"), workers, samples, seed, report)
    folder = Path(folder)
    try:
        manifest = load_manifest(folder)
    except DataError as error:
        if not (folder / MANIFEST).is_file():
            raise
        reasons = Reasons([str(error).removeprefix(f"{folder / MANIFEST}: ")])
        return Checked(folder, {str(folder / MANIFEST): reasons})
    if manifest.version == INDEX_VERSION:
        from data_prep.verify.check_index import IndexCheck  # which derives from this module's class

        return IndexCheck(folder, manifest, report).run(workers, samples, seed)
    return Check(folder, manifest, report).run(workers, samples, seed)


class Check:
    """One check of one data set.

    Args:
        folder: where manifest, tokenizer and rejects are.
        url: of a remote data set, whose shards are fetched one by one.
    """

    def __init__(self, folder: Path, manifest: Manifest, report: Report, url: str | None = None):
        self.folder, self.manifest, self.report, self.url = folder, manifest, report, url
        self.result = Checked(url or folder, {}, manifest)

    def run(self, workers: int | None, samples: int, seed: int) -> Checked:
        self._files()
        if missing := set(SPLITS) - set(self.manifest.splits):
            self._fault(MANIFEST, f"splits: {min(missing)} is missing")
            return self.result
        self._rejects()
        self._tokenizer()
        self._numbers()
        hashes = self._walk(workers or len(os.sched_getaffinity(0)))
        result = self.result
        if all(content.whole for content in result.splits.values()):
            if not result.faults.keys() - {self._shown(MANIFEST)}:  # otherwise the shard is wrong
                self._entropies()
            with suppress(DataError):  # for example wrong names of shards, already among the faults
                readers = {name: self._reader(name) for name in SPLITS}
                result.duplicates = self._duplicates(hashes, readers)
                if result.tokenizer is not None:
                    result.samples = list(_samples(result.tokenizer, self.manifest, readers, samples, seed))
        result.faults = {path: reasons for path, reasons in sorted(result.faults.items()) if reasons}
        return result

    def _reader(self, split: SplitName) -> RowReader:
        return RowReader(self.folder, split)

    def _shown(self, name: str | Path) -> str:
        """Path or URL of a file of the data set."""
        return f"{self.url}/{name}" if self.url is not None else str(self.folder / name)

    def _fault(self, name: str | Path, reason: str) -> None:
        self.result.faults.setdefault(self._shown(name), Reasons()).add(reason)

    def _files(self) -> None:
        """Report files that are not in the manifest."""
        known = {MANIFEST, TOKENIZER, *([REJECTS] if self.manifest.rejects else [])}
        known |= {f"{name}/{shard.name}" for name, split in self.manifest.splits.items() for shard in split.shards}
        for path, folders, files in os.walk(self.folder):
            base = Path(path).relative_to(self.folder)
            for name in files + [name for name in folders if str(base / name) not in SPLITS]:
                if (base / name).as_posix() not in known:
                    self._fault(base / name, "does not belong to the data set; remove it")
            folders[:] = [name for name in folders if str(base / name) in SPLITS]

    def _rejects(self) -> None:
        if not self.manifest.rejects:
            return
        try:
            lines = read_bytes(self.folder / REJECTS, DataError).count(b"\n")
        except OSError as error:
            self._fault(REJECTS, f"cannot be read ({error.strerror})")
            return
        except DataError as error:
            self._fault(REJECTS, str(error).partition(": ")[2])
            return
        if lines != self.manifest.rejects:
            self._fault(REJECTS, f"{lines} lines, the manifest says {self.manifest.rejects}")

    def _tokenizer(self) -> None:
        """Check the file's hash, and its ids of BOS, EOS and mask."""
        manifest, path = self.manifest, self.folder / TOKENIZER
        try:
            digest = sha256_file(path)
            tokenizer = load_tokenizer(path)
            recipe = manifest.recipe
            special = special_ids(tokenizer, recipe.bos, recipe.eos, recipe.mask, recipe.pad)
        except OSError as error:
            self._fault(TOKENIZER, f"cannot be read ({error.strerror})")
            return
        except DataError as error:
            self._fault(TOKENIZER, str(error).removeprefix(f"{path}: "))
            return
        if digest != manifest.tokenizer_sha256:
            self._fault(TOKENIZER, f"sha256 is {digest[:12]}, the manifest says {manifest.tokenizer_sha256[:12]}")
        elif not manifest.recipe.tokenizer.startswith("bpe:") and manifest.recipe.tokenizer != digest:
            self._fault(TOKENIZER, f"sha256 is {digest[:12]}, the recipe says {manifest.recipe.tokenizer[:12]}")
        stated = {name: getattr(manifest, f"{name}_id") for name in ("bos", "eos", "mask", "pad")}
        stated["vocab_size"] = manifest.vocab_size
        if recipe.mask is None and stated["mask"] == special.vocab_size == stated["vocab_size"] - 1:
            # Earlier versions knew fewer names of masks, and added one.
            special = special._replace(mask=stated["mask"], vocab_size=stated["vocab_size"])
        for name, value in special._asdict().items():
            if value != stated[name]:
                self._fault(TOKENIZER, f"its {name} is {value}, the manifest says {stated[name]}")
        self.result.tokenizer = tokenizer

    def _numbers(self) -> None:
        """Check that the manifest's numbers are consistent."""
        manifest, rules = self.manifest, Rules.of(self.manifest)
        if token_dtype(manifest.vocab_size).str != manifest.dtype:
            self._fault(MANIFEST, f"dtype={manifest.dtype}: not that of vocab_size={manifest.vocab_size}")
        if manifest.recipe.length != manifest.length:
            self._fault(MANIFEST, f"length={manifest.length}: recipe.length={manifest.recipe.length}")
        for name, split in manifest.splits.items():
            rows = sum(shard.rows for shard in split.shards)
            for what, value, counted in (
                ("rows", split.rows, rows),
                ("tokens", split.tokens, split.rows * manifest.length),
            ):
                if value != counted:
                    self._fault(MANIFEST, f"splits.{name}.{what}={value}: its shards have {counted}")
            if split.dropped_tokens >= rules.rows.width:
                self._fault(MANIFEST, f"splits.{name}.dropped_tokens={split.dropped_tokens}: would fill a row")
            for fault in _tail_faults(split, manifest):
                self._fault(MANIFEST, f"splits.{name}.tail.{fault}")
            for number, shard in enumerate(split.shards):
                where = f"splits.{name}.shards.{number}"
                if shard.name != shard_name(name, number):
                    self._fault(MANIFEST, f"{where}.name={shard.name}: not {shard_name(name, number)}")
                if shard.rows != sum(member[2] for member in shard.members):
                    self._fault(MANIFEST, f"{where}.rows={shard.rows}: not the sum of its members")
            sizes = [member[2] for shard in split.shards for member in shard.members]
            if any(size != manifest.recipe.rows_per_member for size in sizes[:-1]):
                self._fault(
                    MANIFEST, f"splits.{name}: members before the last one have other than rows_per_member rows"
                )

    def _walk(self, workers: int) -> np.ndarray:
        """Walk all shards and merge their contents; returns a hash of every row of all splits ``[n]``."""
        rules = Rules.of(self.manifest)
        jobs = [
            WalkJob(
                self.folder / name / Path(shard.name).name,
                name,
                number,
                shard,
                rules,
                None if self.url is None else self._shown(shard_path(name, shard)),
            )
            for name, split in self.manifest.splits.items()
            for number, shard in enumerate(split.shards)
        ]
        size = sum(job.shard.bytes for job in jobs)
        # Of shards as large as stated: memory is bounded by what is on disk.
        rows = np.array(
            [job.shard.rows if job.url or _has_size(job.path, job.shard.bytes) else 0 for job in jobs], np.int64
        )
        begins = dict(zip(jobs, (np.cumsum(rows) - rows).tolist()))
        hashes = np.zeros(rows.sum(), np.uint64)
        walked: dict[WalkJob, Walked] = {}
        counts = {name: np.zeros(rules.vocab_size, np.int64) for name in SPLITS}
        progress = Progress(self.report, "checked", size)
        for job, found in pool.run(walk_shard, jobs, workers, progress.tick, size):
            progress.done(job.shard.bytes, job.shard.bytes)
            counts[job.split] += found.counts
            if found.whole:
                hashes[begins[job] : begins[job] + found.rows] = np.concatenate(found.hashes)
            walked[job] = found.without_arrays()
            for reason in found.reasons:
                self._fault(f"{job.split}/{job.path.name}", reason)
            if found.reasons.more:
                self.result.faults[self._shown(f"{job.split}/{job.path.name}")].more += found.reasons.more
        progress.line()
        for name in SPLITS:
            self.result.splits[name] = self._merge(name, [walked[job] for job in jobs if job.split == name])
            self.result.splits[name].counts = counts[name]
        return hashes

    def _merge(self, name: SplitName, shards: list[Walked]) -> SplitContent:
        """Sum over shards, with the documents that continue from one to the next."""
        form, split = Rules.of(self.manifest).rows, self.manifest.splits[name]
        content = SplitContent(whole=all(shard.whole for shard in shards))
        extra = len(form.head) + len(form.tail)
        last: int | None = None  # start of the last document, an offset in the split's stream
        for shard in shards:
            content.lengths.update(shard.lengths)
            offset = content.rows * form.width
            if last is not None and shard.first_start is not None:
                content.lengths[offset + shard.first_start - last - extra] += 1
            if shard.last_start is not None:
                last = offset + shard.last_start
            if not shard.whole:
                last = None  # the length of this document is unknown
            content.rows += shard.rows
            content.starts += shard.starts
        if last is not None:
            stored = content.rows * form.width - last
            if not split.ends_early or (form.tail and shards[-1].last_token == form.eos):
                content.lengths[stored - extra] += 1
            else:
                content.cut_tokens = stored - len(form.head)
        if content.whole and content.starts > split.documents:
            self._fault(MANIFEST, f"splits.{name}.documents={split.documents}: {content.starts} start in its rows")
        return content

    def _entropies(self) -> None:
        """Compare the unigram entropies of the manifest with those of the rows."""
        manifest, counts = self.manifest, {name: self.result.splits[name].counts for name in SPLITS}
        stated = {"validation_unigram_nats": manifest.validation_unigram_nats}
        found = {"validation_unigram_nats": unigram_nats(counts["validation"], counts["train"] + 1)}
        for name, split in manifest.splits.items():
            stated[f"splits.{name}.unigram_entropy"] = split.unigram_entropy
            found[f"splits.{name}.unigram_entropy"] = unigram_nats(counts[name], counts[name])
        for key, value in stated.items():
            if not math.isclose(value, found[key], abs_tol=_CLOSE):
                self._fault(MANIFEST, f"{key}={value:.6f}: the rows give {found[key]:.6f}")

    def _duplicates(self, hashes: np.ndarray, readers: dict[SplitName, RowReader]) -> Duplicates:
        first, second = (readers[name] for name in SPLITS)

        def read(numbers: np.ndarray) -> np.ndarray:
            rows = np.empty((len(numbers), first.length), first.dtype)
            early = numbers < len(first)
            rows[early] = first.rows(numbers[early])
            rows[~early] = second.rows(numbers[~early] - len(first))
            return rows

        return find_duplicates(hashes, read)


def _tail_faults(split: Split, manifest: Manifest) -> Iterator[str]:
    """Faults of a tail's tokens and document starts."""
    if (tail := split.tail) is None:
        return
    if len(tail.tokens) != split.dropped_tokens:
        yield f"tokens: {len(tail.tokens)}, and dropped_tokens={split.dropped_tokens}"
    if any(token >= manifest.vocab_size or token == manifest.mask_id for token in tail.tokens):
        yield "tokens: one is the mask or not in the vocabulary"
    if tail.starts != sorted(set(tail.starts)) or any(start >= len(tail.tokens) for start in tail.starts):
        yield "starts: not ascending offsets of its tokens"


def _has_size(path: Path, size: int) -> bool:
    with suppress(OSError):
        return path.stat().st_size == size
    return False


def _samples(
    tokenizer: Tokenizer, manifest: Manifest, readers: dict[SplitName, RowReader], count: int, seed: int
) -> Iterator[Sample]:
    """``count`` rows of each split as text, cut where documents start."""
    form = Rules.of(manifest).rows
    for number, (name, reader) in enumerate(readers.items()):
        rng = np.random.default_rng((seed, number))
        chosen = np.sort(rng.choice(len(reader), min(count, len(reader)), replace=False))
        for row, tokens, documents in zip(chosen.tolist(), reader.rows(chosen), reader.documents(chosen)):
            inner = slice(form.shift, form.shift + form.width)
            borders = np.flatnonzero(np.diff(documents[inner])) + 1
            texts = [
                tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in np.split(tokens[inner], borders)
            ]
            goes_on = bool(row) and documents[0] == reader.documents(np.array([row - 1]))[0, -1]
            yield Sample(name, row, bool(goes_on), texts)
