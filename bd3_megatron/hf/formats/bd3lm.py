"""The checkpoints of the paper's authors, whose model_type is bd3lm; read only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_common.text import shorten
from bd3_megatron.backbones import Shape
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.hf.files import Loaded, Source, section
from bd3_megatron.hf.formats import CheckpointFormat, TokenIds
from bd3_megatron.hf.mapping import check_depth, check_shapes, from_hf


class BD3LM(CheckpointFormat):
    """The reference implementation's checkpoints, their constant adaLN condition folded into the weights.

    The mask is the one of ``tokens``, else the last of the vocabulary: there the reference puts a mask that its
    tokenizer lacks (BERT's tokenizer has one of its own).
    """

    model_type: ClassVar[str] = "bd3lm"
    states_tokens: ClassVar[bool] = False

    def matches(self, config: Mapping[str, Any]) -> bool:
        """See the base class; a golden file's metadata has no ``model_type``."""
        return config.get("model_type", self.model_type if "n_blocks" in config else None) == self.model_type

    def read(self, source: Source, tokens: TokenIds) -> Loaded:
        """See the base class."""
        state = source.tensors()
        model, diffusion = reference_sections(source.config, state, str(source.path), tokens)
        return model, diffusion, fold_reference(state, model)


def reference_sections(
    config: Mapping[str, Any], state: Mapping[str, Tensor], source: str, tokens: TokenIds
) -> tuple[ModelConfig, DiffusionConfig]:
    """Model and objective of a reference checkpoint, from its ``config`` (values may be text) and its weights.

    Raises:
        ConfigError: a key is missing, a value is out of range, or the model conditions on time.
    """
    if str(config.get("time_conditioning", False)).lower() == "true":
        raise ConfigError(f"{source}: time_conditioning=true: its condition varies, so it cannot be folded")
    ffn = state.get("backbone.blocks.0.mlp.0.bias")
    try:
        vocab_size, length = int(config["vocab_size"]), int(config["model_length"])
        # Without a clean stream the whole row is one block.
        one_stream = config.get("algo") == "mdlm" or config.get("cross_attn") is False
        model = {
            "backbone": "dit",
            "layers": int(config["n_blocks"]),
            "hidden": int(config["hidden_dim"]),
            "heads": int(config["n_heads"]),
            "ffn_hidden": None if ffn is None else ffn.numel(),
            "length": length,
            "vocab_size": vocab_size,
            "mask_id": int(config.get("mask_index", vocab_size - 1)) if tokens.mask is None else tokens.mask,
            "bos_id": tokens.bos,
            "eos_id": tokens.eos,
        }
        diffusion = {
            "block_size": length if one_stream else int(config["block_size"]),
            "beta": float(config.get("sampling_eps_min", 1e-3)),
            "omega": float(config.get("sampling_eps_max", 1.0)),
        }
    except KeyError as error:
        raise ConfigError(f"{source}: the configuration has no {error.args[0]}; is it a bd3lm model?") from None
    except (TypeError, ValueError, OverflowError) as error:
        problem = shorten(str(error), 160)
        raise ConfigError(f"{source}: the configuration holds no number where one belongs: {problem}") from None
    return section(ModelConfig, model, source), section(DiffusionConfig, diffusion, source)


def fold_reference(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Megatron weights of the ``dit`` backbone that compute what the reference ``state`` computes.

    The reference feeds every adaLN the embedding of noise level sigma = 0, a constant. Each branch
    ``h + gate * f(LN(h) w (1 + scale) + shift)`` is then a LayerNorm with weight ``w (1 + scale)`` and bias
    ``shift``, and a linear output layer whose rows are scaled by ``gate``. Differentiable, in fp32.

    Raises:
        ConfigError: a name is missing, unknown or misshaped, or the rotary frequencies are not those of
            ``model.rope_theta``.
    """
    buffers = ("sampling_eps_min", "sampling_eps_max", "backbone.rotary_emb.inv_freq")
    check_depth(state, model)
    _check_rotary(state.get(buffers[-1]), model)
    ref = {n.removeprefix("backbone."): t.float() for n, t in state.items() if n not in buffers}
    check_shapes(ref, _reference_shapes(model, ref))
    condition = _condition(ref)

    def modulation(prefix: str, parts: int) -> tuple[Tensor, ...]:
        weight, bias = ref[f"{prefix}.adaLN_modulation.weight"], ref[f"{prefix}.adaLN_modulation.bias"]
        return F.linear(condition, weight, bias).chunk(parts)

    hf = {"model.embed_tokens.weight": ref["vocab_embed.embedding"]}
    for index in range(model.layers):
        old, new = f"blocks.{index}", f"model.layers.{index}"
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(old, 6)
        q, k, v = ref[f"{old}.attn_qkv.weight"].chunk(3)
        hf |= {
            f"{new}.input_layernorm.weight": ref[f"{old}.norm1.weight"] * (1 + scale),
            f"{new}.input_layernorm.bias": shift,
            f"{new}.self_attn.q_proj.weight": q,
            f"{new}.self_attn.k_proj.weight": k,
            f"{new}.self_attn.v_proj.weight": v,
            f"{new}.self_attn.o_proj.weight": gate[:, None] * ref[f"{old}.attn_out.weight"],
            f"{new}.post_attention_layernorm.weight": ref[f"{old}.norm2.weight"] * (1 + mlp_scale),
            f"{new}.post_attention_layernorm.bias": mlp_shift,
            f"{new}.mlp.up_proj.weight": ref[f"{old}.mlp.0.weight"],
            f"{new}.mlp.up_proj.bias": ref[f"{old}.mlp.0.bias"],
            f"{new}.mlp.down_proj.weight": mlp_gate[:, None] * ref[f"{old}.mlp.2.weight"],
            f"{new}.mlp.down_proj.bias": mlp_gate * ref[f"{old}.mlp.2.bias"],
        }
    shift, scale = modulation("output_layer", 2)
    hf |= {
        "model.norm.weight": ref["output_layer.norm_final.weight"] * (1 + scale),
        "model.norm.bias": shift,
        "lm_head.weight": ref["output_layer.linear.weight"],
        "lm_head.bias": ref["output_layer.linear.bias"],
    }
    return from_hf(hf, model)


def _condition(ref: Mapping[str, Tensor]) -> Tensor:
    """``silu(W2 silu(W0 e + b0) + b2)`` for ``e = [cos, sin]`` of sigma = 0: ones, then zeros."""
    first = ref["sigma_map.mlp.0.weight"]
    half = first.shape[1] // 2
    embedding = torch.cat([first.new_ones(half), first.new_zeros(half)])
    inner = F.silu(F.linear(embedding, first, ref["sigma_map.mlp.0.bias"]))
    return F.silu(F.linear(inner, ref["sigma_map.mlp.2.weight"], ref["sigma_map.mlp.2.bias"]))


def _reference_shapes(model: ModelConfig, ref: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Names and shapes of a reference state, less its prefix; the condition's widths are the state's own."""
    hidden, ffn, vocab = model.hidden, model.ffn, model.vocab_size
    sigma = ref.get("sigma_map.mlp.0.weight")
    cond, frequencies = sigma.shape if sigma is not None and sigma.dim() == 2 else (0, 0)
    shapes: dict[str, Shape] = {
        "vocab_embed.embedding": (vocab, hidden),
        "sigma_map.mlp.0.weight": (cond, frequencies),
        "sigma_map.mlp.0.bias": (cond,),
        "sigma_map.mlp.2.weight": (cond, cond),
        "sigma_map.mlp.2.bias": (cond,),
        "output_layer.norm_final.weight": (hidden,),
        "output_layer.linear.weight": (vocab, hidden),
        "output_layer.linear.bias": (vocab,),
        "output_layer.adaLN_modulation.weight": (2 * hidden, cond),
        "output_layer.adaLN_modulation.bias": (2 * hidden,),
    }
    block: dict[str, Shape] = {
        "norm1.weight": (hidden,),
        "attn_qkv.weight": (3 * hidden, hidden),
        "attn_out.weight": (hidden, hidden),
        "norm2.weight": (hidden,),
        "mlp.0.weight": (ffn, hidden),
        "mlp.0.bias": (ffn,),
        "mlp.2.weight": (hidden, ffn),
        "mlp.2.bias": (hidden,),
        "adaLN_modulation.weight": (6 * hidden, cond),
        "adaLN_modulation.bias": (6 * hidden,),
    }
    for index in range(model.layers):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    return shapes


def _check_rotary(inv_freq: Tensor | None, model: ModelConfig) -> None:
    if inv_freq is None:
        return
    expected = model.rope_theta ** -(torch.arange(0, model.width_per_head, 2) / model.width_per_head)
    # Loose, as the buffer may have been stored in bf16.
    if inv_freq.shape != expected.shape or not torch.allclose(inv_freq.float().cpu(), expected, rtol=1e-2):
        raise ConfigError(
            f"weights: backbone.rotary_emb.inv_freq is not that of head width {model.width_per_head} and "
            f"theta {model.rope_theta:g}; check n_heads"
        )
