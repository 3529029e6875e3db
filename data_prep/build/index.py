"""Index of token tars of another program: a manifest and an index file beside them; the tars are not changed."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bd3_common.atomic import atomic_file, write_bytes
from bd3_common.text import is_unicode
from data_prep.build import pool
from data_prep.build.outcome import package_version, vocabulary
from data_prep.build.progress import Progress, Report
from data_prep.build.token_tar import IndexConfig, IndexedTar, TarJob, index_tar
from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.format.manifest import (
    INDEX_VERSION,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    IndexedSplit,
    IndexRecipe,
    Manifest,
    SourceFile,
    SplitName,
    save_manifest,
    unigram_nats,
)
from data_prep.format.tokenizer import SpecialIds, load_tokenizer, remarks, special_ids

SPLIT_FOLDERS: dict[str, SplitName] = {"train": "train", "validation": "validation", "valid": "validation"}
SPLIT_FOLDERS |= {"val": "validation", "dev": "validation"}


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
    special = special_ids(load_tokenizer(tokenizer), config.bos, config.eos, config.mask, config.pad)
    for line in remarks(tokenizer, special, config.mask):
        report(line)
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
            if not is_unicode(name):
                shown = os.fsencode(Path(path) / name).decode(errors="backslashreplace")
                raise DataError(f"{shown}: the name is not UTF-8, and a manifest cannot hold it; rename the file")
            if name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
                raise DataError(f"{Path(path) / name}: compressed: rows cannot be read in place; unpack it to a .tar")
            if name.endswith(".tar"):
                if not (Path(path) / name).is_file():  # a pipe would be waited for
                    raise DataError(f"{Path(path) / name}: is not a regular file; remove it")
                names.append((base / name).as_posix())
    if not names:
        raise DataError(f"{folder}: no .tar file in it; give the folder of the tars to --index")
    return sorted(names)


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
        mask=config.mask,
        pad=config.pad,
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


def npy_bytes(array: NDArray[np.int64]) -> bytes:
    """An array as the bytes of an npy file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
