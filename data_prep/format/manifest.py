"""The manifest: everything about a data set that is not a token, and where in the tars each row lies.

A data set is a folder::

    manifest.json  tokenizer.json  rejects.jsonl (if any)
    train/train-000000.tar ...  validation/validation-000000.tar ...

or a folder of token tars of another program, with an index beside them (``bd3 prep --index``, version 3)::

    manifest.json  tokenizer.json  index/train-*.npy  index/validation-*.npy
    any/name.tar ...
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args

import numpy as np
from pydantic import Field, model_validator

from bd3_common import schema
from bd3_common.atomic import write_text
from bd3_common.schema import MAX_LENGTH, MAX_VOCABULARY, Count, InnerPath, Record, Sha256
from bd3_common.text import shorten
from data_prep.errors import DataError
from data_prep.format.files import Identity, identity_of
from data_prep.format.pack import Packing

FORMAT: Final = "bd3-rows"
VERSION: Final = 4
INDEX_VERSION: Final = 3
"""version of a manifest over token tars of another program"""
VERSIONS: Final = (2, INDEX_VERSION, VERSION)
"""versions that are read; those of version 2 have no tails"""
MANIFEST = "manifest.json"
TOKENIZER: Final = "tokenizer.json"
REJECTS = "rejects.jsonl"
MEND = "copy the data set again or write it with bd3 prep --overwrite"
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
AGAIN = "write the data set again with bd3 prep --overwrite"
# exp() of more has no float. A vocabulary of 2^31 ids has 21.5 nats.
Nats = Annotated[float, Field(ge=0, le=700)]


class Member(NamedTuple):
    """One sample of a tar, stored as a list of four numbers. Offsets are bytes from the tar's start.

    All samples of a split have the same number of rows, but for the last one, which may have fewer.
    """

    tokens_offset: int  # of the raw [rows, length] array, behind its npy header
    docs_offset: int  # of the raw [starts, 2] int32 array of (row in member, position)
    rows: int
    starts: int


class Shard(Record):
    """One tar file."""

    name: InnerPath
    bytes: Count
    sha256: Sha256
    rows: Count
    # Plain tuples in the order of Member: a manifest of 10,000 shards has hundreds of thousands of them.
    members: list[tuple[Count, Count, Count, Count]]


class IndexedShard(Shard):
    """One token tar of another program, and the part of the split's index that belongs to it; ``members`` is empty.

    Both splits may take samples of one tar: ``rows`` are those of this split.
    """

    name: InnerPath = Field(pattern=r"\.tar$", description="path below the data set's folder")
    samples: Count = Field(description="samples that the split takes from it, the next ones of the index")
    encoding: Literal["npy", "json"]
    dtype: str | None = Field(
        pattern=r"^[<>|][iu][1248]$", description="of the arrays in npy members, as numpy writes it"
    )

    @model_validator(mode="after")
    def _typed(self) -> IndexedShard:
        if self.encoding == "npy" and self.dtype is None:
            raise ValueError("npy members without a dtype")
        return self


class Tail(Record):
    """End of a split's token stream that fills no row. With it, the rows can be cut again to another length."""

    tokens: list[Count]
    starts: list[Count] = Field(description="offsets of document starts in tokens, if the recipe stores starts")
    lost: Count = Field(
        default=0, description="tokens after these that the data set it was repacked from had already dropped"
    )


class Split(Record):
    """One split of the data set. ``tokens`` = ``rows`` x length; ``dropped_tokens`` filled no row."""

    documents: Count
    text_bytes: Count = Field(description="UTF-8 bytes of all its documents; those of token files count nothing")
    rows: Count
    tokens: Count
    dropped_tokens: Count
    unigram_entropy: Nats = Field(description="nats per token of its own counts, position 0 left out")
    # A list of ours is taken for what it is at once; other tars have keys that ours have not.
    shards: list[Annotated[Shard | IndexedShard, Field(union_mode="left_to_right")]]
    tail: Tail | None = Field(default=None, description="the dropped tokens; null before version 4 and of token tars")

    @property
    def ends_early(self) -> bool:
        """True if tokens after those of the last row exist, or existed."""
        return self.dropped_tokens > 0 or (self.tail is not None and self.tail.lost > 0)


