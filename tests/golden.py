"""Check the models against golden files of the reference implementation: ``python -m tests.golden FILE...``.

A golden file holds a reference model's weights, one noised batch, and the loss, per-token nll and gradients
that the reference implementation computed for it in fp32. Sizes are read from the file. For each model in
``MODELS`` one line gives the relative differences:

- ``loss``: ``|a - b| / |b|``;
- ``nll``: the largest of ``|a - b| / max(|b|, 1)`` over all tokens, so that a token's error is relative, and
  one below one nat counts absolutely;
- ``grad``: the largest over tensors of ``max|a - b| / max|b|``, with respect to every parameter of the
  reference (through the fold of its adaLN), and that tensor's name.

The exit status is 1 if any exceeds its tolerance or is not a number, and 2 if a file cannot be read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call

from bd3_common.errors import ConfigError
from bd3_megatron import parallel
from bd3_megatron.config import DiffusionConfig, EngineConfig, ModelConfig, OptimizationConfig, ParallelConfig
from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.hf.files import read_safetensors
from bd3_megatron.hf.formats import TokenIds
from bd3_megatron.hf.formats.bd3 import hf_config
from bd3_megatron.hf.formats.bd3lm import fold_reference, reference_sections
from bd3_megatron.hf.mapping import to_hf
from bd3_megatron.hf.modeling_bd3 import BD3Config, BD3ForMaskedLM, token_nll
from bd3_megatron.model import BlockDiffusionModel

LOSS_TOLERANCE = 1e-5
NLL_TOLERANCE = 1e-5
GRAD_TOLERANCE = 1e-4

# (model, diffusion, weights under Megatron names, x0, xt, t) -> nll [b, L], differentiable in the weights.
# x0 and xt are [b, L] with position 0 unmasked; t is [b, L]. nll is -w log p(x0), 0 where xt is not masked.
Model = Callable[[ModelConfig, DiffusionConfig, dict[str, Tensor], Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Golden:
    """One golden file."""

    model: ModelConfig
    diffusion: DiffusionConfig
    state: dict[str, Tensor]  # reference names
    x0: Tensor  # [b, L]
    xt: Tensor  # [b, L], position 0 put back
    t: Tensor  # [b, L]
    loss: Tensor  # scalar
    nll: Tensor  # [b, L]
    grads: dict[str, Tensor]  # reference names


@dataclass(frozen=True)
class Difference:
    """How far a model is from a golden file; see the module's text for the measures."""

    loss: float
    nll: float
    grad: float
    worst: str  # name of the tensor with the largest gradient difference

    @property
    def passed(self) -> bool:
        # Comparisons with nan are false, so nan never passes.
        return self.loss <= LOSS_TOLERANCE and self.nll <= NLL_TOLERANCE and self.grad <= GRAD_TOLERANCE


def read_golden(path: str | Path) -> Golden:
    """Read and check one golden file.

    Raises:
        ConfigError: one line: not readable, or something is missing or misshaped.
    """
    tensors, metadata = read_safetensors(Path(path))
    state = {name.removeprefix("weights."): x for name, x in tensors.items() if name.startswith("weights.")}
    grads = {name.replace("grads.", "backbone.", 1): x for name, x in tensors.items() if name.startswith("grads.")}
    model, diffusion = reference_sections(metadata, state, str(path), TokenIds())
    missing = [name for name in ("x0", "xt", "t", "nll") if name not in tensors]
    if missing or not grads or "loss" not in metadata:
        lacking = missing[0] if missing else "grads.*" if not grads else "loss in its metadata"
        raise ConfigError(f"{path}: no {lacking}; not a golden file")
    x0, xt, nll = tensors["x0"], tensors["xt"].clone(), tensors["nll"]
    rows = (len(x0), model.length)
    for name, x in (("x0", x0), ("xt", xt), ("nll", nll)):
        if tuple(x.shape) != rows:
            raise ConfigError(f"{path}: {name} has shape {list(x.shape)}, not {list(rows)}")
    if min(x0.min(), xt.min()) < 0 or max(x0.max(), xt.max()) >= model.vocab_size:
        raise ConfigError(f"{path}: x0 or xt holds ids outside the vocabulary of {model.vocab_size}")
    for name, grad in grads.items():
        if name not in state or state[name].shape != grad.shape:
            raise ConfigError(f"{path}: gradient {name} has no weight of its shape")
    try:
        t, loss = tensors["t"].expand(rows), torch.tensor(float(metadata["loss"]))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    xt[:, 0] = x0[:, 0]  # stored as drawn, before the BOS was put back
    return Golden(model, diffusion, state, x0, xt, t, loss, nll, grads)


