"""Check of a data set at a URL: shards are fetched one by one, so that few of them take room here at a time."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from bd3_common.schema import MAX_BYTES
from data_prep.build.progress import Report
from data_prep.errors import DataError
from data_prep.format.manifest import (
    INDEX_VERSION,
    MANIFEST,
    REJECTS,
    SPLITS,
    TOKENIZER,
    SplitName,
    parse_manifest,
    shard_path,
)
from data_prep.format.remote import fetch, read_remote, tree_remote
from data_prep.read.cache import ShardCache
from data_prep.read.reader import RowReader
from data_prep.verify.check import Check, Checked

CACHE_BYTES = 4 << 30
"""room for shards whose rows are compared or shown; at least four shards"""


def check_remote(url: str, workers: int | None, samples: int, seed: int, report: Report) -> Checked:
    """:func:`data_prep.verify.check.check` of a URL, through a temporary folder.

    Raises:
        DataError: there is no data set, or one of token tars.
    """
    where = f"{url}/{MANIFEST}"
    manifest = parse_manifest(read_remote(where), where)
    if manifest.version == INDEX_VERSION:
        raise DataError(f"{url}: an index of token tars; bd3 check reads these from a folder: copy it here first")
    with tempfile.TemporaryDirectory(prefix="bd3-check-") as folder:
        return _RemoteCheck(Path(folder), manifest, report, url).run(workers, samples, seed)


class _RemoteCheck(Check):
    """Check of one remote data set; what is missing there is missing in the temporary folder."""

    def _files(self) -> None:
        manifest, there = self.manifest, tree_remote(self._shown("").rstrip("/"))
        small = [TOKENIZER, *([REJECTS] if manifest.rejects else [])]
        shards = [shard_path(name, shard) for name, split in manifest.splits.items() for shard in split.shards]
        for name in there.keys() - {MANIFEST, *small, *shards}:
            self._fault(name, "does not belong to the data set; remove it")
        for name in SPLITS:
            (self.folder / name).mkdir()
        for name in small:
            with suppress(DataError):
                fetch(self._shown(name), self.folder / name, most=MAX_BYTES)

    def _reader(self, split: SplitName) -> RowReader:
        shards = [shard for split in self.manifest.splits.values() for shard in split.shards]
        limit = max(CACHE_BYTES, 4 * max(shard.bytes for shard in shards))
        return RowReader(self._shown("").rstrip("/"), split, ShardCache(self.folder / "cache", limit))
