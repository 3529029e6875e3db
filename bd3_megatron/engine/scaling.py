"""State of delayed FP8 scaling: each layer's scales, and the history of maxima from which they follow.

Maxima are taken over all ranks that share a layer. Between steps every rank has the same state, so a checkpoint stores
it under names without a layout. The other recipes have no state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor

from bd3_megatron.model import BlockDiffusionModel, global_name
from bd3_megatron.shards import Chunk, ShardedTensor

SECTION = "fp8"
_DIRECTIONS = {"scaling_fwd": "forward", "scaling_bwd": "backward"}


class Fp8State:
    """FP8 state of one rank's model chunks; empty unless they train with delayed scaling.

    Attributes:
        tensors: live fp32 tensors by ``layer/direction/kind``: ``scale`` ``[n]`` and ``amax_history`` ``[history, n]``
            of the n tensors that a linear layer quantizes in that direction.
    """

    def __init__(self, modules: Sequence[BlockDiffusionModel] = ()):
        self._modules = list(modules)
        self.tensors: dict[str, Tensor] = {}
        if modules and modules[0].config.fp8 and modules[0].config.fp8_recipe == "delayed":
            for module in modules:
                self.tensors |= _delayed(module)

    def state(self) -> dict[str, ShardedTensor]:
        """Section ``fp8`` of :meth:`bd3_megatron.engine.base.Engine.state`."""
        return {
            f"{SECTION}/{name}": ShardedTensor(tuple(x.shape), (Chunk((0,) * x.dim(), x),))
            for name, x in self.tensors.items()
        }

    def weights_changed(self) -> None:
        """Make the next forward pass cast the weights again; FP8 copies are shared by the micro-batches of a step."""
        for module in self._modules:
            module.set_is_first_microbatch()

    @torch.no_grad()
    def forget_overflow(self) -> None:
        """Remove non-finite values from the histories, after a step that was not applied.

        Transformer Engine does not update a scale while the maximum of its history is not finite, so one such value
        would freeze the scale for the length of the history. Finite values of the step stay, however large.
        """
        for name, tensor in self.tensors.items():
            if name.endswith("/amax_history"):
                tensor.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Context that restores the state at its end, for evaluations, whose maxima do not belong to training."""
        kept = [x.clone() for x in self.tensors.values()]
        try:
            yield
        finally:
            if kept:
                torch._foreach_copy_(list(self.tensors.values()), kept)


@torch.no_grad()
def _delayed(module: BlockDiffusionModel) -> dict[str, Tensor]:
    """Create the scales now, not in the first step, so that a checkpoint can be read into them."""
    found = {}
    with get_fp8_context(module.config):
        for name, layer in module.named_modules():
            if not hasattr(layer, "init_fp8_metadata"):
                continue
            layer.init_fp8_metadata()
            for key, direction in _DIRECTIONS.items():
                for kind in ("scale", "amax_history"):
                    found[f"{global_name(name, module)}/{direction}/{kind}"] = getattr(layer.fp8_meta[key], kind)
    return found
