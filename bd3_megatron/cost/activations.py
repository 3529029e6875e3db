"""Activations: bytes that one micro-batch keeps for its backward pass on one rank, by part, and temporary tensors.

The counts follow the operations of :mod:`bd3_megatron.layers.specs`, of the attention backend and of
:mod:`bd3_megatron.model` one by one, and equal the bytes of the distinct storages that autograd keeps. Those of CUDA
kernels have not been compared with a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from bd3_megatron.attention.backends import AttentionBackend, AttentionSizes, Demand, candidates
from bd3_megatron.attention.lengths import clean_multiple, clean_positions, skips_last_block, tile_size
from bd3_megatron.config import EngineConfig, Fp8Config, KernelConfig, ModelConfig, ParallelConfig
from bd3_megatron.cost.partition import Chunk, padded_rows, rows_per_chunk

_FP32, _INT64 = 4, 8


@dataclass(frozen=True)
class Rows:
    """The positions of one row that pass through the layers: K noisy draws of L, then a clean stream.

    Attributes:
        length: L.
        noisy: draws, K; 0 for the causal objective.
        clean: positions of the clean stream, 0 where there is none.
        block_size: B'.
        leaves_clean: True if the last layer computes only keys and values of the clean stream.
    """

    length: int
    noisy: int
    clean: int
    block_size: int
    leaves_clean: bool

    @property
    def positions(self) -> int:
        """Positions of all streams, N."""
        return self.noisy * self.length + self.clean

    @property
    def predicting(self) -> int:
        """Positions whose outputs are predictions."""
        return self.noisy * self.length or self.clean

    @property
    def after(self) -> int:
        """Positions that leave the last layer."""
        return self.predicting if self.leaves_clean else self.positions

    @classmethod
    def of(cls, config: EngineConfig, cuda: bool = False) -> Rows:
        """Rows of a configuration, as :func:`bd3_megatron.model.streams_of` has them."""
        model, diffusion, kernels, parallel = config.model, config.diffusion, config.kernels, config.parallel
        length, block = model.length, diffusion.block_size
        if diffusion.objective == "causal":
            return cls(length, 0, length, 1, False)
        multiple = clean_multiple(config.replace(fp8=Fp8Config()), cuda)
        clean = clean_positions(length, block, skips_last_block(kernels, parallel), multiple)
        return cls(length, diffusion.draws, clean, block, kernels.skip_last_clean_queries and clean > 0)


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch keeps until its backward pass, by part.

    Attributes:
        norms: inputs and normalized values of the norms, in fp32.
        linears: inputs of the matrices.
        attention: what the attention backend keeps: queries, keys, values, outputs, log-sum-exps, masks.
        mlp: tensors between the MLP's matrices.
        dropout: dropout masks.
        layer_inputs: inputs of layers, all that full recomputation keeps.
        head: the final norm, and the gradients that the head computes in its forward pass (or its logits).
        inputs: token ids, masks and rotary embeddings.
    """

    norms: float = 0
    linears: float = 0
    attention: float = 0
    mlp: float = 0
    dropout: float = 0
    layer_inputs: float = 0
    head: float = 0
    inputs: float = 0

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return dict(vars(self))

    def __add__(self, other: Activations) -> Activations:
        return Activations(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, times: float) -> Activations:
        return Activations(**{name: value * times for name, value in vars(self).items()})


