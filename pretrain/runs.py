"""A run folder: its configuration, its data and its checkpoints, as the commands after training need them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bd3_megatron import parallel
from bd3_megatron.config import ConfigError, ModelConfig, ParallelConfig
from bd3_megatron.engine.megatron import MegatronEngine
from bd3_megatron.hf.mapping import check_shapes, entries
from data_prep.cache import ShardCache, default_folder
from data_prep.manifest import Manifest, SplitName
from data_prep.reader import RowReader
from data_prep.remote import is_remote
from data_prep.stream import RowStream
from pretrain import checkpoint
from pretrain.config import DataConfig, RunConfig
from pretrain.load import load_saved

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"


def resolve_model(model: ModelConfig, manifest: Manifest, path: str) -> ModelConfig:
    """Fill what the data set decides (vocabulary, special ids) and check what both state.

    Raises:
        ConfigError: model and data set disagree.
    """
    if model.length != manifest.length:
        raise ConfigError(
            f"model.length={model.length}: the rows of {path} have {manifest.length} tokens; "
            f"use model.length={manifest.length}, or run bd3 prep with --length {model.length}"
        )
    decided = {}
    for name in ("vocab_size", "mask_id", "bos_id", "eos_id"):
        stated, there = getattr(model, name), getattr(manifest, name)
        if stated is not None and stated != there and name != "vocab_size":
            raise ConfigError(f"model.{name}={stated}: {path} has {there}; leave model.{name} null to follow the data")
        if name == "vocab_size" and stated is not None and stated < there:
            raise ConfigError(
                f"model.vocab_size={stated}: {path} has {there} ids; use {there} or more, or leave it null"
            )
        decided[name] = there if stated is None else stated
    return ModelConfig(**model.model_dump() | decided)


def check_documents(stream: RowStream, asked: str) -> None:
    """Check that the data sets say where documents start.

    Raises:
        ConfigError: one does not; ``asked`` is the option that needs it.
    """
    for reader in stream.readers:
        if not reader.manifest.recipe.documents:
            raise ConfigError(
                f"{asked}: {reader.folder} was written without document starts; run bd3 prep with --documents"
            )


def data_identity(*manifests: Manifest) -> str:
    """Digest of what the rows and the tokenizer are, of all data sets of a mix, wherever they lie."""
    digest = hashlib.sha256(manifests[0].tokenizer_sha256.encode())
    for number, manifest in enumerate(manifests):
        if number:
            digest.update(b"next data set")
        for split in manifest.splits.values():
            for shard in split.shards:
                digest.update(shard.sha256.encode())
    return digest.hexdigest()


def open_stream(data: DataConfig, split: SplitName, model: ModelConfig, seed: int = 0) -> RowStream:
    """A split of the configured data sets, checked against each other and the model; ``seed`` is of the order.

    Raises:
        ConfigError: no data set is named, or one does not fit the model.
        DataError: no data set there, damaged shards, data sets that do not go together, or no cache for remote ones.
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

    A flipped bit or another tokenizer would train on without a word; shards of URLs are checked as they come.

    Raises:
        DataError: names the file that differs.
    """
    for reader in stream.readers:
        if reader.remote:
            continue
        if reader.bytes > verify_gb * 1e9 * size:
            if rank == 0:
                print(
                    f"{reader.folder}: the {reader.split} split has {reader.bytes / 1e9:.1f} GB and is not verified "
                    f"(data.verify_gb={verify_gb:g} for each of {size} ranks); bd3 check does it",
                    file=sys.stderr,
                    flush=True,
                )
            continue
        reader.verify(rank, size)


@dataclass
class LoadedRun:
    """A run's configuration and one checkpoint's weights."""

    config: RunConfig
    checkpoint: checkpoint.Checkpoint
    weights: dict[str, Tensor]

    @contextmanager
    def engine(self) -> Iterator[MegatronEngine]:
        """The model with these weights, ready to evaluate or sample, in a world of 1 that ends with the context."""
        config, alone = self.config, ParallelConfig()
        # Another machine than the one trained on may have no GPU. FP8 is for training: here it is bf16.
        other = {"layers": "auto"} | ({"attention": "auto"} if config.kernels.attention in ("flash", "flex") else {})
        kernels = config.kernels.model_copy(update=other)
        world = parallel.start(alone)
        try:
            engine = MegatronEngine(config.model, config.diffusion, kernels, alone, config.train, world, training=False)
            engine.set_weights(self.weights)
            yield engine
        finally:
            parallel.stop()


def load(run: Path, step: int | None = None, averaged: bool = True) -> LoadedRun:
    """Read a run folder.

    Raises:
        ConfigError: not a run folder, no such checkpoint, or one of another model than the configuration's.
    """
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run}: not a run folder ({CONFIG} is missing); give the folder that bd3 pretrain wrote")
    config = load_saved(run / CONFIG)
    found = checkpoint.find(run, step)
    if config.model.mask_id is None:
        raise ConfigError(f"{run / CONFIG}: model.mask_id=null: set it to the id the model was trained with")
    weights = checkpoint.read_weights(found, averaged)
    try:
        check_shapes(weights, {entry.megatron: entry.shape for entry in entries(config.model)})
    except ConfigError as error:
        raise ConfigError(f"{run / CONFIG}: {error}") from None
    return LoadedRun(config, found, weights)
