"""Verification of one shard: a walk through the tar that does not rely on the manifest's offsets."""

from __future__ import annotations

import math
import operator
import os
import stat
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bd3_common.text import shorten
from data_prep.build import pool
from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.format.manifest import Manifest, Member, Shard, SplitName
from data_prep.format.pack import RowFormat
from data_prep.format.remote import fetch
from data_prep.verify.duplicates import row_hashes

MARGIN = 1 << 20  # bytes by which a remote shard may be longer than listed and is read to its end

MOST_REASONS = 8  # listed for one file
SUFFIXES = ("tokens.npy", "docs.npy")


@dataclass(frozen=True)
class Rules:
    """Properties that every shard of a data set must have."""

    rows: RowFormat
    dtype: str
    vocab_size: int
    mask: int
    documents: bool  # document starts are stored

    @classmethod
    def of(cls, manifest: Manifest) -> Rules:
        recipe = manifest.recipe
        rows = RowFormat(
            manifest.length, recipe.packing, manifest.bos_id, manifest.eos_id, recipe.add_bos, recipe.add_eos
        )
        return cls(rows, manifest.dtype, manifest.vocab_size, manifest.mask_id, recipe.documents)


@dataclass(frozen=True, eq=False)
class WalkJob:
    """Arguments of :func:`walk_shard`. With ``url``, the shard is fetched to ``path`` and removed afterwards."""

    path: Path
    split: SplitName
    number: int
    shard: Shard
    rules: Rules
    url: str | None = None


class Reasons(list[str]):
    """Faults of one file; only the first ``MOST_REASONS`` are listed, others counted."""

    more = 0

    def add(self, reason: str) -> None:
        if len(self) < MOST_REASONS:
            self.append(reason)
        else:
            self.more += 1

    def __str__(self) -> str:
        return "; ".join(self) + (f"; and {self.more} more" if self.more else "")


@dataclass
class Walked:
    """Contents of one shard. Offsets are in the shard's stream, without the BOS and EOS that ``wrap`` adds to rows."""

    reasons: Reasons = field(default_factory=Reasons)
    whole: bool = False  # all rows were found at the manifest's offsets
    rows: int = 0
    starts: int = 0
    hashes: list[np.ndarray] = field(default_factory=list)  # uint64, one for each row
    # [V] int64: occurrences of every id, position 0 of each row left out
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    lengths: dict[int, int] = field(default_factory=dict)  # tokens of a document -> documents that end in the shard
    first_start: int | None = None
    last_start: int | None = None
    last_token: int | None = None

    def without_arrays(self) -> Walked:
        """A copy without arrays, small enough to keep for every shard."""
        return replace(self, hashes=[], counts=np.zeros(0, np.int64))


def walk_shard(job: WalkJob) -> Walked:
    """Hash a shard, walk its members and check every row; one sample is in memory at a time.

    Damage is listed in ``reasons``; nothing is raised.
    """
    found = Walked(counts=np.zeros(job.rules.vocab_size, np.int64))
    try:
        if job.url is not None:
            fetch(job.url, job.path, most=2 * job.shard.bytes + MARGIN)
        status = job.path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            found.reasons.add("is not a regular file")
            return found
        size = status.st_size
        found.whole = size == job.shard.bytes  # until _Walk finds a fault
        if not found.whole:
            found.reasons.add(f"{size} bytes, the manifest says {job.shard.bytes}")
        elif (digest := sha256_file(job.path)) != job.shard.sha256:
            found.reasons.add(f"sha256 is {digest[:12]}, the manifest says {job.shard.sha256[:12]}")
        _Walk(job, found).run()
    except FileNotFoundError:
        found.reasons.add("this shard is missing")
    except DataError as error:
        found.reasons.add(str(error).removeprefix(f"{job.url}: "))
    except OSError as error:
        found.reasons.add(f"cannot be read ({error.strerror or error})")
    finally:
        if job.url is not None:
            job.path.unlink(missing_ok=True)
    return found


