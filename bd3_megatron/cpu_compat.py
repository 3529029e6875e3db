"""Megatron-core without CUDA: its calls of ``torch.cuda``, redirected to the CPU.

Megatron-core's parallelism, schedules and optimizers are plain torch, but name the CUDA device in a few places. Without
CUDA these calls would fail, so :func:`install` points them at the CPU:

* the current device is ``cpu``, ``synchronize`` does nothing, and there is no stream;
* the CUDA random state, which Megatron's tracker forks for dropout under tensor parallelism, is the CPU's. All four
  functions must be replaced: without one of them nothing fails, but the forks use wrong states;
* rotary embeddings move their frequencies to the current device, the CPU.

The optimizer and the schedules also create tensors on ``device="cuda"``, call ``Tensor.cuda()`` and compare
``Tensor.type()`` with CUDA type names. :class:`CudaMeansCpu` redirects these inside a ``with`` block only.

With CUDA present everything here does nothing.
"""

from __future__ import annotations

import contextlib
import logging

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def device() -> torch.device:
    """The device this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def install() -> None:
    """Point Megatron's uses of ``torch.cuda`` at the CPU when there is no CUDA; safe to call again."""
    if torch.cuda.is_available():
        return
    from megatron.core.tensor_parallel import random

    def get_state(device=None, clone: bool = False, graph_safe: bool = False):
        return torch.get_rng_state()

    def set_state(state, device=None, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    torch.cuda.current_device = lambda: CPU
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_stream = lambda *_: None  # newer releases ask for it before they know whether they need it
    torch.cuda.get_rng_state = get_state
    torch.cuda.manual_seed = torch.manual_seed
    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # The tracker warns when the CPU state moves inside a fork of the CUDA state; here they are the same state.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


class CudaMeansCpu(TorchFunctionMode):
    """Inside, ``device="cuda"`` and ``Tensor.cuda()`` mean the CPU, and tensors give CUDA type names."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return func(*args, **kwargs)


def redirected() -> contextlib.AbstractContextManager:
    """Context in which Megatron's optimizer and schedules may run on this machine."""
    return contextlib.nullcontext() if torch.cuda.is_available() else CudaMeansCpu()
