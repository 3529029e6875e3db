"""Layer specifications: which Megatron-core parts make one transformer layer of each backbone."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.core import TwoStreamAttention
from bd3_megatron.attention.mask import Streams
from bd3_megatron.config import KernelConfig, ModelConfig, ParallelConfig, split_layers


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm, computed in fp32 and returned in the input's type.

    Megatron's own torch wrapper refuses sequence parallelism; this one tags its parameters so that their gradients
    are summed over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float | None = None, **_: object):
        super().__init__()
        self.eps = eps or config.layernorm_epsilon
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        shape, weight = self.weight.shape, self.weight.float()
        if self.bias is None:
            return F.rms_norm(x.float(), shape, weight, self.eps).to(x.dtype)
        return F.layer_norm(x.float(), shape, weight, self.bias.float(), self.eps).to(x.dtype)


class BiasFreeSelfAttention(SelfAttention):
    """Self-attention without biases in a model whose MLP has them (Megatron has one switch for both)."""

    def __init__(self, config: TransformerConfig, *args, **kwargs):
        config = copy.copy(config)
        config.add_bias_linear = False
        super().__init__(config, *args, **kwargs)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def transformer_config(model: ModelConfig, parallel: ParallelConfig, bf16: bool) -> TransformerConfig:
    """Megatron's configuration of the backbone on this machine."""
    dit = model.backbone == "dit"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.groups,
        kv_channels=model.width_per_head,
        ffn_hidden_size=model.ffn,
        hidden_dropout=model.dropout,
        attention_dropout=0.0,
        normalization="LayerNorm" if dit else "RMSNorm",
        layernorm_epsilon=model.eps,
        add_bias_linear=dit,
        gated_linear_unit=not dit,
        activation_func=tanh_gelu if dit else F.silu,
        qk_layernorm=not dit,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.interleave if parallel.interleave > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout(model, parallel),
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        recompute_granularity=None if parallel.recompute == "none" else parallel.recompute,
        recompute_method="uniform" if parallel.recompute == "full" else None,
        recompute_num_layers=1 if parallel.recompute == "full" else None,
        # Over gloo, batched point-to-point calls give wrong gradients with two interleaved stages.
        batch_p2p_comm=torch.cuda.is_available(),
        batch_p2p_sync=torch.cuda.is_available(),
    )


def pipeline_layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]] | None:
    """What each virtual stage holds, in Megatron's words; None without a pipeline."""
    if parallel.pipeline == 1:
        return None
    stages = parallel.pipeline * parallel.interleave
    counts = split_layers(model.layers, stages, parallel.embedding_weight, parallel.head_weight)
    layout = [["decoder"] * count for count in counts]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def layer_spec(model: ModelConfig, streams: Streams, kernels: KernelConfig, context: ContextShard) -> ModuleSpec:
    """One layer from Megatron-core's own linear layers, with :class:`TwoStreamAttention` as core attention."""
    qk_norm = Norm if model.backbone == "qwen3" else None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=BiasFreeSelfAttention,
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=partial(
                        TwoStreamAttention, streams=streams, context=context, backend=kernels.attention
                    ),
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