class _Walk:
    """Walk through one tar."""

    def __init__(self, job: WalkJob, found: Walked):
        self.job, self.rules, self.found = job, job.rules, found
        self.parts: dict[str, np.ndarray] = {}  # of the sample being read
        self.sample = -1

    def run(self) -> None:
        job, found = self.job, self.found
        expected = [(n, suffix) for n in range(len(job.shard.members)) for suffix in SUFFIXES]
        names = {f"{job.split}-{job.number:06d}-{n:06d}.{suffix}": (n, suffix) for n, suffix in expected}
        seen, intact = set(), True
        try:
            with job.path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for info in tar:
                    if info.name not in names or info.name in seen:
                        again = "again " if info.name in seen else ""
                        found.reasons.add(f"holds {info.name!r} {again}which the manifest does not list")
                        continue
                    seen.add(info.name)
                    intact &= self._part(stream, info, *names[info.name])
                    pool.count(info.size)
        except (tarfile.TarError, ValueError, OverflowError) as error:  # sizes beyond any file are ValueErrors
            found.reasons.add(f"not a tar ({shorten(str(error), 100)})")
        missing = [name for name in names if name not in seen]
        if missing:
            found.reasons.add(f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""))
        if found.rows != job.shard.rows:
            found.reasons.add(f"{found.rows} rows, the manifest says {job.shard.rows}")
        found.whole &= intact and not missing and found.rows == job.shard.rows

    def _part(self, stream: BinaryIO, info: tarfile.TarInfo, number: int, suffix: str) -> bool:
        """Read one member; False if it is not the manifest's array at its offset."""
        member = Member(*self.job.shard.members[number])
        tokens = suffix == SUFFIXES[0]
        offset = member.tokens_offset if tokens else member.docs_offset
        shape = (member.rows, self.rules.rows.length) if tokens else (member.starts, 2)
        dtype = np.dtype(self.rules.dtype if tokens else "<i4")
        try:
            stream.seek(info.offset_data)
            array, begin = _read_array(stream, info.size)
        except ValueError as error:
            self.found.reasons.add(f"{info.name}: not an npy file ({error})")
            return False
        if (array.shape, array.dtype) != (shape, dtype):
            self.found.reasons.add(
                f"{info.name}: {array.dtype}{list(array.shape)}, the manifest says {dtype}{list(shape)}"
            )
            return False
        if begin != offset:
            self.found.reasons.add(f"{info.name}: its array is at byte {begin}, the manifest says {offset}")
        if number != self.sample:
            self.parts, self.sample = {}, number
        self.parts[suffix] = array
        if len(self.parts) == len(SUFFIXES):
            self._sample(info.name.partition(".")[0], *(self.parts.pop(suffix) for suffix in SUFFIXES))
        return begin == offset

    def _sample(self, key: str, tokens: np.ndarray, docs: np.ndarray) -> None:
        """Check and count a sample's rows ``[n, L]`` and document starts ``[m, 2]``."""
        found, rules = self.found, self.rules
        self._tokens(f"{key}.tokens.npy", tokens)
        places = self._places(f"{key}.docs.npy", docs, len(tokens))
        form = rules.rows
        stream = tokens[:, form.shift : form.shift + form.width].ravel()
        self._borders(f"{key}.docs.npy", stream, places)
        self._measure(places + found.rows * form.width)
        found.hashes.append(row_hashes(tokens))
        found.rows += len(tokens)
        found.starts += len(docs)
        if len(stream):
            found.last_token = int(stream[-1])

    def _tokens(self, name: str, tokens: np.ndarray) -> None:
        rules, form = self.rules, self.rules.rows
        counts = np.bincount(tokens[:, 1:].ravel(), minlength=rules.vocab_size)
        self.found.counts += counts[: rules.vocab_size]
        wrong = {
            f"an id that is not below vocab_size={rules.vocab_size}": tokens >= rules.vocab_size,
            f"the mask (id {rules.mask})": tokens == rules.mask,
        }
        if form.packing == "wrap":
            wrong[f"no BOS (id {form.bos}) at its beginning"] = tokens[:, :1] != form.bos
            wrong[f"no EOS (id {form.eos}) at its end"] = tokens[:, -1:] != form.eos
        for what, where in wrong.items():
            rows = np.flatnonzero(where.any(1))
            if len(rows):
                self.found.reasons.add(f"{name}: row {rows[0]} has {what}{_others(rows)}")

    def _places(self, name: str, docs: np.ndarray, rows: int) -> np.ndarray:
        """Offsets ``[m]`` of document starts in the sample's stream; impossible ones are left out."""
        form, found = self.rules.rows, self.found
        row, position = docs.astype(np.int64).T
        if len(docs) and not self.rules.documents:
            found.reasons.add(f"{name}: {len(docs)} document starts, and the recipe says documents=false")
        # A document right after the wrapping BOS begins at 0, with that BOS.
        last = form.length - form.shift
        inside = (row >= 0) & (row < rows) & (position >= 0) & (position < last)
        inside &= (position == 0) | (position > form.shift)
        if not inside.all():
            at = np.flatnonzero(~inside)
            found.reasons.add(f"{name}: [{row[at[0]]}, {position[at[0]]}] is not a place in its rows{_others(at)}")
        places: np.ndarray = (row * form.width + np.maximum(position - form.shift, 0))[inside]
        falls = np.flatnonzero(np.diff(places) <= 0)
        if len(falls):
            found.reasons.add(f"{name}: document starts do not ascend at entry {falls[0] + 1}")
            places = np.unique(places)
        first = self.job.number == 0 and found.rows == 0 and self.rules.documents
        if first and not (len(places) and places[0] == 0):
            found.reasons.add(f"{name}: the first document does not start at row 0, position 0")
        return places

    def _borders(self, name: str, stream: np.ndarray, places: np.ndarray) -> None:
        """Check that documents follow EOS and begin with BOS, if the packing writes them."""
        form = self.rules.rows
        before = np.concatenate([[self.found.last_token if self.found.rows else form.eos], stream])[places]
        wrong = {"does not follow EOS": before != form.eos} if form.tail else {}
        if form.head:
            wrong["does not begin with BOS"] = stream[places] != form.bos
        for what, where in wrong.items():
            at = np.flatnonzero(where)
            if len(at):
                row = places[at[0]] // form.width
                self.found.reasons.add(f"{name}: a document in row {row} {what}{_others(at)}")

    def _measure(self, places: np.ndarray) -> None:
        """Count the lengths of the documents that end before ``places``, offsets in the shard's stream."""
        if not len(places):
            return
        found, form = self.found, self.rules.rows
        begin = [] if found.last_start is None else [found.last_start]
        lengths = np.diff(np.concatenate([begin, places]).astype(np.int64)) - len(form.head) - len(form.tail)
        for length, count in zip(*(part.tolist() for part in np.unique(lengths, return_counts=True))):
            found.lengths[length] = found.lengths.get(length, 0) + count
        if found.first_start is None:
            found.first_start = int(places[0])
        found.last_start = int(places[-1])


def _read_array(stream: BinaryIO, size: int) -> tuple[np.ndarray, int]:
    """Read an npy file of ``size`` bytes; returns the array and the offset of its raw bytes in ``stream``.

    Raises:
        ValueError: not the npy of a plain array, or not of this size.
    """
    begin = stream.tell()
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"version {version[0]}.{version[1]}, not 1.0")
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        bytes_ = math.prod(operator.index(count) for count in shape) * dtype.itemsize
    except Exception as error:  # of a header made by anybody: numpy's own and those of Python's parser
        raise ValueError(f"no npy header that can be read ({type(error).__name__})") from None
    offset = stream.tell()
    if fortran and len(shape) > 1 and min(shape) > 1:
        raise ValueError("stored column by column")
    if dtype.hasobject or offset - begin + bytes_ != size:
        raise ValueError(f"{dtype}{list(shape)} in {size} bytes")
    if offset + bytes_ > os.fstat(stream.fileno()).st_size:
        raise ValueError("cut")
    raw = stream.read(bytes_)
    return np.frombuffer(raw, dtype).reshape(shape), offset


def _others(where: np.ndarray) -> str:
    return f" (and {len(where) - 1} more)" if len(where) > 1 else ""