class IndexedSplit(Split):
    """A split of token tars of another program.

    The index is int64 ``[samples, 3]``, shard after shard: first byte of the sample's ids in the tar (behind an npy
    header), bytes, and ids. Rows are cut from the ids of a shard, sample after sample; what fills no row is dropped.
    """

    index: str = Field(pattern=r"^index/(train|validation)-[0-9a-f]{12}\.npy$", description="named by its content")
    index_sha256: Sha256


class SourceFile(Record):
    """An input file, identified by content: size and sha256 of what is stored (compressed or not)."""

    name: str
    bytes: Count
    sha256: Sha256


class Recipe(Record):
    """Options that decide the rows, beside text and tokenizer file: equal recipes give equal data sets."""

    length: int = Field(ge=4, le=MAX_LENGTH)
    packing: Packing
    documents: bool = Field(description="whether samples list where documents start")
    add_bos: bool
    add_eos: bool
    tokenizer: str = Field(description="bpe:N as asked for, or the sha256 of the tokenizer file given")
    tokenizer_sample: float
    bos: str | None
    eos: str | None
    text_field: str
    id_field: str
    text_documents: Literal["line", "file"]
    min_chars: int
    max_chars: int | None
    split_seed: int = Field(ge=0)
    validation_fraction: float = Field(gt=0, lt=1)
    rows_per_member: int = Field(ge=1)
    rows_per_shard: int = Field(ge=1)
    mask: str | None = None
    pad: str | None = None


class IndexRecipe(Recipe):
    """Options that determine the rows of token tars of another program."""

    index_member: str | None = Field(description="extension of the members that hold the ids")


class Parent(Record):
    """The data set that another one was repacked from."""

    name: str = Field(description="last part of its path or address")
    manifest_sha256: Sha256