def compare(golden: Golden, run: Model) -> Difference:
    """Run one model on a golden file, from the reference weights through the fold, in fp32."""
    state = {name: x.clone() for name, x in golden.state.items()}
    leaves = {name: state[name].requires_grad_() for name in golden.grads}
    weights = fold_reference(state, golden.model)
    nll = run(golden.model, golden.diffusion, weights, golden.x0, golden.xt, golden.t)
    loss = nll.mean()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    errors = {name.removeprefix("backbone."): relative(grad, golden.grads[name]) for name, grad in zip(leaves, grads)}
    # nan must win, and max() does not promise that.
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    return Difference(
        loss=relative(loss, golden.loss),
        nll=((nll - golden.nll).abs() / golden.nll.abs().clamp(min=1)).max().item(),
        grad=errors[worst],
        worst=worst,
    )


def relative(ours: Tensor, theirs: Tensor) -> float:
    """``max|a - b| / max|b|``; 0 where both are zero throughout."""
    difference = (ours - theirs).abs().max()
    return 0.0 if difference == 0 else (difference / theirs.abs().max()).item()


def hf_nll(
    model: ModelConfig,
    diffusion: DiffusionConfig,
    weights: dict[str, Tensor],
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
) -> Tensor:
    """The single-device model in plain torch."""
    tokens = TokenIds(bos=None, eos=None, mask=model.mask_id)
    with torch.device("meta"):  # every weight comes from the file
        network = BD3ForMaskedLM(BD3Config(**hf_config(model, diffusion, tokens, torch.float32)))
    clean = x0 if diffusion.block_size < model.length else None
    logits = functional_call(network, to_hf(weights, model), (xt, clean)).logits
    return torch.where(xt == model.mask_id, token_nll(logits, x0) / t, 0.0)  # w = 1 / t


def megatron_nll(
    model: ModelConfig,
    diffusion: DiffusionConfig,
    weights: dict[str, Tensor],
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
) -> Tensor:
    """The model that is trained, in a world of 1."""
    started = not dist.is_initialized()
    if started:
        parallel.start(ParallelConfig())
    try:
        fp32 = OptimizationConfig(precision="fp32")
        network = BlockDiffusionModel(EngineConfig(model=model, diffusion=diffusion, optimization=fp32))
        masked = xt == model.mask_id
        streams = torch.cat([xt, x0]) if network.streams.clean else xt
        batch = Batch(streams, x0, torch.where(masked, 1 / t, 0.0), tokens=x0.numel())
        return functional_call(network, weights, (batch,))
    finally:
        if started:  # whoever comes next in this process may start one of its own
            parallel.stop()


MODELS: dict[str, Model] = {"hf": hf_nll, "megatron": megatron_nll}


def main(files: list[str]) -> int:
    """Print one line per file and model; return the exit status."""
    if not files:
        print("golden: no files given; usage: python -m tests.golden FILE...", file=sys.stderr)
        return 2
    try:
        goldens = {file: read_golden(file) for file in files}
        missed = False
        for file, golden in goldens.items():
            for name, run in MODELS.items():
                d = compare(golden, run)
                outcome = "pass" if d.passed else "MISS"
                print(
                    f"{Path(file).name}  {name}  loss {d.loss:.1e}  nll {d.nll:.1e}  "
                    f"grad {d.grad:.1e} ({d.worst})  {outcome}"
                )
                missed |= not d.passed
    except ConfigError as error:
        print(f"golden: {error}", file=sys.stderr)
        return 2
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
