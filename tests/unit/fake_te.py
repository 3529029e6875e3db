"""Stands in for Megatron's Transformer Engine modules on a machine without CUDA.

The names, shapes and tags of parameters are those of the real modules (Transformer Engine 2.11 in Megatron-core 0.16.1
and 0.19.2, read off modules built with the packages), and so are the calls of Megatron. The arithmetic is plain torch;
delayed scaling rounds what enters a layer to e4m3 by the rules of the real one, so that a state that is lost or late
changes what comes out.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from bd3_megatron.layers import transformer_engine as te
from bd3_megatron.layers.specs import Norm

E4M3 = torch.finfo(torch.float8_e4m3fn).max


class _Quantizes:
    """What a Transformer Engine module has beside its parameters."""

    def prepare(self, config) -> None:
        self.fp8_meta: dict = {"fp8_checkpoint": False}
        self.is_first_microbatch = True
        self.casts = 0
        self.history = config.fp8_amax_history_len if config.fp8 and config.fp8_recipe == "delayed" else 0

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        if "scaling_fwd" in self.fp8_meta:
            return
        for key, count in (("scaling_fwd", 3 * num_gemms), ("scaling_bwd", 2 * num_gemms)):
            history = torch.zeros(self.history, count)
            self.fp8_meta[key] = SimpleNamespace(scale=torch.ones(count), amax_history=history)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass

    def quantized(self, x: Tensor) -> Tensor:
        """``x`` as FP8 holds it; gradients pass as they are."""
        self.casts += self.is_first_microbatch
        self.is_first_microbatch = False
        if not self.history:
            return x
        self.init_fp8_metadata()
        meta = self.fp8_meta["scaling_fwd"]
        amax, training = x.detach().abs().max().float(), torch.is_grad_enabled()
        with torch.no_grad():
            rounded = (x * meta.scale[0]).clamp(-E4M3, E4M3).to(torch.float8_e4m3fn).to(x.dtype) / meta.scale[0]
            meta.amax_history[0, 0] = torch.maximum(meta.amax_history[0, 0], amax)
            if training:
                self._update(meta)
        return x + (rounded - x).detach()

    def _update(self, meta: SimpleNamespace) -> None:
        """Scale from the largest of the history; the history moves on by one and its first row is emptied.

        The real one reduces the largest values of all layers at once, at the end of the forward pass.
        """
        if dist.get_world_size() > 1:
            group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
            dist.all_reduce(meta.amax_history[0], dist.ReduceOp.MAX, group=group)
        largest = meta.amax_history.amax(0)
        meta.scale.copy_(torch.where(largest > 0, E4M3 / largest.clamp(min=1e-30), meta.scale))
        meta.amax_history.copy_(meta.amax_history.roll(-1, 0))
        meta.amax_history[0].zero_()


class Column(_Quantizes, ColumnParallelLinear):
    """TELayerNormColumnParallelLinear."""

    def __init__(self, *sizes: int, config, **options):
        super().__init__(*sizes, config=config, **options)
        norm = Norm(config, sizes[0])
        self.eps, self.normalization = norm.eps, config.normalization
        self.layer_norm_weight = norm.weight
        if norm.bias is not None:
            self.layer_norm_bias = norm.bias
        self.prepare(config)

    def forward(self, x: Tensor):
        shape, weight = self.layer_norm_weight.shape, self.layer_norm_weight.float()
        if self.normalization == "RMSNorm":
            normed = F.rms_norm(x.float(), shape, weight, self.eps)
        else:
            normed = F.layer_norm(x.float(), shape, weight, self.layer_norm_bias.float(), self.eps)
        return super().forward(self.quantized(normed.to(x.dtype)))


class Row(_Quantizes, RowParallelLinear):
    """TERowParallelLinear."""

    def __init__(self, *sizes: int, config, **options):
        super().__init__(*sizes, config=config, **options)
        self.prepare(config)

    def forward(self, x: Tensor):
        return super().forward(self.quantized(x))


@contextlib.contextmanager
def installed():
    """Context in which Transformer Engine seems to be there."""
    kept = te.missing, te.modules
    te.missing, te.modules = lambda: None, lambda: te.Modules(Column, Row, Norm)
    try:
        yield
    finally:
        te.missing, te.modules = kept
