"""`bd3 prep repack`: rows of another length or packing from a finished data set, without its texts.

The token stream of each split is joined again from the rows and the manifest's tail, and then cut as
:mod:`data_prep.build.prep` cuts it: in jobs that leave a marker when they are done, and published in one piece. The
data set equals one prepared that way, but for the manifest's ``repacked_from``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from bd3_common.atomic import write_bytes
from bd3_common.schema import read_bytes
from bd3_common.text import printable
from data_prep.build import pool
from data_prep.build.assemble import Segment, Stream, build_shards, shard_jobs
from data_prep.build.destination import Destination, destination
from data_prep.build.encode import Encoded, read_result
from data_prep.build.outcome import package_version, split_record, validation_unigram
from data_prep.build.plan import check_rows_options
from data_prep.build.prep import reuse
from data_prep.build.progress import Progress, Report
from data_prep.build.work_folder import recipe_difference
from data_prep.errors import DataError
from data_prep.format.manifest import (
    INDEX_VERSION,
    MANIFEST,
    MEND,
    REJECTS,
    SPLITS,
    TOKENIZER,
    VERSION,
    Manifest,
    Parent,
    Recipe,
    Shard,
    Split,
    SplitName,
    Tail,
    check_files,
    load_manifest,
    parse_manifest,
    save_manifest,
    shard_path,
)
from data_prep.format.pack import Packing, RowFormat
from data_prep.format.remote import is_remote, read_remote
from data_prep.format.tokenizer import token_dtype
from data_prep.repack.rejoin import EMPTY, RejoinJob, begins_document, opens_document, rejoin
from data_prep.sources import Part, Source


class RepackConfig(BaseModel):
    """Options of ``bd3 prep repack``; null leaves an option of the rows as it is in DATA."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = Field(min_length=1, description="data set that bd3 prep wrote: a folder or a URL")
    out: str = Field(min_length=1, description="folder of the new data set, or URL of one (s3://bucket/prefix)")
    work: str | None = Field(
        default=None, description="with a URL: local folder for unfinished work; null: prep in the user's cache folder"
    )
    length: int | None = Field(default=None, ge=4, description="tokens per row, L")
    packing: Packing | None = Field(
        default=None, description="wrap: rows are BOS, L-2 tokens, EOS; stream: rows cut anywhere"
    )
    documents: bool | None = Field(default=None, description="false: store no document starts")
    add_bos: bool | None = Field(default=None, description="BOS before each document (packing=stream)")
    add_eos: bool | None = Field(default=None, description="EOS after each document (packing=stream)")
    rows_per_member: int | None = Field(default=None, ge=1, description="rows in one sample of a tar")
    rows_per_shard: int | None = Field(default=None, ge=1, description="rows in one tar")
    workers: int | None = Field(default=None, ge=1, description="processes; null means one per core")
    overwrite: bool = Field(default=False, description="replace an existing data set")

    def recipe(self, made: Recipe) -> Recipe:
        """The recipe of a data set that is prepared as ``made`` was, but for these options.

        Raises:
            DataError: they do not fit each other.
        """
        given = self.model_dump(include=set(_ROWS), exclude_none=True)
        if self.packing == "wrap":  # which always has both
            given = {"add_bos": True, "add_eos": True} | given
        recipe = made.model_copy(update=given)
        try:
            check_rows_options(recipe)
        except ValueError as error:
            raise DataError(str(error)) from None
        return recipe


_ROWS = ("length", "packing", "documents", "add_bos", "add_eos", "rows_per_member", "rows_per_shard")


