"""Index of token tars of another program: a manifest and an index file beside them; the tars are not changed."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from bd3_common.atomic import atomic_file, write_bytes
from data_prep.build import pool
from data_prep.build.encode import in_validation
from data_prep.build.outcome import package_version, vocabulary
from data_prep.build.progress import Progress, Report
from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.format.manifest import (
    INDEX_VERSION,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    IndexedShard,
    IndexedSplit,
    IndexRecipe,
    Manifest,
    SourceFile,
    SplitName,
    save_manifest,
    unigram_nats,
)
from data_prep.format.tokenizer import SpecialIds, load_tokenizer, special_ids
from data_prep.read.indexed import Ids, json_ids, npy_ids
from data_prep.sources.tar import TarMembers

PICKLED = ("pyd", "pickle", "pkl", "pth", "pt", "npz")
"""extensions of members that webdataset would unpickle, or that may hold what is unpickled"""
SPLIT_FOLDERS: dict[str, SplitName] = {"train": "train", "validation": "validation", "valid": "validation"}
SPLIT_FOLDERS |= {"val": "validation", "dev": "validation"}


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


def index_folder(config: IndexConfig, report: Report) -> Manifest:
    """Write ``manifest.json``, ``tokenizer.json`` and ``index/`` into a folder of token tars.

    Raises:
        DataError: no such folder, a data set there already, a tar that is damaged or holds no ids, ids outside the
            vocabulary, or a split without a row.
    """
    folder = Path(config.index)
    names = find_tars(folder)
    if (folder / MANIFEST).exists() and not config.overwrite:
        raise DataError(f"{folder / MANIFEST}: there is one already; pass --overwrite to write it again")
    tokenizer = folder / TOKENIZER if config.tokenizer == TOKENIZER else Path(config.tokenizer)
    if config.tokenizer.startswith("bpe:"):
        raise DataError(f"tokenizer={config.tokenizer}: the ids are there already; give the tokenizer.json they are of")
    special = special_ids(load_tokenizer(tokenizer), config.bos, config.eos)
    tars = scan(folder, names, config, special, report, config.workers)
    manifest, index = describe(tars, config, special, sha256_file(tokenizer))
    (folder / "index").mkdir(exist_ok=True)
    for name, content in index.items():
        write_bytes(folder / index_path(name, content), content)
    if tokenizer != folder / TOKENIZER:
        with atomic_file(folder / TOKENIZER) as temporary:
            shutil.copyfile(tokenizer, temporary)
    save_manifest(manifest, folder)
    current = {index_path(name, content) for name, content in index.items()}
    for path in (folder / "index").glob("*.npy"):
        if f"index/{path.name}" not in current:  # of the manifest before
            path.unlink()
    return manifest


def index_path(split: SplitName, content: bytes) -> str:
    """Path of an index below the data set's folder. The name follows the content: a new one replaces no old one."""
    return f"index/{split}-{hashlib.sha256(content).hexdigest()[:12]}.npy"


