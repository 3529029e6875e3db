"""Chunks of tensors in torch's distributed checkpoints: planners for :class:`bd3_megatron.shards.ShardedTensor`.

Every rank writes and reads chunks of whole tensors, so a checkpoint does not depend on the layout that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, LoadPlan, Metadata, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from bd3_megatron.shards import ShardedTensor

State = Mapping[str, ShardedTensor]


def _by_index(state: State) -> dict[MetadataIndex, Tensor]:
    """Chunks of a sharded state dict by (name, offsets)."""
    return {
        MetadataIndex(name, chunk.offsets): chunk.data for name, sharded in state.items() for chunk in sharded.chunks
    }


class SaveChunks(DefaultSavePlanner):
    """Save planner: one of the ranks that have a chunk writes it."""

    def set_up_planner(self, state_dict: State, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.is_coordinator, self.mappings = dict(state_dict), is_coordinator, {}
        self._chunks = _by_index(state_dict)

    def create_local_plan(self) -> SavePlan:
        items = []
        for index, data in self._chunks.items():
            sharded = self.state_dict[index.fqn]
            if not sharded.duplicate:
                chunk = ChunkStorageMetadata(torch.Size(index.offset), data.size())
                properties = TensorProperties.create_from_tensor(data)
                description = TensorWriteData(chunk, properties, torch.Size(sharded.shape))
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=description))
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._chunks[index]


class LoadChunks(DefaultLoadPlanner):
    """Load planner: a chunk is filled from all chunks of the checkpoint that overlap it."""

    def set_up_planner(self, state_dict: State, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = dict(state_dict), metadata, is_coordinator
        self._chunks = _by_index(state_dict)

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, sharded in self.state_dict.items():
            chunks = [ChunkStorageMetadata(torch.Size(p.offsets), p.data.size()) for p in sharded.chunks]
            items += create_read_items_for_chunk_list(name, self.metadata.state_dict_metadata[name], chunks)
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        chunk = self._chunks[MetadataIndex(read_item.dest_index.fqn, read_item.dest_index.offset)]
        return chunk[tuple(slice(o, o + n) for o, n in zip(read_item.dest_offsets, read_item.lengths))]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the tensor was a view of the chunk."""
