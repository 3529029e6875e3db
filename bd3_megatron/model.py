"""The block diffusion language model, composed from Megatron-core parts."""

from __future__ import annotations

import copy
import hashlib
import math

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from bd3_megatron import cpu_compat
from bd3_megatron.attention.backends import choose
from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.lengths import clean_multiple, skips_last_block
from bd3_megatron.attention.mask import Streams
from bd3_megatron.backbones import EMBEDDING
from bd3_megatron.config import EngineConfig, ModelConfig
from bd3_megatron.cost.partition import padded_rows
from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.diffusion.block_statistics import BlockStatistics
from bd3_megatron.layers import transformer_engine as te
from bd3_megatron.layers.head import VocabularyShard, cross_entropy, linear_cross_entropy
from bd3_megatron.layers.rotary import scaled
from bd3_megatron.layers.specs import Norm, layer_spec, transformer_config
from bd3_megatron.shards import global_shape, local_shard

_NORM_BEFORE = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "pre_mlp_layernorm"}


class BlockDiffusionModel(LanguageModule):
    """Transformer over stacked streams with a SUBS head (arXiv 2503.09573).

    One instance is a pipeline stage or a model chunk of it. The first has the embedding, the last the final norm and
    the head.

    Args:
        config: with ``model.vocab_size`` and ``model.mask_id`` resolved.
        pre_process, post_process: True on the first stage, on the last.
        chunk: number of this chunk on its stage under the interleaved schedule, else None.
        megatron: :func:`bd3_megatron.layers.specs.transformer_config` of ``config``; made here if None.

    Raises:
        ConfigError: the attention backend that was asked for cannot do this here.
    """

    def __init__(
        self,
        config: EngineConfig,
        pre_process: bool = True,
        post_process: bool = True,
        chunk: int | None = None,
        megatron: TransformerConfig | None = None,
    ):
        model, kernels, parallel = config.model, config.kernels, config.parallel
        megatron = megatron or transformer_config(config)
        super().__init__(megatron)  # self.config
        self.vp_stage = chunk  # Megatron's name for it
        self.model, self.kernels = model, kernels
        self.streams = streams_of(config)
        self.pre_process, self.post_process = pre_process, post_process
        self.statistics: BlockStatistics | None = None  # collects those of training steps, on the last stage
        self.model_type = ModelType.encoder_or_decoder  # read by Megatron's schedules
        self.share_embeddings_and_output_weights = model.tie_embeddings
        self.vocab_size = padded_rows(model.vocab_size, parallel.tensor)

        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=_without_dropout(megatron),
                vocab_size=self.vocab_size,
                max_sequence_length=model.length,
                position_embedding_type="rope",
            )
        self.rotary = RotaryEmbedding(
            kv_channels=model.width_per_head,
            rotary_percent=1.0,
            rotary_base=model.rope_theta,
            use_cpu_initialization=megatron.use_cpu_initialization,
        )
        self.rotary.inv_freq = scaled(self.rotary.inv_freq, model.rope_scaling)
        self.context = ContextShard.of_this_rank(model.length)
        width, dtype, device = model.width_per_head, megatron.params_dtype, cpu_compat.device()
        backend = choose(kernels.attention, self.streams, self.context, head_dim=width, dtype=dtype, device=device)
        specs = [layer_spec(model, kernels, backend)] * get_num_layers_to_build(megatron, chunk)
        if post_process and kernels.skip_last_clean_queries and self.streams.noisy and self.streams.clean:
            specs[-1] = layer_spec(model, kernels, backend, last=True)
        layers = TransformerBlockSubmodules(layer_specs=specs)
        # The final norm runs on the rows that the head reads, so it lies here and not in the block.
        self.decoder = TransformerBlock(
            megatron, layers, post_layer_norm=False, pre_process=pre_process, post_process=post_process, vp_stage=chunk
        )
        if post_process:
            self._make_head(megatron)
        if model.tie_embeddings:
            self.setup_embeddings_and_output_layer()

    def _make_head(self, config: TransformerConfig) -> None:
        model, head = self.model, copy.copy(config)
        head.sequence_parallel = False  # the head reads gathered rows, not a shard of the sequence
        head.gradient_accumulation_fusion = False  # linear_cross_entropy takes the weight without the layer
        norm = te.modules().norm if te.chosen(self.kernels) else Norm
        self.final_norm = norm(config=head, hidden_size=model.hidden, eps=model.eps)
        self.output_layer = ColumnParallelLinear(
            model.hidden,
            self.vocab_size,
            config=head,
            init_method=config.init_method,
            bias=model.traits.head_bias,
            skip_weight_param_allocation=model.tie_embeddings and self.pre_process,
        )

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight on this stage; Megatron's schedules call it."""
        if not self.share_embeddings_and_output_weights:
            return None
        return self.embedding.word_embeddings.weight if self.pre_process else self.output_layer.weight

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None]) -> None:
        """Receive the previous stage's activations from Megatron's schedule."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def hidden_states(self, input_ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Run this stage's layers over all streams.

        Args:
            input_ids: ``[S b, l]``, streams in the order of :class:`Batch`, at the positions of this rank.
            documents: ``[b, L]``, the document of each position of whole rows; None: a row is one document.

        Returns:
            ``[N, b, h]``, streams end to end in the order of :class:`Streams`, at this rank's positions. After the last
            layer only the predicting streams, if ``kernels.skip_last_clean_queries``. Under sequence parallelism the
            rank's shard of it.
        """
        streams = self.streams
        rotary = self.context.take(self._rotary(self.model.length), 0)
        clean = min(streams.clean, self.context.positions)
        rotary = torch.cat([rotary] * streams.noisy + [rotary[:clean]])
        if self.pre_process:
            by_stream = input_ids.view(streams.count, -1, input_ids.shape[1]).unbind()
            parts = [*by_stream[: streams.noisy], *(x[:, :clean] for x in by_stream[streams.noisy :])]
            input_ids = torch.cat(parts, 1)  # [b, N]
        return self._layers(input_ids, rotary, documents)

    def block_states(self, input_ids: Tensor, offset: int) -> Tensor:
        """Run the layers over ``[b, l]`` tokens at positions ``offset`` to ``offset + l - 1``, for sampling with a
        cache in every attention; ``[l, b, h]``."""
        return self._layers(input_ids, self._rotary(input_ids.shape[1], offset), None)

    def _rotary(self, length: int, offset: int = 0) -> Tensor:
        # "packed" keeps Megatron from picking context-parallel positions, which pins memory and so needs a GPU.
        return self.rotary(length, offset, packed_seq=True)

    def _layers(self, input_ids: Tensor, rotary: Tensor, documents: Tensor | None) -> Tensor:
        hidden = self.embedding(input_ids, None) if self.pre_process else None
        # Megatron passes its mask on untouched, and only TwoStreamAttention reads it.
        return self.decoder(hidden_states=hidden, attention_mask=documents, rotary_pos_emb=rotary)

    @property
    def vocabulary(self) -> VocabularyShard:
        """This rank's shard of the vocabulary; the mask token and padding are never predicted."""
        never = (self.model.mask_id, *range(self.model.vocab_size, self.vocab_size))
        return VocabularyShard.of_this_rank(self.output_layer.output_size_per_partition, never)

    def logits(self, rows: Tensor) -> Tensor:
        """SUBS logits of hidden rows ``[..., h]`` -> ``[..., V / tensor]``: -inf for the mask token and padding."""
        weight = self.shared_embedding_or_output_weight()
        logits, _ = self.output_layer(self.final_norm(rows), weight=weight)
        return self.vocabulary.forbid(logits)

    def forward(self, batch: Batch, total: bool = False) -> Tensor:
        """Weighted nll of every prediction, ``[R, L]`` in fp32 (hidden states on stages before the last).

        ``batch`` and the result have the positions of this context-parallel rank. With ``kernels.masked_rows_only`` the
        head computes only predictions that have a weight.

        Args:
            total: return the sum, as training needs it; head and cross-entropy are then fused if
                ``kernels.chunked_cross_entropy``.
        """
        hidden = self.hidden_states(batch.input_ids, batch.documents)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # The head's own backward pass already sums over the tensor group.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        if not self.kernels.masked_rows_only:
            nll = self._loss_of_every_row(hidden, batch)
            if total and self.statistics is not None:
                every = torch.where(batch.weight != 0, nll.detach() / batch.weight, 0.0)
                self.statistics.add(every.flatten()[batch.predicted], batch)
            return nll.sum() if total else nll
        rows = self._predicting(hidden, batch)[batch.predicted]  # [P, h]
        labels, factors = (x.flatten()[batch.predicted] for x in (batch.labels, batch.weight))
        if self.kernels.chunked_cross_entropy and (total or not torch.is_grad_enabled()):
            weight = self.shared_embedding_or_output_weight()
            weight = self.output_layer.weight if weight is None else weight
            head = (self.final_norm(rows), weight, self.output_layer.bias, labels)
            if total:
                if self.statistics is None:
                    return linear_cross_entropy(*head, factors, self.vocabulary)
                each = torch.empty_like(factors)
                loss = linear_cross_entropy(*head, factors, self.vocabulary, each)
                self.statistics.add(each, batch)
                return loss
            nll = cross_entropy(*head, self.vocabulary)
        else:
            nll = vocab_parallel_cross_entropy(self.logits(rows).float(), labels)
        weighted = torch.where(factors != 0, nll * factors, 0.0)
        if total and self.statistics is not None:
            self.statistics.add(nll, batch)
        if total:
            return weighted.sum()
        return torch.zeros_like(batch.weight).flatten().index_add(0, batch.predicted, weighted).view_as(batch.weight)

    def _predicting(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Hidden rows ``[R l, h]`` in the order of the predictions, from ``[N, b, h]``."""
        rows, length = batch.labels.shape
        count = hidden.shape[1]
        hidden = hidden[: rows // count * length].unflatten(0, (-1, length))  # [K, l, b, h]
        return hidden.transpose(1, 2).reshape(rows * length, -1)

    def _loss_of_every_row(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The plain path: logits of every row of every stream, weights applied after."""
        logits = self._predicting(self.logits(hidden), batch).view(*batch.labels.shape, -1)  # [R, L, V / tensor]
        nll = vocab_parallel_cross_entropy(logits.float().contiguous(), batch.labels)
        # A label may be the mask token where nothing is predicted: 0 * inf would spoil the sum.
        return torch.where(batch.weight != 0, nll * batch.weight, 0.0)


def streams_of(config: EngineConfig) -> Streams:
    """The streams that are computed under this layout."""
    skip = skips_last_block(config.kernels, config.parallel)
    return Streams.of(config.diffusion, config.model.length, skip, clean_multiple(config, torch.cuda.is_available()))


def _without_dropout(config):
    """Configuration of the embedding, which has no dropout; Megatron would use ``hidden_dropout``."""
    config = copy.copy(config)
    config.hidden_dropout = 0.0
    return config


def global_name(name: str, model: BlockDiffusionModel) -> str:
    """Name of a parameter or module with the layer counted over all pipeline stages, the same for all kinds of layers.

    A tied head has the embedding's name. A norm that Transformer Engine fuses into a linear layer has the name of the
    norm before it.
    """
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return EMBEDDING
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + get_transformer_layer_offset(model.config, model.vp_stage))
        owner, _, part = ".".join(parts[3:]).partition(".layer_norm_")
        if part:
            parts[3:] = [_NORM_BEFORE[owner], part]
    return ".".join(parts)


def vocabulary_rows(name: str, model: ModelConfig) -> int | None:
    """Rows without padding of a tensor that has one row per token; None for other tensors."""
    return model.vocab_size if name == EMBEDDING or name.startswith("output_layer.") else None


@torch.no_grad()
def initialize(model: BlockDiffusionModel, seed: int) -> None:
    """Draw initial weights from generators keyed by (seed, global name): the same under every layout.

    Matrices are normal with ``init_std``, those that write to the residual stream scaled by ``1 / sqrt(2 layers)``;
    norms start at one, biases at zero, and so does the head of a backbone with ``zero_head``.
    """
    shape = model.model
    for name, parameter in model.named_parameters():
        name = global_name(name, model)
        if parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        elif name == "output_layer.weight" and shape.family.zero_head:
            parameter.zero_()
        else:
            std = shape.init_std
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                std /= math.sqrt(2 * shape.layers)
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
            # Unpadded rows, so that the drawn values do not depend on the padding to the tensor-parallel size.
            rows, columns = global_shape(parameter)
            full = torch.randn(vocabulary_rows(name, shape) or rows, columns, generator=generator) * std
            parameter.copy_(local_shard(full, parameter))