def find_tars(folder: Path) -> list[str]:
    """Paths of the tars below a folder, sorted, with ``/``; hidden files and folders are passed over.

    Raises:
        DataError: no such folder, no tar in it, or compressed tars, which cannot be read in place.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder of the tars to --index")
    names = []
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = Path(path).relative_to(folder)
        for name in files:
            if name.startswith("."):
                continue
            if not _is_utf8(name):
                shown = os.fsencode(Path(path) / name).decode(errors="backslashreplace")
                raise DataError(f"{shown}: the name is not UTF-8, and a manifest cannot hold it; rename the file")
            if name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
                raise DataError(f"{Path(path) / name}: compressed: rows cannot be read in place; unpack it to a .tar")
            if name.endswith(".tar"):
                names.append((base / name).as_posix())
    if not names:
        raise DataError(f"{folder}: no .tar file in it; give the folder of the tars to --index")
    return sorted(names)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def scan(
    folder: Path, names: Sequence[str], config: IndexConfig, special: SpecialIds, report: Report, workers: int | None
) -> list[IndexedTar]:
    """All tars, in the order of ``names``.

    Raises:
        DataError: the first damage found.
    """
    jobs = tar_jobs(folder, names, config, special)
    size = sum((folder / name).stat().st_size for name in names)
    progress = Progress(report, "indexed", size)
    found: dict[str, IndexedTar] = {}
    count = workers or len(os.sched_getaffinity(0))
    for job, result in pool.run(index_tar, jobs, count, progress.tick, size):
        if isinstance(result, DataError):
            raise result
        progress.done(result.bytes, result.bytes)
        found[job.name] = result
    progress.line()
    return [found[name] for name in names]


def tar_jobs(folder: Path, names: Sequence[str], config: IndexConfig, special: SpecialIds) -> list[TarJob]:
    """A job for each tar. The splits are those of the folders if all tars lie in folders of both splits."""
    splits = [SPLIT_FOLDERS.get(name.partition("/")[0]) for name in names]
    by_folder = set(splits) == set(SPLITS)
    return [TarJob(folder, n, config, split if by_folder else None, special) for n, split in zip(names, splits)]


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


def describe(
    tars: Sequence[IndexedTar], config: IndexConfig, special: SpecialIds, tokenizer_sha256: str
) -> tuple[Manifest, dict[SplitName, bytes]]:
    """The manifest of indexed tars, and the index of each split as an npy file.

    Raises:
        DataError: a split has no row.
    """
    counts = {name: np.sum([tar.counts[name] for tar in tars], axis=0) for name in SPLITS}
    index: dict[SplitName, bytes] = {}
    for name in SPLITS:
        # A tar without a row of this split is no shard of it.
        parts = [tar.index[name] for tar in tars if tar.shards[name].rows]
        if parts:
            index[name] = npy_bytes(np.concatenate(parts))
        else:
            raise DataError(
                f"{config.index}: the {name} split has no row of {config.length} tokens; give more tars, another "
                "--validation-fraction or a smaller --length"
            )
    nats = unigram_nats(counts["validation"], counts["train"] + 1)
    documents = config.documents if config.documents is not None else not all(tar.whole_rows for tar in tars)
    recipe = IndexRecipe(
        length=config.length,
        packing="stream",
        documents=documents,
        add_bos=False,
        add_eos=False,
        tokenizer=tokenizer_sha256,
        tokenizer_sample=1.0,
        bos=config.bos,
        eos=config.eos,
        text_field="",
        id_field="",
        text_documents="file",
        min_chars=0,
        max_chars=None,
        split_seed=config.seed,
        validation_fraction=config.validation_fraction,
        rows_per_member=1,
        rows_per_shard=1,
        index_member=config.member,
    )
    manifest = Manifest(
        version=INDEX_VERSION,
        package_version=package_version(),
        length=config.length,
        **vocabulary(special),
        tokenizer_sha256=tokenizer_sha256,
        recipe=recipe,
        sources=[SourceFile(name=tar.name, bytes=tar.bytes, sha256=tar.sha256) for tar in tars],
        validation_unigram_nats=nats,
        validation_unigram_perplexity=float(np.exp(nats)),
        splits={name: _split(name, tars, index[name], counts[name], documents, config.length) for name in SPLITS},
    )
    return manifest, index


def _split(
    name: SplitName,
    tars: Sequence[IndexedTar],
    index: bytes,
    counts: NDArray[np.int64],
    documents: bool,
    length: int,
) -> IndexedSplit:
    shards = [tar.shards[name] for tar in tars if tar.shards[name].rows]
    rows = sum(shard.rows for shard in shards)
    return IndexedSplit(
        documents=sum(tar.shards[name].samples for tar in tars) if documents else 0,
        text_bytes=0,
        rows=rows,
        tokens=rows * length,
        dropped_tokens=sum(tar.tokens[name] for tar in tars) - rows * length,
        unigram_entropy=unigram_nats(counts, counts),
        shards=list(shards),
        index=index_path(name, index),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


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


def npy_bytes(array: NDArray[np.int64]) -> bytes:
    """An array as the bytes of an npy file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
