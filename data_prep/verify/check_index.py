"""Check of token tars of another program against the manifest and the index."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from data_prep.build import pool
from data_prep.build.index import describe, find_tars, tar_jobs
from data_prep.build.progress import Progress
from data_prep.build.token_tar import IndexConfig, IndexedTar, TarJob, index_tar
from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.format.manifest import MANIFEST, SPLITS, IndexedSplit, IndexRecipe
from data_prep.format.tokenizer import SpecialIds, token_dtype
from data_prep.verify.check import Check, SplitContent
from data_prep.verify.duplicates import row_hashes


class IndexCheck(Check):
    """Index every tar anew and compare. Other files beside the tars are ignored."""

    def _files(self) -> None:
        known = {source.name for source in self.manifest.sources}
        self._there, there = set[str](), set[str]()
        try:
            self._there = there = set(find_tars(self.folder))
        except DataError as error:
            self._fault(MANIFEST, str(error))
        for name in sorted(known - there):
            self._fault(name, "this shard is missing")
        for name in sorted(there - known):
            self._fault(name, "is not in the manifest; index the folder again with --overwrite, or remove it")
        for split in self.manifest.splits.values():
            if isinstance(split, IndexedSplit):
                try:
                    digest = sha256_file(self.folder / split.index)
                except OSError as error:
                    self._fault(split.index, f"cannot be read ({error.strerror})")
                    continue
                if digest != split.index_sha256:
                    self._fault(split.index, f"sha256 is {digest[:12]}, the manifest says {split.index_sha256[:12]}")

    def _numbers(self) -> None:
        if token_dtype(self.manifest.vocab_size).str != self.manifest.dtype:
            self._fault(MANIFEST, f"dtype={self.manifest.dtype}: not that of vocab_size={self.manifest.vocab_size}")

    def _walk(self, workers: int) -> NDArray[np.uint64]:
        manifest, recipe = self.manifest, self.manifest.recipe
        self.result.splits = {name: SplitContent() for name in SPLITS}
        kept = {
            name: getattr(recipe, name) for name in ("documents", "validation_fraction", "bos", "eos", "mask", "pad")
        }
        member = recipe.index_member if isinstance(recipe, IndexRecipe) else None
        config = IndexConfig(
            index=str(self.folder), length=manifest.length, seed=recipe.split_seed, member=member, **kept
        )
        special = SpecialIds(manifest.bos_id, manifest.eos_id, manifest.mask_id, manifest.vocab_size, manifest.pad_id)
        names = [source.name for source in manifest.sources]
        jobs = tar_jobs(self.folder, [name for name in names if name in self._there], config, special)
        size = sum(source.bytes for source in manifest.sources)
        progress = Progress(self.report, "checked", size)
        tars: dict[str, IndexedTar] = {}
        for job, found in pool.run(_walk_tar, jobs, workers, progress.tick, size):
            if isinstance(found, DataError):
                self._fault(job.name, str(found).removeprefix(f"{self.folder / job.name}: "))
            else:
                tars[job.name] = found
        progress.line()
        if len(tars) < len(names):
            return np.empty(0, np.uint64)
        return self._compare([tars[job.name] for job in jobs], config, special)

    def _compare(self, tars: list[IndexedTar], config: IndexConfig, special: SpecialIds) -> NDArray[np.uint64]:
        """Faults for what the manifest says otherwise; the hash of every row of all splits ``[n]``."""
        manifest, hashes = self.manifest, []
        for tar, source in zip(tars, manifest.sources):
            if tar.sha256 != source.sha256:
                self._fault(tar.name, f"sha256 is {tar.sha256[:12]}, the manifest says {source.sha256[:12]}")
        try:
            again, _ = describe(tars, config, special, manifest.tokenizer_sha256)
        except DataError as error:
            self._fault(MANIFEST, str(error))
            return np.empty(0, np.uint64)
        for name in SPLITS:
            stated, found = manifest.splits[name], again.splits[name]
            content = self.result.splits[name]
            content.rows, content.starts = found.rows, found.documents
            content.counts = np.sum([tar.counts[name] for tar in tars], axis=0)
            if manifest.recipe.documents:
                content.lengths = Counter(np.concatenate([tar.index[name][:, 2] for tar in tars]).tolist())
            same = stated.model_dump(exclude=_BY_ROUNDING) == found.model_dump(exclude=_BY_ROUNDING)
            content.whole = same
            if not same and not any(str(self.folder / tar.name) in self.result.faults for tar in tars):
                self._fault(MANIFEST, f"splits.{name}: not what its tars hold; index them again with --overwrite")
            hashes += [row_hashes(tar.rows[name].astype(manifest.dtype)) for tar in tars]
        return np.concatenate(hashes)


_BY_ROUNDING = {"unigram_entropy"}  # compared with a tolerance elsewhere


def _walk_tar(job: TarJob) -> IndexedTar:
    try:
        return index_tar(job, keep_rows=True)
    except OSError as error:
        raise DataError(f"{job.folder / job.name}: cannot be read ({error.strerror or error})") from None
