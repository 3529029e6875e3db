"""The checkpoints of the paper's authors, whose model_type is bd3lm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_common.text import shorten
from bd3_megatron.backbones import Shape
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.hf.files import Loaded, Source, section, write_json, write_weights
from bd3_megatron.hf.formats import CheckpointFormat, Contents, TokenIds
from bd3_megatron.hf.mapping import Weights, check_depth, check_shapes, from_hf, lazy_to_hf
from bd3_megatron.hf.origin import Origin
from bd3_megatron.hf.tokenizer import tokenizer_files

_BUFFERS = ("sampling_eps_min", "sampling_eps_max", "backbone.rotary_emb.inv_freq")


class BD3LM(CheckpointFormat):
    """The reference implementation's checkpoints, their constant adaLN condition folded into the weights.

    Written, the condition is unfolded again: with that of the checkpoint that was imported, else with one that changes
    nothing. The mask is the one of ``tokens``, else the last of the vocabulary: there the reference puts a mask that
    its tokenizer lacks (BERT's tokenizer has one of its own).
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

    def origin(self, source: Source, loaded: Loaded, tokens: TokenIds) -> Origin:
        """See the base class: the condition, and what rounding loses of the tensors that it scales."""
        return Origin(self.model_type, source.config, kept_of_reference(source.tensors(), *loaded[::2]))

    def write(self, folder: Path, contents: Contents) -> None:
        """See the base class; in fp32, without the reference's code, which a user of it has."""
        model, diffusion = contents.model, contents.diffusion
        _check_writable(model, contents.dtype)
        kept = contents.origin if contents.origin and contents.origin.format == self.model_type else None
        state = unfold_reference(contents.weights, model, {} if kept is None else kept.tensors)
        one_stream = diffusion.block_size == model.length
        config = {
            "model_type": self.model_type,
            "architectures": ["BD3LM"],
            "block_size": diffusion.block_size,
            "vocab_size": model.vocab_size,
            "model_length": model.length,
            "hidden_dim": model.hidden,
            "cond_dim": state["backbone.sigma_map.mlp.0.weight"].shape[0],
            "n_blocks": model.layers,
            "n_heads": model.heads,
            "dropout": model.dropout,
            "cross_attn": not one_stream,
            "time_conditioning": False,
            "var_min": False,
            "sampling_eps_min": diffusion.beta,
            "sampling_eps_max": diffusion.omega,
            "attn_backend": "sdpa",
            "return_dict": False,
            "mask_index": model.mask_id,
        }
        if kept is not None:
            config = {"model_type": self.model_type, "mask_index": model.mask_id} | dict(kept.config)
        write_json(folder / "config.json", config)
        write_weights(folder, state, torch.float32, contents.shard_bytes)
        for name, text in tokenizer_files(contents, model.vocab_size or 0).items():
            (folder / name).write_text(text, encoding="utf-8")


def _check_writable(model: ModelConfig, dtype: torch.dtype | None) -> None:
    """Check that the reference has such a model.

    Raises:
        ConfigError: with the reason.
    """
    wrong = {
        f"model.backbone={model.backbone}": model.backbone != "dit",
        f"model.ffn_hidden={model.ffn}": model.ffn != 4 * model.hidden,
        f"model.rope_theta={model.rope_theta:g}": model.rope_theta != 10_000,
        f"model.rope_scaling.kind={model.rope_scaling.kind}": model.rope_scaling.kind != "none",
        f"dtype={str(dtype).removeprefix('torch.')}": dtype not in (None, torch.float32),
    }
    if found := next((name for name, is_wrong in wrong.items() if is_wrong), None):
        raise ConfigError(f"format=bd3lm: {found}: the reference has dit, 4 x hidden, 10000, none, fp32; use bd3")


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
    check_depth(state, model)
    _check_rotary(state.get(_BUFFERS[-1]), model)
    ref = {n.removeprefix("backbone."): t.float() for n, t in state.items() if n not in _BUFFERS}
    check_shapes(ref, _reference_shapes(model, ref))
    condition = _condition(ref)

    def modulation(prefix: str, parts: int) -> tuple[Tensor, ...]:
        return _modulation(ref, condition, prefix).chunk(parts)

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


def _modulation(ref: Mapping[str, Tensor], condition: Tensor, prefix: str) -> Tensor:
    """Output of one adaLN, all chunks: ``[6 hidden]`` of a block, ``[2 hidden]`` of the last layer."""
    return F.linear(condition, ref[f"{prefix}.adaLN_modulation.weight"], ref[f"{prefix}.adaLN_modulation.bias"])


def _scaled(model: ModelConfig) -> Iterator[tuple[str, str, str, int, bool]]:
    """Tensors that the condition scales: exported name, the reference's name, its adaLN, the chunk of that which scales
    it, and whether as ``1 + chunk``."""
    for index in range(model.layers):
        new, old = f"model.layers.{index}", f"blocks.{index}"
        yield f"{new}.input_layernorm.weight", f"{old}.norm1.weight", old, 1, True
        yield f"{new}.self_attn.o_proj.weight", f"{old}.attn_out.weight", old, 2, False
        yield f"{new}.post_attention_layernorm.weight", f"{old}.norm2.weight", old, 4, True
        yield f"{new}.mlp.down_proj.weight", f"{old}.mlp.2.weight", old, 5, False
        yield f"{new}.mlp.down_proj.bias", f"{old}.mlp.2.bias", old, 5, False
    yield "model.norm.weight", "output_layer.norm_final.weight", "output_layer", 1, True


def _shifts(model: ModelConfig) -> Iterator[tuple[str, str, int]]:
    """Biases that are chunks of an adaLN's output: exported name, the adaLN, the chunk."""
    for index in range(model.layers):
        yield f"model.layers.{index}.input_layernorm.bias", f"blocks.{index}", 0
        yield f"model.layers.{index}.post_attention_layernorm.bias", f"blocks.{index}", 3
    yield "model.norm.bias", "output_layer", 0


def _divided(folded: Tensor, scale: Tensor) -> Tensor:
    """``folded`` by rows over ``scale``, in fp32; rows whose scale is 0 stay as they are."""
    scale = torch.where(scale == 0, 1.0, scale.double()).view(-1, *[1] * (folded.dim() - 1))
    return (folded.double() / scale).float()


def _steps(ours: Tensor, theirs: Tensor) -> Tensor | None:
    """Numbers of fp32 values from ``ours`` to ``theirs``, int8; None where one is out of range."""
    steps = theirs.contiguous().view(torch.int32).long() - ours.contiguous().view(torch.int32).long()
    return steps.to(torch.int8) if steps.abs().max() < 128 else None


def kept_of_reference(state: Weights, model: ModelConfig, weights: Weights) -> dict[str, Tensor]:
    """What :func:`fold_reference` loses of a state, for :func:`unfold_reference`.

    It is the condition and its layers as they are, their outputs, and of each tensor that was scaled the distance in
    representable values to what a division gives back, a byte for each element.

    Args:
        weights: the folded ones.
    """
    ref = {n.removeprefix("backbone."): t.float() for n, t in state.items() if n not in _BUFFERS}
    scaled = {old: (new, prefix, chunk, plus) for new, old, prefix, chunk, plus in _scaled(model)}
    kept = {f"state.{name}": state[name] for name in _BUFFERS if name in state}
    kept |= {f"state.backbone.{n}": t for n, t in ref.items() if n.startswith("sigma_map.") or "adaLN_modulation" in n}
    condition, hf = _condition(ref), lazy_to_hf(weights, model)
    for prefix in [*(f"blocks.{index}" for index in range(model.layers)), "output_layer"]:
        kept[f"output.{prefix}"] = _modulation(ref, condition, prefix).unflatten(0, (-1, model.hidden))
    for name, prefix, chunk in _shifts(model):
        kept[f"output.{prefix}"][chunk] = hf[name]
    for old, (new, prefix, chunk, plus) in scaled.items():
        scale = kept[f"output.{prefix}"][chunk] + int(plus)
        steps = _steps(_divided(hf[new], scale), ref[old])
        kept |= {f"whole.{old}": ref[old]} if steps is None else {f"steps.{old}": steps}
    return {name: tensor.clone().contiguous() for name, tensor in kept.items()}


def unfold_reference(weights: Weights, model: ModelConfig, kept: Weights) -> dict[str, Tensor]:
    """A reference state that folds to these weights of the ``dit`` backbone: the inverse of :func:`fold_reference`.

    Args:
        kept: :func:`kept_of_reference` of the state that the run was imported from; empty for another run, whose
            condition is then 0 and changes nothing.

    Raises:
        ConfigError: what was kept is not of this model.
    """
    hf, hidden = lazy_to_hf(weights, model), model.hidden
    cond, frequencies = 128, 256  # the reference's, for every size
    if not kept:
        shapes = {"0.weight": (cond, frequencies), "0.bias": (cond,), "2.weight": (cond, cond), "2.bias": (cond,)}
        kept = {f"state.backbone.sigma_map.mlp.{name}": torch.zeros(shape) for name, shape in shapes.items()}
        for prefix, parts in [*((f"blocks.{index}", 6) for index in range(model.layers)), ("output_layer", 2)]:
            neutral = torch.zeros(parts, hidden)
            neutral[2:3] = neutral[5:6] = 1.0  # gates
            adaln = f"state.backbone.{prefix}.adaLN_modulation"
            kept |= {f"{adaln}.weight": torch.zeros(parts * hidden, cond), f"{adaln}.bias": neutral.flatten()}
            kept[f"output.{prefix}"] = neutral
        frequency = model.rope_theta ** -(torch.arange(0, model.width_per_head, 2) / model.width_per_head)
        kept[f"state.{_BUFFERS[-1]}"] = frequency
    try:
        return _unfolded(hf, model, kept)
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"format=bd3lm: what was kept at the import is of another model ({error}); use bd3") from None