class Manifest(Record):
    """Contents of ``manifest.json``."""

    format: Literal["bd3-rows"] = FORMAT
    version: Literal[2, 3, 4] = VERSION
    package_version: str
    length: int = Field(ge=4, le=MAX_LENGTH, description="tokens per row, L")
    dtype: Literal["<u2", "<u4"]
    vocab_size: int = Field(ge=1, le=MAX_VOCABULARY, description="ids a model needs, the mask's included")
    bos_id: Count
    eos_id: Count
    mask_id: Count
    pad_id: Count | None = Field(default=None, description="id of the token named for padding; rows have none")
    tokenizer: Literal["tokenizer.json"] = TOKENIZER
    tokenizer_sha256: Sha256
    recipe: Annotated[Recipe | IndexRecipe, Field(union_mode="left_to_right")]
    sources: list[SourceFile]
    rejects: Count = Field(default=0, description=f"records left out as unreadable, listed in {REJECTS}")
    skipped: dict[str, Count] = Field(
        default={},
        description="documents left out: short, long, empty (no token); in tars member, unnamed, hidden",
    )
    nul_characters: Count = Field(default=0, description="U+0000 removed from texts; left out of the file if 0")
    nul_documents: Count = Field(default=0, description="documents that they were in; left out of the file if 0")
    lost_characters: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of a sample's characters that the tokenizer loses, spaces not counted; null: none",
    )
    validation_unigram_nats: Nats = Field(
        description="cross-entropy per token of the validation rows under the train rows' counts plus one; "
        "position 0 of each row is left out of both"
    )
    validation_unigram_perplexity: float = Field(description="exp(validation_unigram_nats): what a model must beat")
    splits: dict[SplitName, Annotated[Split | IndexedSplit, Field(union_mode="left_to_right")]]
    repacked_from: Parent | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        for name in ("bos_id", "eos_id", "mask_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(f"{name}={getattr(self, name)}: not below vocab_size={self.vocab_size}")
        if self.dtype == "<u2" and self.vocab_size > 2**16:
            raise ValueError(f"dtype={self.dtype}: has no room for vocab_size={self.vocab_size}")
        # An id takes at least a byte, so rows are bounded by the bytes on disk.
        for name, split in self.splits.items():
            for number, shard in enumerate(split.shards):
                if shard.rows * self.length > shard.bytes:
                    where = f"splits.{name}.shards[{number}]"
                    raise ValueError(f"{where}.rows={shard.rows}: more than its {shard.bytes} bytes can hold")
                if isinstance(shard, IndexedShard):  # whose rows are in the index
                    continue
                if (there := sum(member[2] for member in shard.members)) != shard.rows:
                    raise ValueError(f"splits.{name}.shards.{number}.rows={shard.rows}: its members have {there}")
        return self


def shard_path(split: SplitName, shard: Shard) -> str:
    """Path of a shard below the data set's folder, with ``/``."""
    return shard.name if isinstance(shard, IndexedShard) else f"{split}/{shard.name}"


def unigram_nats(counts: np.ndarray, weights: np.ndarray) -> float:
    """Mean of -log q over tokens drawn ``counts`` times, with q proportional to ``weights``; both ``[V]``.

    With ``weights = counts`` this is the entropy of the counts. Ids that never occur may have weight 0.
    """
    seen = counts > 0
    log_q = np.log(weights[seen] / weights.sum())
    return float(-(counts[seen] * log_q).sum() / counts.sum())


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write ``manifest.json``, indented, with each member's four numbers on one line."""
    content = manifest.model_dump(mode="json")
    # Earlier programs refuse keys that they do not know: what they wrote is written as they did.
    later = [(content, key) for key in ("repacked_from", "pad_id", "lost_characters")]
    later += [(content["recipe"], key) for key in ("mask", "pad")]
    later += [(split, "tail") for split in content["splits"].values()]
    for record, key in later:
        if record[key] is None:
            del record[key]
    for key in ("nul_characters", "nul_documents"):
        if not content[key]:
            del content[key]
    text = json.dumps(content, indent=1)
    # A JSON string has no raw line end, so what indent=1 wrote between numbers is all that can change.
    text = re.sub(r"\[\s+\d+(,\s+\d+)*\s+\]", lambda found: " ".join(found[0].split()), text)
    write_text(folder / MANIFEST, text + "\n")


def load_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a data set.

    Raises:
        DataError: the folder is missing or no data set, or its manifest is damaged or of another version.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.exists():
        raise DataError(f"{folder}: no such data set; write it with bd3 prep --out {folder}")
    if not path.is_file():
        raise DataError(f"{folder}: not a data set, it has no {MANIFEST}; name a folder that bd3 prep wrote")
    try:
        text = schema.read_bytes(path, DataError)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    return parse_manifest(text, path)


def parse_manifest(text: bytes, where: str | Path) -> Manifest:
    """The manifest in ``text``; errors as in :func:`load_manifest`, which name ``where``."""
    try:
        return schema.parse(text, Manifest, where, AGAIN, DataError)
    except DataError as error:
        damaged = error
    try:
        content = schema.parse(text, dict[str, Any], where, AGAIN, DataError)
    except DataError:
        raise damaged from None
    if content.get("format") != FORMAT:
        raise DataError(f"{where}: not the manifest of a data set; name a folder that bd3 prep wrote")
    if content.get("version") not in VERSIONS:
        known, found = " and ".join(map(str, VERSIONS)), shorten(content.get("version"))
        raise DataError(f"{where}: version={found}: this program reads versions {known}; {AGAIN}")
    raise damaged


def check_files(folder: Path, manifest: Manifest, splits: tuple[SplitName, ...] = SPLITS) -> list[Identity]:
    """Compare shard sizes with the manifest's: a tar cut between members reads short without an error.

    Returns:
        identity of each file, in the order of the manifest.

    Raises:
        DataError: names the first shard that is missing, cut or grown.
    """
    identities = []
    for split in splits:
        # One look per shard and no Path objects: data sets have tens of thousands of shards.
        for shard in manifest.splits[split].shards:
            path = os.path.join(folder, shard_path(split, shard))
            try:
                status = os.stat(path)
            except OSError:
                status = None
            if status is None or not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path}: this shard is missing; {MEND}")
            if status.st_size != shard.bytes:
                raise DataError(f"{path}: {status.st_size} bytes, the manifest says {shard.bytes}; {MEND}")
            identities.append(identity_of(status))
    return identities
