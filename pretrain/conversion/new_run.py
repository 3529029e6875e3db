"""Run folders that begin with weights from elsewhere: written tensor by tensor, without an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3_common.atomic import atomic_folder
from bd3_common.errors import ConfigError
from bd3_megatron.hf.files import shapes_of
from bd3_megatron.hf.origin import Origin, write_origin
from bd3_megatron.shards import as_stored
from pretrain.checkpoint import folder
from pretrain.checkpoint.index import write_index
from pretrain.checkpoint.tensor_file import ChunkEntry, write_chunks
from pretrain.config.resolve import save_config
from pretrain.config.schema import RunConfig
from pretrain.run_folder import layout
from pretrain.run_folder.identity import META_KEY, Identity, write_identity


@dataclass(frozen=True)
class Beginning:
    """A run folder to write.

    Attributes:
        weights: whole tensors by Megatron's names; read one at a time if they are lazy.
        parents: where they come from, as in :class:`pretrain.run_folder.identity.Identity`.
        step: of the checkpoint.
        meta: further metadata of the checkpoint.
        tokenizer: content of its ``tokenizer.json``; None: it has none.
    """

    config: RunConfig
    weights: Mapping[str, Tensor]
    parents: Sequence[str]
    step: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: bytes | None = None
    origin: Origin | None = None


def write_run(run: Path, begin: Beginning) -> None:
    """Write a run folder whose only checkpoint has the weights and nothing else; all of it or nothing.

    Raises:
        ConfigError: it cannot be written, or the weights cannot be read.
    """
    try:
        with atomic_folder(run.absolute()) as new:
            identity = Identity(parents=list(begin.parents))
            write_identity(new, identity)
            meta = {META_KEY: identity.id, "tokens": 0, "weights_only": True, **begin.meta}
            _write_checkpoint(folder.folder_of(new, begin.step), begin, meta)
            if begin.tokenizer is not None:
                (new / layout.TOKENIZER).write_bytes(begin.tokenizer)
            if begin.origin is not None:
                write_origin(new / layout.ORIGIN, begin.origin)
            save_config(begin.config, new / layout.CONFIG)
    except OSError as error:
        raise ConfigError(
            f"{run}: cannot be written ({error.strerror or error}); "
            "make room, check the rights, or choose another folder"
        ) from None


def _write_checkpoint(path: Path, begin: Beginning, meta: Mapping[str, Any]) -> None:
    gated = begin.config.model.traits.gated
    names = list(shapes_of(begin.weights))

    def stored() -> Iterator[Tensor]:
        for name in names:
            yield as_stored(name, begin.weights[name], gated).float().contiguous()

    chunks = []
    for name, shape in shapes_of(begin.weights).items():
        whole = tuple(as_stored(name, torch.empty(shape, device="meta"), gated).shape)
        chunks.append(ChunkEntry(f"weights/{name}", "F32", whole, (0,) * len(whole), whole))
    partial = path.with_name(layout.partial_checkpoint_name(begin.step, os.urandom(3).hex()))
    folder.start(partial)
    stamps = write_index(partial, [write_chunks(partial / layout.tensors_name(0), chunks, stored())])
    folder.publish(partial, path, meta, stamps)
