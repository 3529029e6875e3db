"""Layer specifications: which Megatron-core parts make one transformer layer of each backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from bd3_megatron.attention.backends import AttentionBackend
from bd3_megatron.attention.core import TwoStreamAttention
from bd3_megatron.backbones import Traits
from bd3_megatron.config import EngineConfig, Fp8Config, KernelConfig, ModelConfig, ParallelConfig
from bd3_megatron.layers import transformer_engine as te
from bd3_megatron.layout import split_layers


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
    """Self-attention without the MLP's biases (Megatron has one switch for both); those of queries, keys and values
    have a switch of their own."""

    def __init__(self, config: TransformerConfig, *args, **kwargs):
        config = copy.copy(config)
        config.add_bias_linear = False
        super().__init__(config, *args, **kwargs)


class PredictingAttention(BiasFreeSelfAttention):
    """Self-attention of the last layer, in which the clean stream has keys and values but no queries.

    Args:
        noisy: positions of a row's noisy streams on this rank; they come first.
    """

    def __init__(self, config: TransformerConfig, *args, noisy: int, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.noisy = noisy

    def forward(self, hidden_states: Tensor, *args, rotary_pos_emb: Tensor | None = None, **kwargs):
        rotary = rotary_pos_emb if self._samples else (rotary_pos_emb[: self.noisy], rotary_pos_emb)
        return super().forward(hidden_states, *args, rotary_pos_emb=rotary, **kwargs)

    def get_query_key_value_tensors(self, hidden_states: Tensor, key_value_states=None, *args, **kwargs):
        """``[N, b, h]`` (this rank's shard of the sequence) -> queries ``[noisy, b, n, d]``, keys and values
        ``[N, b, g, d]``."""
        if self._samples:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, *args, **kwargs)
        if hasattr(self.linear_qkv, "layer_norm_weight"):  # norm and weight are one kernel, which computes all of them
            query, key, value = super().get_query_key_value_tensors(hidden_states, key_value_states, *args, **kwargs)
            return query[: self.noisy], key, value
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states)
        # Rows of the weight come by group: its queries, its key, its value.
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        weight = self.linear_qkv.weight.view(groups, -1, width, hidden_states.shape[-1])
        biases = (None, None)
        if self.linear_qkv.bias is not None:
            bias = self.linear_qkv.bias.view(groups, -1, width)
            biases = (bias[:, :-2].flatten(), bias[:, -2:].flatten())
        query = F.linear(hidden_states[: self.noisy], weight[:, :-2].flatten(0, 2), biases[0])
        key_value = F.linear(hidden_states, weight[:, -2:].flatten(0, 2), biases[1])
        query = query.unflatten(-1, (-1, width))
        key, value = key_value.unflatten(-1, (groups, 2, width)).unbind(-2)
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value

    @property
    def _samples(self) -> bool:
        """True while sampling, which runs one whole stream at a time."""
        return self.core_attention.cache is not None


def add_to_predicting(noisy: int) -> Callable:
    """Megatron's bias-dropout-add for a branch that has the noisy streams only; drops the rest of the residual stream.

    Args:
        noisy: as in :class:`PredictingAttention`.
    """

    def get(training: bool, fused: bool) -> Callable:
        add = get_bias_dropout_add(training, fused)

        def add_to_part(branch_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float) -> Tensor:
            given = len(branch_with_bias[0])
            if given == noisy:
                residual = residual[:noisy]
            elif given != len(
                residual
            ):  # a shard of the whole sequence has other tokens than a shard of its first part
                residual = gather_from_sequence_parallel_region(residual, tensor_parallel_output_grad=False)
                residual = scatter_to_sequence_parallel_region(residual[:noisy])
            return add(branch_with_bias, residual, probability)

        return add_to_part

    return get


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def transformer_config(config: EngineConfig, main_grads: bool = False) -> TransformerConfig:
    """Megatron's configuration of the backbone on this machine.

    Args:
        main_grads: True if parameters have the fp32 ``main_grad`` of Megatron's data parallelism.
    """
    model, parallel, bf16 = config.model, config.parallel, config.optimization.bf16
    traits = model.traits
    dtype = torch.bfloat16 if bf16 else torch.float32
    fused = fusions(config.kernels, main_grads)
    fused["bias_activation_fusion"] &= traits.gated or traits.mlp_bias  # Megatron fuses no others
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.groups,
        kv_channels=model.width_per_head,
        ffn_hidden_size=model.ffn,
        hidden_dropout=model.dropout,
        attention_dropout=0.0,
        normalization=traits.norm,
        layernorm_epsilon=model.eps,
        add_bias_linear=traits.mlp_bias,
        add_qkv_bias=traits.qkv_bias,
        gated_linear_unit=traits.gated,
        activation_func=activation(traits, fused["bias_activation_fusion"]),
        qk_layernorm=traits.qk_norm,
        **fused,
        masked_softmax_fusion=False,  # the attention is not Megatron's
        persist_layer_norm=False,  # neither are the norms
        **fp8_options(config.fp8),
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


def fusions(kernels: KernelConfig, main_grads: bool) -> dict[str, bool]:
    """Megatron's options for the fused kernels that run here; they compute the same functions. None without CUDA.

    Args:
        main_grads: as in :func:`transformer_config`; matrix products can add weight gradients to them.
    """
    on = kernels.fusions and torch.cuda.is_available()
    adds_gradients = te.chosen(kernels) or find_spec("fused_weight_gradient_mlp_cuda") is not None
    return {
        "bias_activation_fusion": on,
        "bias_dropout_fusion": on,
        "apply_rope_fusion": on and te.missing() is None,
        "gradient_accumulation_fusion": on and main_grads and adds_gradients,
    }


def activation(traits: Traits, fused: bool) -> Callable[[Tensor], Tensor]:
    """The MLP's activation as Megatron names it: its fused kernel called ``F.gelu`` computes the tanh form."""
    if traits.activation == "silu":
        return F.silu
    return F.gelu if fused else tanh_gelu


_RECIPES = {"current": "tensorwise", "delayed": "delayed", "block": "blockwise"}


def fp8_options(fp8: Fp8Config) -> dict[str, Any]:
    """The section as options of Megatron's configuration, the same in 0.16.1 and 0.19."""
    if not fp8.enabled:
        return {}
    options: dict[str, Any] = {
        "fp8": fp8.format if fp8.format != "auto" else ("e4m3" if fp8.recipe == "block" else "hybrid"),
        "fp8_recipe": _RECIPES[fp8.recipe],
        "fp8_param": False,
    }
    if fp8.recipe == "delayed":
        options |= {"fp8_margin": fp8.margin, "fp8_amax_history_len": fp8.amax_history, "fp8_amax_compute_algo": "max"}
    if fp8.first_last_bf16:
        options |= dict.fromkeys(("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"), fp8.first_last_bf16)
        options["first_last_layers_bf16"] = True
    return options


def pipeline_layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]] | None:
    """Layers of each virtual stage, as Megatron's ``pipeline_model_parallel_layout``; None without a pipeline."""
    if parallel.pipeline == 1:
        return None
    stages = parallel.pipeline * parallel.interleave
    counts = split_layers(model.layers, stages, parallel.embedding_weight, parallel.head_weight)
    layout = [["decoder"] * count for count in counts]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def layer_spec(model: ModelConfig, kernels: KernelConfig, backend: AttentionBackend, last: bool = False) -> ModuleSpec:
    """One layer: linear layers and norms as ``kernels.layers`` says, :class:`TwoStreamAttention` as core attention.

    Transformer Engine's column-parallel layers hold the norm before them; :func:`bd3_megatron.model.global_name` gives
    it the name that it has as a layer of its own.

    Args:
        backend: attention of the model's streams.
        last: give the noisy streams only, all that the head reads.
    """
    if te.chosen(kernels):
        column, row, norm = te.modules()
        norm_before = IdentityOp
    else:
        column, row, norm = ColumnParallelLinear, RowParallelLinear, Norm
        norm_before = Norm
    qk_norm = norm if model.traits.qk_norm else None
    noisy = backend.streams.noisy * backend.context.positions
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm_before,
            self_attention=ModuleSpec(
                module=PredictingAttention if last else BiasFreeSelfAttention,
                params={"noisy": noisy} if last else {},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=partial(TwoStreamAttention, backend=backend),
                    linear_proj=row,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=add_to_predicting(noisy) if last else get_bias_dropout_add,
            pre_mlp_layernorm=norm_before,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