def repack(config: RepackConfig, report: Report = lambda line: None) -> Manifest:
    """Write a data set of the same tokens in other rows, and return its manifest.

    An existing one of the same recipe and source is kept. Finished parts of a call that failed or was killed are kept,
    and the same call continues from them.

    Args:
        config: source, output and the options that change.
        report: called with one line of text every few seconds.

    Raises:
        DataError: no data set, or one that cannot be repacked this way; the output cannot be used; one line.
    """
    source = Original(config.data)
    recipe = config.recipe(source.manifest.recipe)
    source.check_convertible(recipe)
    _check_apart(config)
    place = destination(config.out, config.work)
    if place.exists():
        if not config.overwrite:
            manifest = place.load()
            difference = recipe_difference(manifest.recipe, recipe)
            if difference is None and manifest.repacked_from != source.parent:
                difference = "other sources"
            reuse(place, manifest, difference, report)
            return manifest
        place.check_replaceable()
    try:
        return _Repack(config, source, recipe, place, report).run()
    except BaseException:
        place.release()
        raise


class Original:
    """The data set to repack.

    Args:
        data: its folder or URL.

    Raises:
        DataError: none is there, or it is an index of token tars.
    """

    def __init__(self, data: str):
        self.shown = self.root = data.rstrip("/") if is_remote(data) else data
        self.remote = is_remote(data)
        if self.remote:
            content = read_remote(f"{self.root}/{MANIFEST}")
            self.manifest = parse_manifest(content, f"{self.root}/{MANIFEST}")
            name = self.root.rpartition("/")[2]
        else:
            self.manifest = load_manifest(data)
            content = (Path(data) / MANIFEST).read_bytes()
            name = Path(data).absolute().name
        self.parent = Parent(name=printable(name), manifest_sha256=hashlib.sha256(content).hexdigest())
        if self.manifest.version == INDEX_VERSION:
            raise DataError(
                f"{data}: an index of token tars; index them again with another --length (bd3 prep --index)"
            )
        if missing := set(SPLITS) - set(self.manifest.splits):
            raise DataError(f"{data}: its manifest has no {min(missing)} split; {MEND}")
        if token_dtype(self.manifest.vocab_size).str != self.manifest.dtype:
            raise DataError(f"{data}: dtype={self.manifest.dtype}: not that of its vocab_size; {MEND}")
        if not self.remote:
            check_files(Path(data), self.manifest)

    def rows(self, recipe: Recipe) -> RowFormat:
        """Packing by a recipe, with the ids of this data set."""
        manifest = self.manifest
        return RowFormat(
            recipe.length, recipe.packing, manifest.bos_id, manifest.eos_id, recipe.add_bos, recipe.add_eos
        )

    def check_convertible(self, recipe: Recipe) -> None:
        """Raise DataError if the recipe needs document starts and the rows have none."""
        if self.manifest.recipe.documents:
            return
        made, wanted = self.rows(self.manifest.recipe), self.rows(recipe)
        need = None
        if recipe.documents:
            need = "documents=true"
        elif (made.head, made.tail) != (wanted.head, wanted.tail):
            need = f"packing={recipe.packing}: other BOS and EOS around documents"
        if need:
            raise DataError(
                f"{need}: the rows of {self.shown} do not tell where documents start (it was written with "
                "--no-documents); leave this as it is, or prepare the text again"
            )

    def place(self, name: str) -> str:
        """Path or URL of a file of the data set."""
        return f"{self.root}/{name}"

    def copy(self, name: str, to: Path) -> None:
        """Copy ``tokenizer.json`` or ``rejects.jsonl`` to ``to``.

        Raises:
            DataError: it cannot be read, or is not what the manifest says.
        """
        path = self.place(name)
        if not self.remote and name == REJECTS and Path(path).is_symlink():  # no hash says what it holds
            raise DataError(f"{path}: is a link, whose file would be copied; put the file itself there")
        try:
            content = read_remote(path) if self.remote else read_bytes(Path(path), DataError)
        except FileNotFoundError:
            raise DataError(f"{path}: missing; {MEND}") from None
        if name == TOKENIZER:
            digest, wanted = hashlib.sha256(content).hexdigest(), self.manifest.tokenizer_sha256
            if digest != wanted:
                raise DataError(f"{path}: sha256 is {digest[:12]}, the manifest says {wanted[:12]}; {MEND}")
        elif (lines := content.count(b"\n")) != self.manifest.rejects:
            raise DataError(f"{path}: {lines} lines, the manifest says {self.manifest.rejects}; {MEND}")
        write_bytes(to, content)