def _unfolded(hf: Weights, model: ModelConfig, kept: Weights) -> dict[str, Tensor]:
    state = {name.removeprefix("state."): t.clone() for name, t in kept.items() if name.startswith("state.")}
    hidden = model.hidden
    unreached: dict[tuple[str, int], Tensor] = {}

    def move(prefix: str, chunk: int, by: Tensor) -> None:
        """Change a chunk of an adaLN's output."""
        state[f"backbone.{prefix}.adaLN_modulation.bias"].unflatten(0, (-1, hidden))[chunk] += by

    state["backbone.vocab_embed.embedding"] = hf["model.embed_tokens.weight"]
    for index in range(model.layers):
        old, new = f"backbone.blocks.{index}", f"model.layers.{index}"
        state[f"{old}.attn_qkv.weight"] = torch.cat([hf[f"{new}.self_attn.{x}_proj.weight"] for x in "qkv"])
        state |= {f"{old}.mlp.0.{part}": hf[f"{new}.mlp.up_proj.{part}"] for part in ("weight", "bias")}
    for name, prefix, chunk in _shifts(model):
        move(prefix, chunk, hf[name] - kept[f"output.{prefix}"][chunk])
    for new, old, prefix, chunk, plus in _scaled(model):
        scale, folded = kept[f"output.{prefix}"][chunk] + int(plus), hf[new]
        found = _divided(folded, scale)
        if f"whole.{old}" in kept:
            there = kept[f"whole.{old}"]
            rows = scale.view(-1, *[1] * (there.dim() - 1)) * there == folded
            found = torch.where(rows, there, found)
        elif f"steps.{old}" in kept:
            found = (found.view(torch.int32) + kept[f"steps.{old}"].int()).view(torch.float32)
        lost = (scale == 0) & (folded.flatten(1) if folded.dim() > 1 else folded[:, None]).ne(0).any(1)
        unreached[prefix, chunk] = unreached.get((prefix, chunk), torch.zeros_like(lost)) | lost
        state[f"backbone.{old}"] = found
    for (prefix, chunk), rows in unreached.items():
        move(prefix, chunk, rows.float())  # a scale of 0 cannot give these rows: it becomes 1
    for part in ("weight", "bias"):
        state[f"backbone.output_layer.linear.{part}"] = hf[f"lm_head.{part}"]
    return state


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
