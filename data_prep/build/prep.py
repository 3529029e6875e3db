"""Text to a data set: tokenize the parts of the input, cut shards from their streams, publish by one rename.

Both steps consist of independent jobs. Each writes a marker when it is done, so a killed prep continues where it was.
The shards depend on the text and the recipe alone: not on the division into parts, the number of processes, or
interruptions.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from bd3_common.atomic import atomic_file, unique_suffix, write_bytes, write_text
from bd3_common.formats.tokenizer_file import read_tokenizer
from data_prep.build import pool
from data_prep.build.assemble import Segment, Stream, build_shards, shard_jobs
from data_prep.build.destination import Destination, destination
from data_prep.build.encode import (
    Encoded,
    EncodeJob,
    Reject,
    encode_part,
    in_validation,
    lost_line,
    read_result,
    rejects_text,
    share,
    too_many_rejects,
)
from data_prep.build.outcome import (
    all_rejects,
    check_documents,
    check_rejects,
    check_rows,
    make_manifest,
    no_documents,
    summary_lines,
)
from data_prep.build.plan import PrepConfig, parts_of, share_of, workers_of
from data_prep.build.progress import Progress, Report
from data_prep.build.work_folder import recipe_difference
from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.format.manifest import (
    REJECTS,
    SPLITS,
    TOKENIZER,
    Manifest,
    SourceFile,
    SplitName,
    save_manifest,
)
from data_prep.format.remote import fetch
from data_prep.format.tokenizer import (
    SpecialIds,
    control_ids,
    remarks,
    shared_tokenizer,
    special_ids,
    token_dtype,
    train_bpe,
)
from data_prep.sources import (
    Listing,
    Part,
    Source,
    TokenDocument,
    expand,
    find,
    holds_tokens,
    read_part,
    sha256_source,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["PrepConfig", "in_validation", "prep"]

_SAMPLE = 1  # seed of the tokenizer's training sample, not the default seed of the split


def prep(config: PrepConfig, report: Report = lambda line: None, listing: Listing | None = None) -> Manifest | None:
    """Write a data set and return its manifest.

    An existing data set of the same recipe and sources is kept. ``config.out`` appears once all of it is on disk.
    Finished parts of a prep that failed or was killed are kept beside it, and the same call continues from them. With
    ``config.part`` set, None is returned while other parts are missing.

    Args:
        config: inputs, output, recipe and processes.
        report: called with one line of text every few seconds.
        listing: the listed inputs, if they have been listed.

    Raises:
        DataError: inputs, tokenizer or output cannot be used; one line.
    """
    listing = find(config.inputs) if listing is None else listing
    sources = listing.sources
    for line in listing.lines():
        report(line)
    tokens = next((source for source in sources if holds_tokens(source)), None)
    if tokens is not None and config.bpe_size is not None:
        raise DataError(
            f"tokenizer={config.tokenizer}: {tokens.path} holds token ids; give the tokenizer.json they were made with"
        )
    place = destination(config.out, config.work)
    if place.exists():
        if not config.overwrite:
            manifest = place.load()
            difference = recipe_difference(manifest.recipe, config.recipe())
            if difference is None and not _same_sources(sources, manifest.sources):
                difference = "other sources"
            reuse(place, manifest, difference, report)
            return manifest
        place.check_replaceable()
    try:
        return _Prep(config, sources, place, report).run()
    except BaseException:
        place.release()
        raise


def reuse(place: Destination, manifest: Manifest, difference: str | None, report: Report) -> None:
    """Keep the data set that is there already.

    Raises:
        DataError: it differs from the one that is wanted, in ``difference``, or its shards are not whole.
    """
    if difference:
        raise DataError(f"{place.shown}: holds a data set with {difference}; choose another --out or pass --overwrite")
    place.check(manifest)
    report(f"{place.shown}: already there, same recipe and sources; nothing to do")
    place.tidy(manifest)


class _Prep:
    """One run of prep in its work folder."""

    def __init__(self, config: PrepConfig, sources: Sequence[Source], place: Destination, report: Report):
        self.config, self.sources, self.place, self.report = config, sources, place, report
        self.work = place.work
        self.parts = parts_of(sources)
        self.recipe = config.recipe()
        self.workers = workers_of(config)

    def run(self) -> Manifest | None:
        if self.config.part is None:
            with self.work.opened(self.recipe, self.config.overwrite):
                self._encode(self.parts)
                return self._finish()
        mine, of = share_of(self.config.part)
        with self.work.opened(self.recipe, self.config.overwrite, shared=True):
            try:
                self._encode(self.parts[mine::of])
            except _Published:
                return self.place.load()
            missing = sum(read_result(self.work.part(part)) is None for part in self.parts)
            if missing:
                self.report(f"share {mine} of {of}: done; {missing} of {len(self.parts)} parts are left to others")
                return None
            with self.work.exclusively("finish") as unfinished:
                return self._finish() if unfinished else self.place.load()

    def _encode(self, parts: Sequence[Part]) -> None:
        """Tokenize the parts that are not done yet; if one fails, the others are still done."""
        special = self.special
        dtype = token_dtype(special.vocab_size).str
        config = self.config
        jobs = [
            EncodeJob(
                part,
                self.work.part(part),
                self.work.tokenizer,
                tuple(sorted(control_ids(special))),
                special.mask,
                config.rows(special),
                dtype,
                config.fields,
                config.seed,
                config.validation_fraction,
                config.max_rejects,
            )
            for part in parts
            if read_result(self.work.part(part)) is None
        ]
        if len(jobs) < len(parts):
            self.report(f"continuing: {len(parts) - len(jobs)} of {len(parts)} parts are done already")
        progress = Progress(self.report, "tokenized", sum(job.part.weight for job in jobs))
        failed = []
        with pool.one_thread():
            for job, result in pool.run(encode_part, jobs, self.workers, progress.tick):
                if isinstance(result, DataError):
                    failed.append(result)
                    if len(failed) > 1:  # the first is the error
                        self.report(str(result))
                else:
                    progress.done(job.part.weight, sum(result.text_bytes.values()))
        if jobs:
            progress.line()
        if failed:
            kept = f"; {len(parts) - len(failed)} of {len(parts)} parts are done and kept; fix this and run again"
            more = f"; {len(failed) - 1} more failed" if len(failed) > 1 else ""
            raise DataError(f"{failed[0]}{more}{kept if len(parts) > len(failed) else ''}")

    def _finish(self) -> Manifest:
        """Cut the shards from the streams, write the manifest and publish."""
        special = self.special
        results = [self._result(part) for part in self.parts]
        check_rejects(self.config, results)
        self._check_sources()
        streams = {name: self._stream(name, special, results) for name in SPLITS}
        jobs = {
            name: shard_jobs(
                stream,
                self.config.rows_per_shard,
                folder=self.work.data / name,
                notes=self.work.notes,
                rows_per_member=self.config.rows_per_member,
                documents=self.config.documents,
                vocab_size=special.vocab_size,
                url=self.place.shard_folder(name),
            )
            for name, stream in streams.items()
        }
        try:
            check_documents(self.config, results)
            check_rows(self.config, jobs, results)
        except DataError:
            self.work.remove()  # the remedy changes options, which need other streams
            raise
        self.work.keep_shards_of(self.parts)
        self.work.sweep()
        every = [job for split_jobs in jobs.values() for job in split_jobs]
        build_shards(every, self.workers, self.report, self.place.make_room(every))
        data, rejects = self.work.data, all_rejects(results)
        with atomic_file(data / TOKENIZER) as temporary:
            shutil.copyfile(self.work.tokenizer, temporary)
        if rejects:
            write_text(data / REJECTS, rejects_text(rejects))
        digest = sha256_file(self.work.tokenizer)
        manifest = make_manifest(self.config, self.recipe, special, digest, self.parts, results, streams, jobs)
        save_manifest(manifest, data)
        self.place.publish(self.config.overwrite)
        self._summary(manifest)
        return manifest

    def _result(self, part: Part) -> Encoded:
        result = read_result(self.work.part(part))
        if result is None:
            raise DataError(f"{self.work.part(part)}: its streams are gone; run bd3 prep again")
        return result

    def _summary(self, manifest: Manifest) -> None:
        rows = ", ".join(f"{name} {split.rows}" for name, split in manifest.splits.items())
        if manifest.lost_characters:
            self.report(lost_line(manifest.lost_characters))
        for line in summary_lines(manifest):
            self.report(line)
        self.report(
            f"wrote {self.config.out}: rows of {manifest.length} tokens: {rows}; "
            f"validation unigram perplexity {manifest.validation_unigram_perplexity:.1f}"
        )

    def _stream(self, name: SplitName, special: SpecialIds, results: Sequence[Encoded]) -> Stream:
        segments = [Segment(self.work.part(part), 0, result.tokens[name]) for part, result in zip(self.parts, results)]
        return Stream(name, tuple(segments), self.config.rows(special), token_dtype(special.vocab_size).str)

    def _check_sources(self) -> None:
        for source in self.sources:
            if not source.remote and expand([source.path]) != [source]:
                raise DataError(f"{source.path}: changed while it was read; run again once it is complete")

    @cached_property
    def special(self) -> SpecialIds:
        """Ids of the tokenizer, which is trained or copied once for all processes that share the work."""
        path, size = self.work.tokenizer, self.config.bpe_size
        with self.work.exclusively("tokenizer") as unfinished:
            if not unfinished:
                out = self.work.out
                raise _Published(f"{out}: another task has written it meanwhile; run again to check it")
            self.place.claim()
            if not path.exists() and size is None:
                write_bytes(path, read_tokenizer(self.config.tokenizer, DataError).data)
            elif size is not None:
                self._train_once(size)
        config = self.config
        special = special_ids(shared_tokenizer(path), config.bos, config.eos, config.mask, config.pad)
        for line in remarks(config.tokenizer, special, config.mask) if size is None else ():
            self.report(line)
        return special

    def _train_once(self, size: int) -> None:
        """Train the tokenizer, or keep the one trained on the same inputs."""
        work = self.work
        if not work.tokenizer_is_of(self.parts):
            if work.tokenizer.exists():
                if self.config.part is not None:  # other tasks may be using it
                    raise DataError(
                        f"{work.folder}: has unfinished work with a tokenizer trained on other inputs; give every "
                        "share the same inputs, or remove the folder"
                    )
                self.report("the inputs have changed: training the tokenizer again")
            work.begin_tokenizer(self.parts)
        if not work.tokenizer.exists():
            write_text(work.tokenizer, self._train(size).to_str(pretty=True))

    def _train(self, size: int) -> Tokenizer:
        progress = Progress(self.report, "read for the tokenizer", sum(part.weight for part in self.parts))
        tokenizer = train_bpe(self._train_texts(progress), size)
        progress.line()
        entries = tokenizer.get_vocab_size()
        fewer = f" instead of {size}: the text has no more" if entries < size else ""
        self.report(f"trained a byte-level BPE of {entries} entries{fewer}")
        return tokenizer

    def _train_texts(self, progress: Progress) -> Iterator[str]:
        """Texts of the train split, or a sample of them.

        Raises:
            DataError: there is no document at all.
        """
        config, total = self.config, 0
        rejects: list[Reject] = []
        empty = True
        for part in self.parts:
            began = total
            with self._local(part.source) as path:
                for document in read_part(part, path, config.fields, self._rejects(part, rejects), lambda why: None):
                    empty = False
                    assert not isinstance(document, TokenDocument)  # prep() refuses them
                    total += len(document.text.encode())
                    progress.tick(total)
                    if in_validation(document.id, config.seed, config.validation_fraction):
                        continue
                    if config.tokenizer_sample == 1 or share(document.id, _SAMPLE) < config.tokenizer_sample:
                        yield document.text
            progress.done(part.weight, total - began)
        if empty:
            raise no_documents(config, rejects)

    def _rejects(self, part: Part, found: list[Reject]) -> Callable[[int, str], None]:
        """A callback that adds to ``found`` and raises DataError for more than ``max_rejects`` bad records."""

        def reject(offset: int, reason: str) -> None:
            found.append(Reject(source=part.source.name, offset=offset, reason=reason))
            if len(found) > self.config.max_rejects:
                raise too_many_rejects(len(found), found[0], self.config.max_rejects)

        return reject

    @contextmanager
    def _local(self, source: Source) -> Iterator[Path]:
        """Path of a source on this machine; a remote one is fetched and removed at the end of the block."""
        if not source.remote:
            yield Path(source.path)
            return
        path = self.work.folder / f"fetched-{unique_suffix()}"
        try:
            fetch(source.path, path, source.bytes)
            yield path
        finally:
            path.unlink(missing_ok=True)


class _Published(DataError):
    """Another task of the same work has written the data set, so its folder is gone."""


def _same_sources(sources: Sequence[Source], recorded: Sequence[SourceFile]) -> bool:
    """Compare the files with those of the data set: local ones by content, remote ones by size."""
    if [(source.name, source.bytes) for source in sources] != [(file.name, file.bytes) for file in recorded]:
        return False
    return all(s.remote or sha256_source(s, Path(s.path)) == file.sha256 for s, file in zip(sources, recorded))
