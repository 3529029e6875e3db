"""One token tar of another program: its hash, its samples and where their ids lie."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from data_prep.build import pool
from data_prep.build.encode import in_validation
from data_prep.errors import DataError
from data_prep.format.manifest import SPLITS, TOKENIZER, IndexedShard, SplitName
from data_prep.format.tokenizer import SpecialIds
from data_prep.read.indexed import Ids, json_ids, npy_ids
from data_prep.sources.tar import TarMembers

PICKLED = ("pyd", "pickle", "pkl", "pth", "pt", "npz")
"""extensions of members that webdataset would unpickle, or that may hold what is unpickled"""


class IndexConfig(BaseModel):
    """Options of ``bd3 prep --index``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    index: str = Field(min_length=1, description="folder of WebDataset tars with token ids, which stay as they are")
    length: int = Field(default=256, ge=4, description="tokens per row, L")
    tokenizer: str = Field(
        default=TOKENIZER, description="tokenizer.json that made the ids; by default that of the folder"
    )
    validation_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="samples held out, by hash of tar and key; not used where all tars lie in folders train and "
        "validation",
    )
    member: str | None = Field(
        default=None,
        description="extension of the members that hold the ids, as in tokens.npy; null: the only .npy of a sample, "
        "or where there is none its .json",
    )
    documents: bool | None = Field(
        default=None,
        description="each sample is a document, for masks and evaluation by document; null: unless all samples of a "
        "tar are whole rows",
    )
    seed: int = Field(default=0, ge=0, description="seed of the split")
    bos: str | None = Field(default=None, description="BOS token; null looks for the usual names")
    eos: str | None = Field(default=None, description="EOS token; null looks for the usual names")
    mask: str | None = Field(default=None, description="mask token; null looks for the usual names, or adds a last id")
    pad: str | None = Field(default=None, description="token that exports pad with; null means EOS")
    workers: int | None = Field(default=None, ge=1, description="processes; null means one per core")
    overwrite: bool = Field(default=False, description="replace the manifest and index that are there")


@dataclass(frozen=True)
class TarJob:
    """Arguments of :func:`index_tar` for one tar."""

    folder: Path
    name: str  # path below the folder
    config: IndexConfig
    split: SplitName | None  # of all its samples; None: by hash
    special: SpecialIds


class _Sample(NamedTuple):
    key: str
    member: str
    offset: int
    bytes: int
    ids: Ids


@dataclass
class IndexedTar:
    """Contents of one tar."""

    name: str
    bytes: int
    sha256: str
    shards: dict[SplitName, IndexedShard]
    index: dict[SplitName, NDArray[np.int64]]  # [samples, 3]
    counts: dict[SplitName, NDArray[np.int64]]  # [V], position 0 of each row left out
    tokens: dict[SplitName, int]  # with those that fill no row
    whole_rows: bool  # every sample is a number of whole rows
    rows: dict[SplitName, NDArray[Any]] = field(default_factory=dict)  # [rows, L] if asked for