def _check_apart(config: RepackConfig) -> None:
    """Refuse an output that is the data set itself, in it or around it."""
    places = [config.data.rstrip("/"), config.out.rstrip("/")]
    if not any(map(is_remote, places)):
        places = [str(Path(place).resolve()) for place in places]
    if any(f"{a}/".startswith(f"{b}/") for a, b in (places, places[::-1])):
        raise DataError(f"{config.out}: is the data set to repack, in it or around it; choose another --out")


class _Repack:
    """One run in a work folder."""

    def __init__(self, config: RepackConfig, source: Original, recipe: Recipe, place: Destination, report: Report):
        self.config, self.source, self.recipe, self.place, self.report = config, source, recipe, place, report
        self.work = place.work
        self.made, self.rows = source.rows(source.manifest.recipe), source.rows(recipe)
        self.workers = config.workers or len(os.sched_getaffinity(0))
        self.parts = {name: list(self._parts(name)) for name in SPLITS}

    def run(self) -> Manifest:
        with self.work.opened(self.recipe, self.config.overwrite):
            self.place.claim()
            self._rejoin()
            return self._finish()

    def _parts(self, split: SplitName) -> list[Part]:
        """The shards of a split and its tail, as parts of the work folder."""
        content = self.source.manifest.splits[split]
        digest = self.source.parent.manifest_sha256
        sources = [
            Source(self.source.place(shard_path(split, part)), part.name, "shard", None, part.bytes, digest)
            if isinstance(part, Shard)
            else Source(self.source.place(f"{MANIFEST}#{split}"), MANIFEST, "tail", None, 0, digest)
            for part in contents_of(content)
        ]
        return [Part(source, 0, source.bytes) for source in sources]

    def _rejoin(self) -> None:
        """Write the streams of the parts that are not done yet."""
        every = [job for name in SPLITS for job in self._jobs(name)]
        jobs = [job for job in every if read_result(job.folder) is None]
        if len(jobs) < len(every):
            self.report(f"continuing: {len(every) - len(jobs)} of {len(every)} parts are done already")
        sizes = {job.folder: job.content.bytes if isinstance(job.content, Shard) else 0 for job in jobs}
        progress = Progress(self.report, "read", sum(sizes.values()))
        for job, result in pool.run(rejoin, jobs, self.workers, progress.tick, sum(sizes.values())):
            if isinstance(result, DataError):
                raise result
            progress.done(sizes[job.folder], sizes[job.folder])
        if jobs:
            progress.line()

    def _jobs(self, split: SplitName) -> list[RejoinJob]:
        manifest, content = self.source.manifest, self.source.manifest.splits[split]
        contents = contents_of(content)
        places = [part.source.path for part in self.parts[split]]
        begins, opens = [False] * len(places), [False] * len(places)
        if (self.made.head, self.made.tail) != (self.rows.head, self.rows.tail):
            begins = [begins_document(*pair, self.made) for pair in zip(places, contents)]
            opens = [opens_document(*pair, self.made) for pair in zip(places, contents)]
        # The last document is whole unless tokens are lost; then its EOS tells.
        ends = [*begins[1:], None if lost_tokens(content) else True]
        return [
            RejoinJob(
                self.work.part(part),
                split,
                part.source.path,
                contents[n],
                self.made,
                self.rows,
                manifest.dtype,
                (manifest.vocab_size, manifest.mask_id),
                opened=n > 0 and opens[n - 1],
                ends=ends[n],
            )
            for n, part in enumerate(self.parts[split])
        ]

    def _finish(self) -> Manifest:
        """Cut the shards, write the manifest and publish."""
        source, work, recipe = self.source.manifest, self.work, self.recipe
        results = {name: [self._result(part) for part in self.parts[name]] for name in SPLITS}
        streams = {name: self._stream(name, results[name]) for name in SPLITS}
        jobs = {
            name: shard_jobs(
                stream,
                recipe.rows_per_shard,
                folder=work.data / name,
                notes=work.notes,
                rows_per_member=recipe.rows_per_member,
                documents=recipe.documents,
                vocab_size=source.vocab_size,
                url=self.place.shard_folder(name),
            )
            for name, stream in streams.items()
        }
        for name in SPLITS:
            if not jobs[name]:
                work.remove()
                raise DataError(
                    f"length={recipe.length}: the {streams[name].tokens} tokens of the {name} split fill no row; "
                    "use a shorter --length"
                )
        every = [job for name in SPLITS for job in jobs[name]]
        work.keep_shards_of([part for name in SPLITS for part in self.parts[name]])
        work.sweep()
        build_shards(every, self.workers, self.report, self.place.make_room(every))
        self.source.copy(TOKENIZER, work.data / TOKENIZER)
        if source.rejects:
            self.source.copy(REJECTS, work.data / REJECTS)
        splits = {
            name: split_record(
                streams[name],
                jobs[name],
                recipe.documents,
                source.splits[name].documents - sum(result.skipped.get(EMPTY, 0) for result in results[name]),
                source.splits[name].text_bytes,
                lost_tokens(source.splits[name]),
            )
            for name in SPLITS
        }
        fields = {"version": VERSION, "package_version": package_version(), "length": recipe.length}
        fields |= {"recipe": recipe, "splits": splits, "repacked_from": self.source.parent}
        if empty := sum(result.skipped.get(EMPTY, 0) for name in SPLITS for result in results[name]):
            fields["skipped"] = source.skipped | {EMPTY: source.skipped.get(EMPTY, 0) + empty}
        manifest = source.model_copy(update=fields | validation_unigram(jobs))
        save_manifest(manifest, work.data)
        self.place.publish(self.config.overwrite)
        self._summary(manifest)
        return manifest

    def _result(self, part: Part) -> Encoded:
        if (result := read_result(self.work.part(part))) is None:
            raise DataError(f"{self.work.part(part)}: its streams are gone; run bd3 prep repack again")
        return result

    def _stream(self, name: SplitName, results: Sequence[Encoded]) -> Stream:
        parts = zip(self.parts[name], results)
        segments = [Segment(self.work.part(part), 0, result.tokens[name]) for part, result in parts]
        return Stream(name, tuple(segments), self.rows, self.source.manifest.dtype)

    def _summary(self, manifest: Manifest) -> None:
        for name, split in self.source.manifest.splits.items():
            if lost := lost_tokens(split):
                self.report(
                    f"{name}: the last {lost} tokens of the text filled no row of {self.source.shown} and are not "
                    "in it, so they are missing here; prepare the text again to have them"
                )
        empty = self.source.manifest.skipped.get(EMPTY, 0)
        if empty and not (self.made.head or self.made.tail) and (self.rows.head or self.rows.tail):
            self.report(f"{empty} documents without a token are not in {self.source.shown}, so they are missing here")
        rows = ", ".join(f"{name} {split.rows}" for name, split in manifest.splits.items())
        self.report(f"wrote {self.place.shown}: rows of {manifest.length} tokens: {rows}; from {self.source.shown}")


def contents_of(split: Split) -> list[Shard | Tail]:
    """The shards of a split, and its tail, if it has tokens."""
    return [*split.shards, *([split.tail] if split.tail is not None and split.tail.tokens else [])]


def lost_tokens(split: Split) -> int:
    """Tokens of the split's text that are not in the data set: before version 4, those that filled no row."""
    return split.dropped_tokens if split.tail is None else split.tail.lost
