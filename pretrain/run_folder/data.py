"""Data sets of a run: opened, verified, and checked against each other and the model."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

from bd3_common.errors import ConfigError
from bd3_megatron import parallel
from bd3_megatron.config import ModelConfig
from data_prep.format.manifest import IndexedSplit, Manifest, Split, SplitName
from data_prep.format.remote import is_remote
from data_prep.read.cache import ShardCache, default_folder
from data_prep.read.reader import RowReader
from data_prep.read.stream import RowStream
from pretrain.config.data_fit import resolve_model
from pretrain.config.schema import DataConfig, RunConfig

_LOG = logging.getLogger(__name__)


def open_data(config: RunConfig, world: parallel.World) -> tuple[RunConfig, RowStream, RowStream]:
    """Open and verify both splits; returns them after the configuration completed from the data sets.

    Each rank verifies its share of the shards.
    """
    stream, validation = (
        open_stream(config.data, split, config.model, order_seed(config)) for split in ("train", "validation")
    )
    for opened in (stream, validation):
        verify(opened, config.data.verify_gb, world.rank, world.size)
    model = resolve_model(config.model, stream.manifests[0], next(iter(config.data.weights())))
    return config.model_copy(update={"model": model}), stream, validation


def check_documents(stream: RowStream, option: str) -> None:
    """Check that the data sets have document starts.

    Raises:
        ConfigError: one has none; ``option`` needs them.
    """
    for reader in stream.readers:
        if not reader.manifest.recipe.documents:
            raise ConfigError(
                f"{option}: {reader.folder} was written without document starts; run bd3 prep with --documents"
            )


def data_identity(*manifests: Manifest) -> str:
    """Digest of what decides the rows of all data sets of a mix, in order; it does not depend on their paths.

    It covers the tokenizer, vocabulary, special ids, length and type, and of every shard its name, content, rows and
    the places of the rows in it. ``2:`` in front tells it from digests of version 1 (:func:`same_data`).
    """
    parts = [
        {
            "tokenizer": manifest.tokenizer_sha256,
            "ids": [manifest.vocab_size, manifest.mask_id, manifest.bos_id, manifest.eos_id],
            "rows": [manifest.length, manifest.dtype],
            "splits": {name: _split_identity(split) for name, split in sorted(manifest.splits.items())},
        }
        for manifest in manifests
    ]
    return "2:" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _split_identity(split: Split) -> list[Any]:
    index = split.index_sha256 if isinstance(split, IndexedSplit) else None
    return [index, *(shard.model_dump(mode="json") for shard in split.shards)]


def same_data(recorded: str, *manifests: Manifest) -> bool:
    """True if a checkpoint that recorded this identity was trained on these data sets.

    Checkpoints of earlier versions recorded a digest of the tokenizer and the shards' content alone.
    """
    return recorded == (data_identity(*manifests) if recorded.startswith("2:") else _identity_1(*manifests))


def _identity_1(*manifests: Manifest) -> str:
    digest = hashlib.sha256(manifests[0].tokenizer_sha256.encode())
    for number, manifest in enumerate(manifests):
        if number:
            digest.update(b"next data set")
        for split in manifest.splits.values():
            for shard in split.shards:
                digest.update(shard.sha256.encode())
    return digest.hexdigest()


def open_stream(data: DataConfig, split: SplitName, model: ModelConfig, seed: int = 0) -> RowStream:
    """Open a split of the configured data sets, checked against each other and the model.

    Args:
        seed: of the order of rows.

    Raises:
        ConfigError: no data set is named, or one does not fit the model.
        DataError: no data set, damaged shards, data sets that do not fit each other, or no cache for remote ones.
    """
    weights = data.weights()
    if not weights:
        raise ConfigError("data.path: not set; give the folder that bd3 prep wrote with --data.path (bd3 eval: --data)")
    cache = None
    if any(map(is_remote, weights)):
        cache = ShardCache(data.cache or default_folder(), round(data.cache_gb * 1e9))
    readers = [RowReader(path, split, cache if is_remote(path) else None) for path in weights]
    for path, reader in zip(weights, readers):
        resolve_model(model, reader.manifest, path)
    stream = RowStream(readers, list(weights.values()), seed, data.order, data.lanes)
    if data.document_mask:
        check_documents(stream, "data.document_mask=true")
    return stream


def verify(stream: RowStream, verify_gb: float, rank: int = 0, size: int = 1) -> None:
    """Compare this rank's share of the local shards with their sha256, unless it is more than ``verify_gb``.

    Nothing else would notice a flipped bit or another tokenizer. Shards of URLs are checked when they are fetched.

    Raises:
        DataError: names the file that differs.
    """
    for reader in stream.readers:
        if reader.remote:
            continue
        if reader.bytes > verify_gb * 1e9 * size:
            if rank == 0:
                _LOG.warning(
                    f"{reader.folder}: the {reader.split} split has {reader.bytes / 1e9:.1f} GB and is not verified "
                    f"(data.verify_gb={verify_gb:g} for each of {size} ranks); bd3 check does it"
                )
            continue
        reader.verify(rank, size)


def order_seed(config: RunConfig) -> int:
    """Seed of the order of rows: ``data.seed``, or the run's."""
    return config.train.seed if config.data.seed is None else config.data.seed