class _Hashed:
    """A stream whose bytes are hashed as they are read."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._digest, self.bytes = stream, hashlib.sha256(), 0

    def read(self, count: int = -1) -> bytes:
        data = self._stream.read(count)
        self._digest.update(data)
        self.bytes += len(data)
        pool.count(len(data))
        return data

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def index_tar(job: TarJob, keep_rows: bool = False) -> IndexedTar:
    """Read one tar from front to back: its hash, and where the ids of each sample lie.

    Raises:
        DataError: it is damaged, holds pickled members, no ids, or ids outside the vocabulary.
    """
    path = job.folder / job.name
    with path.open("rb") as raw:
        stream = _Hashed(raw)
        arrays, texts = _members(stream, path, job.config.member)
    samples = arrays or texts
    if not samples:
        wanted = job.config.member or ".npy or .json"
        raise DataError(f"{path}: no sample has a {wanted} member with token ids; name its extension with --member")
    dtypes = {sample.ids.dtype.str for sample in samples}
    if len(dtypes) > 1:
        raise DataError(f"{path}: arrays of {' and '.join(sorted(dtypes))}; write all of one tar in one type")
    _check_ids(path, samples, job.special)
    length = job.config.length
    found: dict[SplitName, list[_Sample]] = {name: [] for name in SPLITS}
    for sample in samples:
        held_out = in_validation(f"{job.name}:{sample.key}", job.config.seed, job.config.validation_fraction)
        if len(sample.ids):
            found[job.split or ("validation" if held_out else "train")].append(sample)
    tar = IndexedTar(
        job.name,
        stream.bytes,
        stream.hexdigest(),
        shards={},
        index={},
        counts={},
        tokens={},
        whole_rows=all(len(sample.ids) % length == 0 for sample in samples),
    )
    for name in SPLITS:
        ids = np.concatenate([sample.ids for sample in found[name]]) if found[name] else np.empty(0, np.int64)
        rows = ids[: len(ids) // length * length].reshape(-1, length)  # [rows, L]
        tar.index[name] = np.array([(s.offset, s.bytes, len(s.ids)) for s in found[name]], np.int64).reshape(-1, 3)
        tar.counts[name] = np.bincount(rows[:, 1:].reshape(-1), minlength=job.special.vocab_size)
        tar.tokens[name] = len(ids)
        tar.shards[name] = IndexedShard(
            name=job.name,
            bytes=tar.bytes,
            sha256=tar.sha256,
            rows=len(rows),
            members=[],
            samples=len(found[name]),
            encoding="npy" if arrays else "json",
            dtype=samples[0].ids.dtype.str if arrays else None,
        )
        if keep_rows:
            tar.rows[name] = rows
    return tar


def _members(stream: _Hashed, path: Path, wanted: str | None) -> tuple[list[_Sample], list[_Sample]]:
    """Samples with their ids, those in .npy members and those in .json members."""
    found: dict[str, list[_Sample]] = {"npy": [], "json": []}
    problem: str | None = None  # of the first .json member without ids: metadata, where there are .npy members
    tar = TarMembers(stream, str(path))
    for member in tar:
        base = member.name.rpartition("/")[2]
        stem, dot, extensions = base.partition(".")
        kind = extensions.rpartition(".")[2].lower()
        if not member.isfile() or not stem or not dot:
            continue
        if kind in PICKLED:
            raise DataError(
                f"{path}: {member.name}: pickled data can execute code when it is read, and is refused; "
                "write the ids as .npy or .json"
            )
        if kind not in found or wanted not in (None, extensions):
            continue
        key = member.name[: len(member.name) - len(extensions) - 1]
        payload, begin = tar.payload(), 0
        try:
            ids, begin = npy_ids(payload) if kind == "npy" else (json_ids(payload), 0)
        except ValueError as error:
            if kind == "npy":
                raise DataError(f"{path}: {member.name}: {error}; write the ids as arrays of integers") from None
            problem = problem or f"{path}: {member.name}: {error}; write the ids as a list of integers"
            continue
        if found[kind] and found[kind][-1].key == key:
            raise DataError(
                f"{path}: {key}: has {found[kind][-1].member} and {member.name}; name the one with the ids, as in "
                f"--member {extensions}"
            )
        found[kind].append(_Sample(key, member.name, member.offset_data + begin, len(payload) - begin, ids))
    if problem is not None and not found["npy"]:
        raise DataError(problem)
    return found["npy"], found["json"]


def _check_ids(path: Path, samples: Sequence[_Sample], special: SpecialIds) -> None:
    for sample in samples:
        ids = sample.ids
        wrong = ids[(ids < 0) | (ids >= special.vocab_size) | (ids == special.mask)]
        if wrong.size:
            raise DataError(
                f"{path}: {sample.member}: id {wrong[0]}: not among the tokenizer's ids 0 to {special.vocab_size - 1} "
                f"without the mask {special.mask}; give the tokenizer that made the ids"
            )
