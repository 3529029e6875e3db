"""Plan of a prep: its options, the recipe (those that determine the rows), parts, shares and processes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence

from pydantic import Field, model_validator

from bd3_common.formats.tokenizer_file import read_tokenizer
from data_prep.errors import DataError
from data_prep.format.manifest import Recipe
from data_prep.format.pack import Packing, RowFormat
from data_prep.format.remote import is_remote
from data_prep.format.tokenizer import SpecialIds
from data_prep.sources import Fields, Part, Source, split

SMALLEST_PART, LARGEST_PART = 1 << 20, 64 << 20  # stored bytes that one job reads, if the file can be split


class PrepConfig(Fields):
    """Options of ``bd3 prep``: inputs, output, recipe and processes."""

    inputs: tuple[str, ...] = Field(min_length=1, description="text to tokenize: files, folders, globs or URLs")
    out: str = Field(min_length=1, description="folder of the data set, or URL of one (s3://bucket/prefix)")
    work: str | None = Field(
        default=None,
        description="with a URL: local folder for unfinished work; null: prep in the user's cache folder",
    )
    length: int = Field(default=256, ge=4, description="tokens per row, L")
    tokenizer: str = Field(
        default="bpe:4096",
        description="bpe:N trains one on the train split; else a tokenizer.json, whose sampling (dropout) is not used",
    )
    tokenizer_sample: float = Field(default=1.0, gt=0, le=1, description="fraction of documents to train bpe:N on")
    packing: Packing = Field(
        default="wrap", description="wrap: rows are BOS, L-2 tokens, EOS; stream: rows cut anywhere"
    )
    documents: bool = Field(default=True, description="store document starts, for masks and evaluation by document")
    add_bos: bool = Field(default=True, description="BOS before each document (packing=stream)")
    add_eos: bool = Field(default=True, description="EOS after each document (packing=stream)")
    validation_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="fraction of documents for validation, chosen by a hash of the id"
    )
    seed: int = Field(default=0, ge=0, description="seed of the split")
    bos: str | None = Field(default=None, description="token that begins a row; null looks for the usual names")
    eos: str | None = Field(default=None, description="token that ends a document; null looks for the usual names")
    mask: str | None = Field(
        default=None, description="mask token; null looks for the usual names, and without one adds a last id"
    )
    pad: str | None = Field(default=None, description="token that exports pad with; null means EOS. Rows have none")
    rows_per_member: int = Field(default=512, ge=1, description="rows in one sample of a tar")
    rows_per_shard: int = Field(default=16384, ge=1, description="rows in one tar")
    max_rejects: int = Field(default=100, ge=0, description="most bad records to skip; 0: fail at the first one")
    workers: int | None = Field(default=None, ge=1, description="processes; null means one per core")
    part: str | None = Field(
        default=None,
        description="process a share of the inputs: K/N (K from 0), or slurm for this task of an array job; "
        "the last share to finish writes the data set",
    )
    overwrite: bool = Field(default=False, description="replace an existing data set")

    @model_validator(mode="after")
    def _fits_together(self) -> PrepConfig:
        check_rows_options(self)
        if self.work is not None and not is_remote(self.out):
            raise ValueError(f"work={self.work}: only for a URL; unfinished work lies beside a folder; leave it out")
        if self.part is not None and is_remote(self.out) and self.work is None:
            raise ValueError(f"part={self.part}: with a URL, all tasks need one work folder: name it with --work")
        if self.part is not None and self.overwrite:
            raise ValueError(
                f"overwrite=true: with part={self.part} each task would begin anew; remove {self.out} first"
            )
        if self.part is not None and self.part != "slurm":
            found = re.fullmatch(r"(\d+)/(\d+)", self.part)
            if found is None or int(found[1]) >= int(found[2]):
                raise ValueError(f"part={self.part}: not K/N with K from 0 to N-1; write 0/8, or slurm in an array job")
        return self

    @property
    def bpe_size(self) -> int | None:
        """N of ``tokenizer=bpe:N``; None for a path.

        Raises:
            DataError: N is not a number.
        """
        if not self.tokenizer.startswith("bpe:"):
            return None
        digits = self.tokenizer[4:]
        if not digits.isdecimal() or len(digits) > 8:  # the trainer reserves memory for all entries
            raise DataError(
                f"tokenizer={self.tokenizer[:40]}: after bpe: goes a number of entries below 100000000; write bpe:4096"
            )
        return int(digits)

    @property
    def fields(self) -> Fields:
        return Fields(**{name: getattr(self, name) for name in Fields.model_fields})

    def recipe(self) -> Recipe:
        """Options that determine the rows, apart from the text.

        Raises:
            DataError: the tokenizer file is missing or not a tokenizer.
        """
        tokenizer = self.tokenizer
        if self.bpe_size is None:
            tokenizer = hashlib.sha256(read_tokenizer(tokenizer, DataError).data).hexdigest()
        same = Recipe.model_fields.keys() & PrepConfig.model_fields.keys() - {"tokenizer"}
        values = {name: getattr(self, name) for name in same}
        return Recipe(**values, tokenizer=tokenizer, split_seed=self.seed)

    def rows(self, special: SpecialIds) -> RowFormat:
        return RowFormat(self.length, self.packing, special.bos, special.eos, self.add_bos, self.add_eos)


def check_rows_options(options: PrepConfig | Recipe) -> None:
    """Raise ValueError if the options of the rows do not fit each other."""
    if options.rows_per_shard % options.rows_per_member:
        fit = -(-options.rows_per_shard // options.rows_per_member) * options.rows_per_member
        raise ValueError(
            f"rows_per_shard={options.rows_per_shard}: not a multiple of "
            f"rows_per_member={options.rows_per_member}; use {fit}"
        )
    if options.packing == "wrap" and not (options.add_bos and options.add_eos):
        key = "add_eos" if options.add_bos else "add_bos"
        raise ValueError(f"{key}=false: rows of packing=wrap begin with BOS and end with EOS; use packing=stream")


def workers_of(config: PrepConfig) -> int:
    """Number of processes: ``config.workers``, or one for each core that this process may run on."""
    return config.workers or len(os.sched_getaffinity(0))


def parts_of(sources: Sequence[Source]) -> list[Part]:
    """The parts of all sources in order, one job each.

    Parts of a file depend on the file alone, so finished ones stay valid when other files change. A remote file is one
    part, because it is fetched whole.
    """
    sizes = [
        source.bytes + 1 if source.remote else min(max(source.bytes // 16, SMALLEST_PART), LARGEST_PART)
        for source in sources
    ]
    return [part for source, size in zip(sources, sizes) for part in split(source, size)]


def share_of(part: str) -> tuple[int, int]:
    """(K, N) of ``part``, which is ``K/N`` or ``slurm``.

    Raises:
        DataError: ``slurm`` outside of an array job.
    """
    if part != "slurm":
        mine, of = part.split("/")
        return int(mine), int(of)
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_STEP")
    try:
        task, first, count = (int(os.environ[name]) for name in names[:3])
        step = int(os.environ.get(names[3], 1))
        last = int(os.environ.get("SLURM_ARRAY_TASK_MAX", first + (count - 1) * step))
    except (KeyError, ValueError):
        raise DataError(
            f"part=slurm: not in an array job ({names[0]} is not set); use sbatch --array, or K/N"
        ) from None
    if last - first != (count - 1) * step:
        raise DataError(
            f"part=slurm: an array of {count} tasks from {first} to {last} leaves some out, so their shares are not "
            "known; to repeat single shares, use --part K/N with the N of the first array"
        )
    return (task - first) // step, count
