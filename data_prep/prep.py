"""Text to a data set: split by document, tokenize, pack, write shards and manifest, all of it or nothing."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer

from data_prep.errors import DataError
from data_prep.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    Recipe,
    SourceFile,
    Split,
    check_files,
    load_manifest,
    save_manifest,
    sha256_file,
    unigram_nats,
)
from data_prep.pack import Packer, Packing, Rows
from data_prep.shards import ShardWriter, sync
from data_prep.sources import Document, expand, read_documents
from data_prep.staging import check_replaceable, staged
from data_prep.tokenize import SpecialIds, encode, load_tokenizer, special_ids, token_dtype, train_bpe

BATCH_BYTES = 4 << 20  # text tokenized at once
REPORT_SECONDS = 2.0
Report = Callable[[str], None]


class PrepConfig(BaseModel):
    """What ``bd3 prep`` is asked to do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: tuple[str, ...] = Field(min_length=1, description="JSONL files, plain or .gz, or folders of them")
    out: str = Field(min_length=1, description="folder of the data set, created in one piece at the end")
    length: int = Field(256, ge=4, description="tokens per row, L")
    tokenizer: str = Field("bpe:4096", description="bpe:N trains one on the train split; else a tokenizer.json")
    packing: Packing = Field("wrap", description="wrap: each row is BOS, L-2 tokens, EOS; stream: rows cut anywhere")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of documents held out, by hash of id")
    seed: int = Field(0, ge=0, description="seed of the split")
    text_field: str = Field("text", description="JSON field that holds the text")
    id_field: str = Field("id", description="JSON field that names the document; may be absent")
    bos: str | None = Field(None, description="token that begins a row; null looks for the usual names")
    eos: str | None = Field(None, description="token that ends a document; null looks for the usual names")
    rows_per_member: int = Field(512, ge=1, description="rows in one sample of a tar")
    rows_per_shard: int = Field(16384, ge=1, description="rows in one tar")
    overwrite: bool = Field(False, description="replace a data set that is already there")

    @model_validator(mode="after")
    def _whole_members(self) -> PrepConfig:
        if self.rows_per_shard % self.rows_per_member:
            fit = -(-self.rows_per_shard // self.rows_per_member) * self.rows_per_member
            raise ValueError(
                f"rows_per_shard={self.rows_per_shard}: not a multiple of "
                f"rows_per_member={self.rows_per_member}; use {fit}"
            )
        return self


def prep(config: PrepConfig, report: Report = lambda line: None) -> Manifest:
    """Write the data set that ``config`` asks for and return its manifest.

    A data set already there is returned untouched if recipe and sources are the same. Nothing is seen under
    ``config.out`` before all of it is on the disk, and a failure leaves nothing behind.

    Args:
        config: what to do.
        report: called with one line of text now and then.

    Raises:
        DataError: anything wrong with inputs, tokenizer or output, in one line.
    """
    files = expand(config.inputs)
    out = Path(config.out).absolute()
    if os.path.lexists(out):
        if not config.overwrite:
            return _reuse(config, files, out, report)
        check_replaceable(out)
    with staged(out, config.overwrite) as folder:
        manifest = _build(config, files, folder, report)
    rows = ", ".join(f"{name} {split.rows}" for name, split in manifest.splits.items())
    report(
        f"wrote {config.out}: rows of {manifest.length} tokens: {rows}; "
        f"validation unigram perplexity {manifest.validation_unigram_perplexity:.1f}"
    )
    return manifest


def in_validation(identity: str, seed: int, fraction: float) -> bool:
    """Whether a document is held out: sha256 of ``"<seed>:<id>"``, read as a fraction, is below ``fraction``.

    Nothing else matters, so a document stays in its split when others are added.
    """
    digest = hashlib.sha256(f"{seed}:{identity}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _reuse(config: PrepConfig, files: Sequence[Path], out: Path, report: Report) -> Manifest:
    """The manifest in ``out`` if it is what ``config`` asks for, else DataError."""
    if not (out / MANIFEST).is_file():
        raise DataError(f"{config.out}: exists and is not a data set; choose another --out")
    manifest = load_manifest(out)
    asked, made = _recipe(config), manifest.recipe
    for key in Recipe.model_fields:
        if getattr(asked, key) != getattr(made, key):
            raise DataError(
                f"{config.out}: holds a data set with {key}={getattr(made, key)}, not {getattr(asked, key)}; "
                "choose another --out or pass --overwrite"
            )
    if _identify(files) != manifest.sources:
        raise DataError(f"{config.out}: holds a data set of other sources; choose another --out or pass --overwrite")
    check_files(out, manifest)
    report(f"{config.out}: already there, same recipe and sources; nothing to do")
    return manifest


def _recipe(config: PrepConfig) -> Recipe:
    tokenizer = config.tokenizer
    if _bpe_size(tokenizer) is None:
        load_tokenizer(tokenizer)
        tokenizer = sha256_file(Path(tokenizer))
    shared = config.model_dump(exclude={"inputs", "out", "overwrite", "seed", "tokenizer"})
    return Recipe(tokenizer=tokenizer, split_seed=config.seed, **shared)


def _bpe_size(tokenizer: str) -> int | None:
    """N of ``bpe:N``, None for a path."""
    if not tokenizer.startswith("bpe:"):
        return None
    digits = tokenizer[4:]
    if not digits.isdecimal() or len(digits) > 8:  # the trainer reserves memory for all entries it may find
        raise DataError(
            f"tokenizer={tokenizer[:40]}: after bpe: goes a number of entries below 100000000; write bpe:4096"
        )
    return int(digits)


def _identify(files: Sequence[Path]) -> list[SourceFile]:
    try:
        return [SourceFile(name=f.name, bytes=f.stat().st_size, sha256=sha256_file(f)) for f in files]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); check the file and its rights") from None


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _build(config: PrepConfig, files: Sequence[Path], folder: Path, report: Report) -> Manifest:
    """Write everything into ``folder``."""
    stamps = {file: _stamp(file) for file in files}
    recipe, sources = _recipe(config), _identify(files)
    tokenizer = _tokenizer(config, files, folder / TOKENIZER, report)
    special = special_ids(tokenizer, config.bos, config.eos)
    builders = _fill(config, files, tokenizer, special, folder, report)
    splits = {name: builder.finish() for name, builder in builders.items()}
    _check_splits(config, splits)
    for file, stamp in stamps.items():
        if _stamp(file) != stamp:
            raise DataError(f"{file}: changed while it was read; run again once it is complete")

    nats = unigram_nats(builders["validation"].counts, builders["train"].counts + 1)
    manifest = Manifest(
        package_version=_version(),
        length=config.length,
        dtype=token_dtype(special.vocab_size).str,
        vocab_size=special.vocab_size,
        bos_id=special.bos,
        eos_id=special.eos,
        mask_id=special.mask,
        tokenizer_sha256=sha256_file(folder / TOKENIZER),
        recipe=recipe,
        sources=sources,
        validation_unigram_nats=nats,
        validation_unigram_perplexity=math.exp(nats),
        splits=splits,
    )
    save_manifest(manifest, folder)
    for name in (MANIFEST, TOKENIZER):
        sync(folder / name)
    return manifest


def _documents(config: PrepConfig, files: Sequence[Path]) -> Iterator[tuple[bool, Document]]:
    """(in validation, document) for every document."""
    for document in read_documents(files, config.text_field, config.id_field):
        yield in_validation(document.id, config.seed, config.validation_fraction), document


def _tokenizer(config: PrepConfig, files: Sequence[Path], path: Path, report: Report) -> Tokenizer:
    """Train or load the tokenizer and leave it at ``path``: a given file is shipped byte for byte."""
    size = _bpe_size(config.tokenizer)
    if size is None:
        tokenizer = load_tokenizer(config.tokenizer)
        shutil.copyfile(config.tokenizer, path)
        return tokenizer
    progress = _Progress(report, "read for the tokenizer")
    tokenizer = train_bpe((progress.pass_on(d) for held_out, d in _documents(config, files) if not held_out), size)
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    progress.line()
    report(f"trained a byte-level BPE of {tokenizer.get_vocab_size()} entries")
    return tokenizer


def _fill(
    config: PrepConfig,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    special: SpecialIds,
    folder: Path,
    report: Report,
) -> dict[str, _SplitBuilder]:
    """Send every document to its split."""
    builders = {name: _SplitBuilder(config, tokenizer, special, folder, name) for name in SPLITS}
    progress = _Progress(report, "packed")
    for held_out, document in _documents(config, files):
        builders["validation" if held_out else "train"].add(document)
        progress.pass_on(document)
    for builder in builders.values():
        builder.flush()
    progress.line()
    return builders


class _SplitBuilder:
    """Tokenizes, packs, counts and writes one split; holds one batch of text and one chunk of rows."""

    def __init__(self, config: PrepConfig, tokenizer: Tokenizer, special: SpecialIds, folder: Path, name: str):
        self.tokenizer, self.special = tokenizer, special
        dtype = token_dtype(special.vocab_size)
        self.packer = Packer(config.length, special.bos, special.eos, config.packing, dtype, config.rows_per_member)
        self.writer = ShardWriter(folder / name, name, config.rows_per_shard)
        self.counts = np.zeros(special.vocab_size, np.int64)  # of tokens at positions 1 to L-1
        self.batch: list[Document] = []
        self.batch_bytes = self.documents = self.text_bytes = self.rows = self.tokens = 0

    def add(self, document: Document) -> None:
        self.batch.append(document)
        self.batch_bytes += len(document.text.encode())
        if self.batch_bytes >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Tokenize and pack the batch."""
        ids = encode(self.tokenizer, [document.text for document in self.batch])
        for document, tokens in zip(self.batch, ids):
            if self.special.mask in tokens:
                name = self.tokenizer.id_to_token(self.special.mask)
                raise DataError(
                    f"{document.source}: document {document.id}: its text holds the mask {name!r}, which "
                    "no clean text may hold; remove it, or mark the mask as special in the tokenizer"
                )
        self.documents += len(self.batch)
        self.text_bytes += self.batch_bytes
        self.batch, self.batch_bytes = [], 0
        self._write(self.packer.add(ids))

    def finish(self) -> Split:
        last, dropped = self.packer.finish()
        self._write(last)
        return Split(
            documents=self.documents,
            text_bytes=self.text_bytes,
            rows=self.rows,
            tokens=self.tokens,
            dropped_tokens=dropped,
            unigram_entropy=unigram_nats(self.counts, self.counts) if self.rows else 0.0,
            shards=self.writer.close(),
        )

    def _write(self, chunks: list[Rows]) -> None:
        for chunk in chunks:
            self.writer.write(chunk)
            self.counts += np.bincount(chunk.tokens[:, 1:].ravel(), minlength=len(self.counts))
            self.rows += len(chunk.tokens)
            self.tokens += chunk.tokens.size


def _check_splits(config: PrepConfig, splits: dict[str, Split]) -> None:
    """Both splits need a document and a row."""
    documents = sum(split.documents for split in splits.values())
    if not documents:
        raise DataError(f"{config.inputs[0]}: no documents in the input; give files with one JSON object a line")
    for name, split in splits.items():
        if not split.documents:
            raise DataError(
                f"validation_fraction={config.validation_fraction}: none of {documents} documents falls into "
                f"the {name} split; change --validation-fraction or --seed, or give more documents"
            )
        if not split.rows:
            raise DataError(
                f"length={config.length}: the {split.documents} documents of the {name} split fill no row "
                f"({split.dropped_tokens} tokens); use a shorter --length, another --validation-fraction "
                "or more text"
            )


class _Progress:
    """Reports documents and MB/s, at most every ``REPORT_SECONDS`` but for the last line."""

    def __init__(self, report: Report, verb: str):
        self.report, self.verb = report, verb
        self.documents = self.bytes = 0
        self.began = self.told = time.monotonic()

    def pass_on(self, document: Document) -> str:
        """Count a document and return its text."""
        self.documents += 1
        self.bytes += len(document.text.encode())
        if time.monotonic() - self.told >= REPORT_SECONDS:
            self.line()
        return document.text

    def line(self) -> None:
        self.told = time.monotonic()
        speed = self.bytes / max(self.told - self.began, 1e-9) / 1e6
        self.report(f"{self.verb}: {self.documents} documents, {self.bytes / 1e6:.1f} MB, {speed:.1f} MB/s")


def _version() -> str:
    try:
        return metadata.version("bd3-megatron")
    except metadata.PackageNotFoundError:
        return "unknown"