@dataclass(frozen=True)
class Counter:
    """Counts for one configuration.

    Args:
        config: with ``model.vocab_size`` resolved.
        micro_batch: rows b of a micro-batch.
        masked_rate: fraction of noisy tokens that the head reads.
        cuda: on CUDA torch keeps no normalized values of RMSNorm and one byte per dropout bit.
        packed: attention stays inside documents, so every row has its own mask.
    """

    config: EngineConfig
    micro_batch: int
    masked_rate: float
    cuda: bool = False
    packed: bool = False

    @cached_property
    def rows(self) -> Rows:
        return Rows.of(self.config, self.cuda)

    @cached_property
    def _layers(self) -> dict[bool, Activations]:
        return {}

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def kernels(self) -> KernelConfig:
        return self.config.kernels

    @property
    def parallel(self) -> ParallelConfig:
        return self.config.parallel

    @property
    def size(self) -> int:
        """Bytes of an activation."""
        return self.config.optimization.element_bytes

    def chunk(self, chunk: Chunk) -> Activations:
        """Bytes that a model chunk keeps of one micro-batch."""
        total = Activations()
        for layer in range(chunk.first_layer, chunk.first_layer + chunk.layers):
            total += self.kept_of_layer(layer)
        if chunk.embedding:
            total += Activations(inputs=self._cells(self.rows.positions) * _INT64)
        if chunk.head:
            total += self.head()
        return total

    def peak(self, chunk: Chunk) -> float:
        """Peak of what autograd keeps of a chunk, bytes: at the end of the forward pass, or, with full recomputation,
        when the last layer has been recomputed and the head's part is freed."""
        kept = self.chunk(chunk)
        if self.parallel.recompute != "full":
            return kept.total
        layer_input = self._cells(self.rows.positions) * self._hidden * self.size
        # In fp32 what a layer keeps of its input is the checkpoint itself.
        shared = layer_input if self.size == _FP32 else 0
        last = chunk.first_layer + chunk.layers - 1
        again = self.layer(last).total
        if chunk.layers > 1:  # the layer before the last has more, if the last leaves queries out
            again = max(again, self.layer(last - 1).total - layer_input)
        return max(kept.total, kept.total - kept.head + again - shared)

    def kept_of_layer(self, layer: int) -> Activations:
        """Bytes that one layer keeps under the configured recomputation."""
        kept = self.parallel.recompute
        cells = self._cells(self.rows.positions)
        if kept == "full":
            return Activations(layer_inputs=cells * self._hidden * self.size)
        whole = self.layer(layer)
        if kept == "none":
            return whole
        return Activations(**whole.parts() | {"attention": self._query_key_value(layer) * self.size})

    def layer(self, layer: int) -> Activations:
        """Bytes that a layer keeps without recomputation, which are also those of one recomputed layer."""
        if (leaves := self._leaves(layer)) not in self._layers:  # all layers but the last are alike
            self._layers[leaves] = self._count(layer)
        return self._layers[leaves]

    def _count(self, layer: int) -> Activations:
        model, size, traits = self.model, self.size, self.model.traits
        cells, asking = self._cells(self.rows.positions), self._asking(layer)  # the same but in the last layer
        hidden, inner = self._hidden, model.ffn / self.parallel.tensor
        # LayerNorm keeps its input, mean and 1 / deviation; RMSNorm on CPU is several operations and keeps what it
        # has normalized too. In fp32 a norm's input is the residual stream itself.
        copies = self._norm_copies
        norms = (cells + asking) * (hidden * copies + self._share * self._norm_statistics) * _FP32
        if traits.qk_norm:
            norms += (self._query_key_inputs(layer) + asking * self._heads + cells * self._groups) * _FP32
            norms += (copies - 1) * (asking * self._query + cells * self._grouped) * _FP32
        linears = (cells * hidden + asking * (hidden + self._query + inner)) * size
        if self._leaves(layer):
            # Both projections read the gathered input, and copy their rows of the weight unless these are contiguous.
            linears += cells * (model.hidden - hidden) * size
            linears += self._fused * model.hidden * size if self._groups > 1 else 0
        mlp = asking * inner * (4 if traits.gated else 1) * size
        dropout = 2 * asking * hidden * (1 if self.cuda else size) if model.dropout else 0
        rope = 2 * (asking + cells) / self.micro_batch * model.width_per_head * size
        return Activations(norms, linears, self._attention(layer), mlp, dropout, inputs=rope)

    def head(self) -> Activations:
        """Final norm and head: gradients by rows and weight in place of logits, or without chunks the logits, which
        are kept once, as probabilities in fp32."""
        model, rows = self.model, self.head_rows
        columns = padded_rows(model.vocab_size, self.parallel.tensor) // self.parallel.tensor
        norm = rows * (model.hidden * self._norm_copies + self._norm_statistics) * _FP32
        found = norm + rows * (model.hidden * self.size + _INT64)
        if self._chunked:
            return Activations(head=found + columns * (model.hidden + model.traits.head_bias) * _FP32)
        return Activations(head=found + rows * (columns * _FP32 + _INT64 + _FP32))

    @property
    def head_rows(self) -> float:
        """Rows of a micro-batch that the head of one rank reads: those predicted, rounded up to 64ths of all."""
        everything = self._cells(self.rows.predicting)
        if not self.kernels.masked_rows_only:
            return self._cells(self.rows.after)
        rate = 1 - 1 / self.model.length if self.config.diffusion.objective == "causal" else self.masked_rate
        unit = 16 * math.ceil(everything / (64 * 16))
        return min(math.ceil(everything * rate / unit - 1e-9) * unit, everything)

    def working(self, chunk: Chunk) -> float:
        """Bytes alive beside what is kept, at the worst moment: in the head's forward or backward pass, or in that of
        the last layer's MLP, when the head's part is gone and the layer, under full recomputation, has been made
        again."""
        model, size, head = self.model, self.size, self.head().total if chunk.head else 0.0
        last = chunk.first_layer + chunk.layers - 1
        cells = self._asking(last)
        if self.parallel.recompute == "full" and chunk.layers > 1:
            cells = self._asking(last - 1)
        inner = model.ffn / self.parallel.tensor
        # Beside the gradient of its output, which takes the place of what the second matrix kept, a gated MLP makes
        # those of both factors; the residual stream's gradient is there three times.
        layer = cells * size * (inner * (2 if model.traits.gated else 1) + 3 * self._hidden)
        weight = 2 * inner * model.hidden * size  # one matrix's gradient, before it is added to the buffer
        again = self.peak(chunk) - self.chunk(chunk).total + head if self.parallel.recompute == "full" else 0.0
        return max(self._head_working() if chunk.head else 0.0, layer + weight + again - head)

    def _head_working(self) -> float:
        """Logits of one chunk, or of all rows in bf16 beside fp32; then the gradient of the head's weight, scaled."""
        model, size = self.model, self.size
        columns = padded_rows(model.vocab_size, self.parallel.tensor) // self.parallel.tensor
        rows, weight = self.head_rows, columns * model.hidden
        lower = size if size < _FP32 else 0
        if not self._chunked:
            return rows * columns * lower + weight * size
        chunk = min(rows, rows_per_chunk(columns, self.cuda))
        forward = chunk * columns * (_FP32 + lower) + weight * lower
        hidden = (
            2 * self._cells(self.rows.after) * model.hidden * size
        )  # the last layer's output, and its rows in order
        return hidden + max(forward, weight * (_FP32 + lower) + rows * model.hidden * size)

    def in_mlp(self, cells: float | None = None) -> list[float]:
        """Bytes of the tensors between the matrices of an MLP's forward pass; ``cells`` are those of all streams."""
        cells = self._cells(self.rows.positions) if cells is None else cells
        inner = cells * self.model.ffn / self.parallel.tensor * self.size
        return [2 * inner, inner, inner, inner] if self.model.traits.gated else [inner] * 2

    def evaluating(self, chunk: Chunk) -> list[list[float]]:
        """Bytes of the tensors alive in a forward pass that keeps nothing, at three moments: in attention, in an MLP,
        and in the head, if the chunk has it."""
        model, size, rows = self.model, self.size, self.rows
        cells = max(self._asking(n) for n in range(chunk.first_layer, chunk.first_layer + chunk.layers))
        stream = cells * self._hidden * size  # the residual stream, or a branch before or after its norm
        # The projection, queries and keys after the rotary embedding, the output; contiguous clean keys and values,
        # queries and output of one tile.
        query, key = cells * self._query * size, cells * self._grouped * size
        tile = min(tile_size(rows.length, rows.block_size), rows.length)
        keys = self._cells(rows.clean or rows.length) * self._grouped * size
        asking = self._cells((rows.noisy + 1) * tile) * self._query * size
        attention = [*[stream] * 3, cells * self._fused * size, query, key, query, keys, keys, asking, asking]
        layer = [attention, [stream] * 4 + self.in_mlp(cells)]
        if not chunk.head:
            return layer
        columns = padded_rows(model.vocab_size, self.parallel.tensor) // self.parallel.tensor
        rows = self.head_rows
        chunk_rows = min(rows, rows_per_chunk(columns, self.cuda)) if self._chunked else rows
        lower = [chunk_rows * columns * size] if size < _FP32 else []
        hidden = [self._cells(self.rows.after) * model.hidden * size] * 2 + [rows * model.hidden * size] * 2
        return [*layer, [*hidden, chunk_rows * columns * _FP32, *lower]]

    # ---- sizes of one rank ----

    def _cells(self, positions: float) -> float:
        return positions / self.parallel.context * self.micro_batch

    def _leaves(self, layer: int) -> bool:
        """True if the layer is the last one and computes no queries of the clean stream."""
        return self.rows.leaves_clean and layer == self.model.layers - 1

    def _asking(self, layer: int) -> float:
        """Positions that have queries and go through the MLP."""
        return self._cells(self.rows.after if self._leaves(layer) else self.rows.positions)

    @property
    def _norm_copies(self) -> int:
        """Times that a norm keeps its input: torch's RMSNorm on CPU also keeps what it has normalized."""
        return 2 if self.model.traits.norm == "RMSNorm" and not self.cuda else 1

    @property
    def _norm_statistics(self) -> int:
        """Numbers per position that a norm keeps: LayerNorm mean and 1 / deviation, RMSNorm 1 / root mean square."""
        return 2 if self.model.traits.norm == "LayerNorm" else 1

    @property
    def _chunked(self) -> bool:
        return self.kernels.chunked_cross_entropy and self.kernels.masked_rows_only

    def _query_key_inputs(self, layer: int) -> float:
        """Elements that the norms of queries and keys keep as their inputs.

        In bf16 they are fp32 copies. In fp32 the key is a view of the projection, which so stays whole; the query is a
        copy of its part, a view where there is one group, and in the last layer it has a projection of its own.
        """
        cells, asking = self._cells(self.rows.positions), self._asking(layer)
        if self.size < _FP32:
            return asking * self._query + cells * self._grouped
        if self._leaves(layer):
            return asking * self._query + cells * 2 * self._grouped
        return cells * (self._fused + (self._query if self._groups > 1 else 0))

    @property
    def _share(self) -> float:
        """Part of the positions that a rank holds between tensor-parallel parts."""
        return 1 / self.parallel.tensor if self.parallel.sequence else 1

    @property
    def _hidden(self) -> float:
        return self.model.hidden * self._share

    @property
    def _heads(self) -> float:
        return self.model.heads / self.parallel.tensor

    @property
    def _groups(self) -> float:
        return self.model.groups / self.parallel.tensor

    @property
    def _query(self) -> float:
        return self._heads * self.model.width_per_head

    @property
    def _grouped(self) -> float:
        return self._groups * self.model.width_per_head

    @property
    def _fused(self) -> float:
        return self._query + 2 * self._grouped

    def _query_key_value(self, layer: int) -> float:
        """Elements of query and key after the rotary embedding, and of the value, which is a view of the projection
        that it comes from (and that the norms of queries and keys keep in fp32)."""
        cells = self._cells(self.rows.positions)
        kept = self._asking(layer) * self._query + cells * self._grouped
        if not self.model.traits.qk_norm or self.size < _FP32:
            kept += cells * (2 * self._grouped if self._leaves(layer) else self._fused)
        return kept

    def _attention(self, layer: int) -> float:
        """Bytes that the attention backend keeps."""
        rows = self.rows
        sizes = AttentionSizes(
            length=rows.length,
            block_size=rows.block_size,
            noisy=rows.noisy,
            clean=rows.clean,
            clean_queries=not self._leaves(layer),
            micro_batch=self.micro_batch,
            context=self.parallel.context,
            heads=self._heads,
            groups=self._groups,
            head_dim=self.model.width_per_head,
            element=self.size,
            inputs=self._query_key_value(layer),
            cuda=self.cuda,
            packed=self.packed,
        )
        return self.backend.activation_bytes(sizes)

    @property
    def backend(self) -> type[AttentionBackend]:
        """The attention backend that is counted: under ``auto`` the first one that the configuration allows."""
        demand, device = Demand.of(self.config), "cuda" if self.cuda else "cpu"
        backends = candidates(self.kernels.attention, device)
        return next((cls for cls in backends if cls.unsupported_reason(demand) is None), backends[0])
