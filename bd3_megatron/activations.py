"""What one micro-batch keeps for its backward pass on one rank, by part, and what is alive beside it for a moment.

The counts follow the operations of :mod:`bd3_megatron.layers`, :mod:`bd3_megatron.attention.chunked` and
:mod:`bd3_megatron.model` one by one, and equal the bytes of the distinct storages that autograd holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from bd3_megatron.config import DiffusionConfig, ModelConfig, ParallelConfig
from bd3_megatron.partition import Chunk, padded_rows

_FP32, _INT64 = 4, 8


@dataclass(frozen=True)
class Rows:
    """The positions of one row that pass through a layer: K noisy draws of L and a clean stream.

    Attributes:
        length: L.
        noisy: draws, K; 0 for the causal objective.
        clean: positions of the clean stream, 0 where there is none.
        block_size: B'.
    """

    length: int
    noisy: int
    clean: int
    block_size: int

    @property
    def positions(self) -> int:
        return self.noisy * self.length + self.clean

    @property
    def predicting(self) -> int:
        """Positions whose outputs are predictions."""
        return self.noisy * self.length or self.clean

    @classmethod
    def of(cls, model: ModelConfig, diffusion: DiffusionConfig, parallel: ParallelConfig) -> Rows:
        """Of a configuration."""
        length, block = model.length, diffusion.block_size
        if diffusion.objective == "causal":
            return cls(length, 0, length, 1)
        return cls(length, diffusion.draws, length if block < length else 0, block)


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch keeps until its backward pass, by part.

    Attributes:
        norms: inputs and normalized values of the norms, in fp32.
        linears: inputs of the matrices.
        attention: queries, keys, values and outputs of all tiles, with masks and log-sum-exps.
        mlp: what lies between the MLP's matrices.
        dropout: its masks.
        layer_inputs: all that full recomputation keeps of a layer.
        head: rows that the head reads, and logits.
        inputs: token ids, and what masks and rotary embeddings need.
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
        micro_batch: rows b of a micro-batch.
        size: bytes of an activation, 2 or 4.
        masked_rate: fraction of noisy tokens that the head reads.
        cuda: on CUDA torch keeps no normalized values of RMSNorm and one byte per dropout bit.
    """

    model: ModelConfig
    diffusion: DiffusionConfig
    parallel: ParallelConfig
    micro_batch: int
    size: int
    masked_rate: float
    cuda: bool = False

    @property
    def rows(self) -> Rows:
        return Rows.of(self.model, self.diffusion, self.parallel)

    def chunk(self, chunk: Chunk) -> Activations:
        """What a model chunk keeps of one micro-batch."""
        total = Activations()
        for layer in range(chunk.first_layer, chunk.first_layer + chunk.layers):
            total += self.kept_of_layer(layer)
        if chunk.embedding:
            ids = self.rows.positions / self.parallel.context * self.micro_batch * _INT64
            total += Activations(inputs=ids)
        if chunk.head:
            total += self.head()
        return total

    def peak(self, chunk: Chunk) -> float:
        """Most that autograd holds of a chunk at one time: at the end of the forward pass, or when full recomputation
        has made the last layer again and the head's part is gone."""
        kept = self.chunk(chunk)
        if self.parallel.recompute != "full":
            return kept.total
        # In fp32 what the layer keeps of its input is the checkpoint itself.
        shared = self._cells(self.rows.positions) * self._hidden * _FP32 if self.size == _FP32 else 0
        again = kept.total - kept.head + self.layer(chunk.first_layer + chunk.layers - 1).total - shared
        return max(kept.total, again)

    def kept_of_layer(self, layer: int) -> Activations:
        """Of one layer under the configured recomputation."""
        kept = self.parallel.recompute
        if kept == "full":
            return Activations(layer_inputs=self._cells(self.rows.positions) * self._hidden * self.size)
        whole = self.layer(layer)
        if kept == "none":
            return whole
        # Query and key after the rotary embedding, and the value as a view of the fused projection.
        width = self._query + self._grouped
        if self.model.backbone == "dit" or self.size < _FP32:
            width += self._fused
        cells = self._cells(self.rows.positions)
        return Activations(**whole.parts() | {"attention": cells * width * self.size})

    def layer(self, layer: int) -> Activations:
        """What a layer keeps without recomputation (also what recomputation makes again, one layer at a time)."""
        model, size = self.model, self.size
        cells = self._cells(self.rows.positions)
        dit = model.backbone == "dit"
        hidden = self._hidden
        # LayerNorm keeps its input, mean and 1 / deviation; RMSNorm on CPU is several operations and keeps what it
        # has normalized too. In fp32 a norm's input is the residual stream itself.
        normalized = 0 if dit or self.cuda else 1
        norms = 2 * cells * (hidden * (1 + normalized) + self._share * (2 if dit else 1)) * _FP32
        if not dit:
            query, grouped = self._query, self._grouped
            width = (query + grouped) * (1 + normalized)
            if size == _FP32:
                # The key is a view of the fused projection, which so stays whole; the query is a copy of its part
                # unless there is one group.
                width += self._fused - grouped - (query if self._groups == 1 else 0)
            norms += cells * (width + self._heads + self._groups) * _FP32
        linears = cells * (2 * hidden + self._query) * size
        inner = model.ffn / self.parallel.tensor
        linears += cells * inner * size
        mlp = cells * inner * (1 if dit else 4) * size
        bit = 1 if self.cuda else size
        dropout = 2 * cells * hidden * bit if model.dropout else 0
        rope = 4 * self.rows.length / self.parallel.context * model.width_per_head * size
        return Activations(norms, linears, self._attention(), mlp, dropout, inputs=rope)

    def head(self) -> Activations:
        """Final norm, head and cross-entropy of the masked rows: logits are kept once, as probabilities in fp32."""
        model, rows = self.model, self.masked_rows
        dit = model.backbone == "dit"
        normalized = 0 if dit or self.cuda else 1
        norm = rows * (model.hidden * (1 + normalized) + (2 if dit else 1)) * _FP32
        vocabulary = padded_rows(model.vocab_size, self.parallel.tensor) // self.parallel.tensor
        logits = rows * vocabulary * _FP32
        labels = rows * (_INT64 + 1 + _FP32)
        return Activations(head=norm + rows * model.hidden * self.size + logits + labels)

    @property
    def masked_rows(self) -> float:
        """Rows of a micro-batch that the head of one rank reads."""
        rate = 1 - 1 / self.model.length if self.diffusion.objective == "causal" else self.masked_rate
        return self.rows.predicting / self.parallel.context * self.micro_batch * rate

    def working(self, chunk: Chunk) -> float:
        """Bytes alive beside what is kept, at the worst moment: in the head's backward pass, or in that of the last
        layer's MLP, when the head's part is gone and the layer, under full recomputation, has been made again."""
        model, size, head = self.model, self.size, self.head().total if chunk.head else 0.0
        whole = self._cells(self.rows.positions) * size  # linear layers see all positions under sequence parallelism
        inner = model.ffn / self.parallel.tensor
        # Beside the gradient of its output, which takes the place of what the second matrix kept, a gated MLP makes
        # those of both factors; the residual stream's gradient is there three times.
        layer = whole * (inner * (1 if model.backbone == "dit" else 2) + 3 * self._hidden)
        weight = 2 * inner * model.hidden * size  # one matrix's gradient, before it is added to the buffer
        again = self.peak(chunk) - self.chunk(chunk).total + head if self.parallel.recompute == "full" else 0.0
        return max(self._head_working() if chunk.head else 0.0, layer + weight + again - head)

    def _head_working(self) -> float:
        """Logits in bf16 beside those in fp32, and the gradient of the head's weight."""
        vocabulary = padded_rows(self.model.vocab_size, self.parallel.tensor) // self.parallel.tensor
        copy = self.masked_rows * vocabulary * self.size if self.size < _FP32 else 0.0
        return copy + vocabulary * self.model.hidden * self.size

    # ---- sizes of one rank ----

    def _cells(self, positions: float) -> float:
        return positions / self.parallel.context * self.micro_batch

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

    def _attention(self) -> float:
        """Of the chunked backend: every tile of queries has its own copy of the clean keys and values before it."""
        rows, size = self.rows, self.size
        tile = tile_positions(rows.length, rows.block_size)
        chunk = rows.length // (2 * self.parallel.context) if self.parallel.context > 1 else rows.length
        tile = min(tile, chunk)
        tile -= tile % rows.block_size if tile > rows.block_size else 0
        held = (0,) if self.parallel.context == 1 else (0, 2 * self.parallel.context - 1)  # the first rank's chunks
        queries = keys = masks = 0.0
        for number in held:
            for at in range(0, chunk, tile):
                start, count = number * chunk + at, min(tile, chunk - at)
                past = start if rows.clean else 0
                streams = rows.noisy + (1 if rows.clean else 0)
                queries += streams * count
                if tile == rows.block_size:
                    keys += streams * (past + count)
                else:
                    keys += past + streams * count
                    repeats = self.model.heads // self.model.groups
                    masks += streams * repeats * count * (past + streams * count) * size
        rows_of_batch = self.micro_batch
        outputs = 2 * queries * self._query * size + queries * self._heads * _FP32
        return rows_of_batch * (outputs + 2 * keys * self._grouped * size) + masks


def tile_positions(length: int, block_size: int) -> int:
    """Positions of one tile, as :func:`bd3_megatron.attention.chunked.tile_size` has it."""
    target = 64 if length <= 512 else 128
    return block_size * max(1, target // block_size)
