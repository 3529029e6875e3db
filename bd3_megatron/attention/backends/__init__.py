"""Attention backends: implementations of the two-stream attention, one file each, chosen by ``kernels.attention``.

A backend is chosen once for a model's streams and shared by all layers::

    backend = choose(kernels.attention, streams, context, head_dim=128, dtype=torch.bfloat16, device=device)
    out = backend.attend(query, key, value, scale, documents)

A new one is a subclass of :class:`AttentionBackend` in a file of this folder, or a plugin that calls
``ATTENTION_BACKENDS.add(name, cls)``. These files are importable without torch: configuration and memory estimates
read the traits of a backend, so that its file imports torch where it computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bd3_common.errors import ConfigError
from bd3_common.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bd3_megatron.attention.context import ContextShard
    from bd3_megatron.attention.mask import Streams
    from bd3_megatron.config import EngineConfig

AUTO = "auto"
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # torch's names and the configuration's

_FP32 = 4


@dataclass(frozen=True)
class Demand:
    """Properties of the tensors and streams that a backend has to support.

    Attributes:
        precision: of queries, keys and values: fp32, bf16 or fp16.
        head_dim: width of a head.
        chunk: neighbouring positions of a row on one rank: L, or a chunk of it with context parallelism.
        clean: positions of the clean stream.
        context: context-parallel ranks that share a row.
    """

    precision: str
    head_dim: int
    chunk: int
    clean: int = 0
    context: int = 1

    @classmethod
    def of(cls, config: EngineConfig) -> Demand:
        """Demand of a run, before its model is built."""
        model, diffusion, context = config.model, config.diffusion, config.parallel.context
        length = model.length
        chunk = length if context == 1 else length // (2 * context)
        one_block = diffusion.objective == "diffusion" and diffusion.block_size == length
        return cls(config.optimization.precision, model.width_per_head, chunk, 0 if one_block else length, context)


@dataclass(frozen=True)
class AttentionSizes:
    """Sizes of one layer's attention on one rank, from which a backend counts the memory it keeps.

    Attributes:
        length, block_size: L and B'.
        noisy, clean: noisy draws K, and positions of the clean stream.
        clean_queries: False in a last layer that computes only keys and values of the clean stream.
        micro_batch: rows b of a micro-batch.
        context: context-parallel ranks that share a row.
        heads, groups: query heads, and key and value heads, of this rank.
        head_dim: width of a head.
        element: bytes of an activation.
        inputs: elements of queries, keys and values that autograd keeps when a backend on CPU reads them in place.
        cuda: True on CUDA.
        packed: True with several documents per row, so that every row has a mask of its own.
    """

    length: int
    block_size: int
    noisy: int
    clean: int
    clean_queries: bool
    micro_batch: int
    context: int
    heads: float
    groups: float
    head_dim: int
    element: int
    inputs: float
    packed: bool
    cuda: bool

    @property
    def queries(self) -> float:
        """Queries of a micro-batch on this rank."""
        positions = self.noisy * self.length + (self.clean if self.clean_queries else 0)
        return positions / self.context * self.micro_batch

    @property
    def keys(self) -> float:
        """Keys of a micro-batch on this rank."""
        return (self.noisy * self.length + self.clean) / self.context * self.micro_batch

    @property
    def query_width(self) -> float:
        """Elements of one position's queries."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> float:
        """Elements of one position's keys."""
        return self.groups * self.head_dim


class AttentionBackend(ABC):
    """One implementation of the two-stream attention, for one set of streams.

    Args:
        streams: the noisy and clean streams that the model computes.
        context: this rank's share of the positions; None for all of them.

    Attributes:
        name: name in the registry.
        priority: preference of ``kernels.attention=auto`` by type of device (cpu, cuda); it takes the highest that
            works, and never a backend without an entry for the device.
        multiple: row length (or its chunk under context parallelism) and clean stream must be multiples of it.
        uncounted: plural noun for the memory that :meth:`activation_bytes` leaves out, for estimates; None if none.
    """

    name: ClassVar[str]
    priority: ClassVar[Mapping[str, int]] = {}
    multiple: ClassVar[int] = 1
    uncounted: ClassVar[str | None] = None

    def __init__(self, streams: Streams, context: ContextShard | None = None):
        from bd3_megatron.attention.context import ContextShard

        self.streams = streams
        self.context = context or ContextShard(streams.length)

    @classmethod
    def unsupported_reason(cls, demand: Demand) -> str | None:
        """Reason why no device can meet ``demand`` with this backend, or None.

        The text follows the backend's name in an error: ``takes bf16 and fp16, not fp32``. The base class checks
        :attr:`multiple`.
        """
        for positions in (demand.chunk, demand.clean):
            if positions % cls.multiple:
                return f"takes chunks of a row in multiples of {cls.multiple} positions, not {positions}"
        return None

    @classmethod
    def missing_reason(cls, demand: Demand, device: torch.device) -> str | None:
        """Reason why this machine cannot meet ``demand`` on ``device``, or None: a package or a kernel is missing."""
        return None

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None) -> Tensor:
        """Attention of every stream under the mask of :func:`bd3_megatron.attention.mask.sees`, with gradients.

        Args:
            query: ``[q, b, n, d]``. Streams lie end to end as :class:`bd3_megatron.attention.mask.Streams` says, each
                with all its positions or this rank's share of them (``context``). In the last layer only the noisy
                streams may have queries.
            key, value: ``[k, b, g, d]`` of all streams, with ``g`` dividing ``n`` (grouped queries).
            scale: factor on the logits.
            documents: int ``[b, L]``, the document of each position of the whole rows, never falling along a row: a
                query sees keys of its own document only. None where every row is one document.

        Returns:
            ``[q, b, n, d]``.
        """

    @classmethod
    def causal(cls, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Plain causal attention by the same kernels, for comparison in ``bd3 bench attention``.

        Args:
            query: ``[l, b, n, d]``.
            key, value: ``[l, b, g, d]``.

        Returns:
            ``[l, b, n, d]``; the base class calls torch's SDPA.
        """
        import torch.nn.functional as F

        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, l, d]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)

    @classmethod
    def activation_bytes(cls, sizes: AttentionSizes) -> float:
        """Bytes that one layer keeps of its attention for the backward pass.

        The base class counts queries, keys, values, output and log-sum-exps once each, as a fused kernel keeps them.
        """
        elements = 2 * sizes.queries * sizes.query_width + 2 * sizes.keys * sizes.key_width
        return elements * sizes.element + sizes.queries * sizes.heads * _FP32


ATTENTION_BACKENDS = Registry(
    AttentionBackend, kind="attention backend", key="kernels.attention", group="bd3_megatron.attention_backends"
)


def candidates(name: str, device_type: str) -> list[type[AttentionBackend]]:
    """The named backend, or those that ``auto`` may take on a type of device (cpu, cuda), best first.

    Raises:
        ConfigError: unknown name.
    """
    if name != AUTO:
        return [ATTENTION_BACKENDS.load(name)]
    known = [cls for cls in _all() if device_type in cls.priority]
    return sorted(known, key=lambda cls: -cls.priority[device_type])


def check_backend(name: str, demand: Demand) -> None:
    """Check that some device can meet ``demand`` with the named backend.

    Raises:
        ConfigError: unknown name, or one line with the unsupported reason and the backends that can.
    """
    if name != AUTO and (reason := ATTENTION_BACKENDS.load(name).unsupported_reason(demand)):
        raise _unsupported(name, reason, [cls for cls in _all() if cls.unsupported_reason(demand) is None])


def choose(
    name: str,
    streams: Streams,
    context: ContextShard | None,
    *,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionBackend:
    """The backend of that name for these streams; ``auto`` takes the preferred one that works on this machine.

    Args:
        context: this rank's share of the positions; None for all.
        head_dim, dtype, device: of queries, keys and values.

    Raises:
        ConfigError: unknown name, or one line with the reason and the backends that work.
    """
    demand = demand_of(streams, context, head_dim=head_dim, dtype=dtype)
    for cls in candidates(name, device.type):
        reason = reason_against(cls, demand, device)
        if reason is None:
            return cls(streams, context)
        if name != AUTO:
            raise _unsupported(name, reason, [cls for cls in _all() if reason_against(cls, demand, device) is None])
    names = ", ".join(cls.name for cls in _all())
    raise ConfigError(f"kernels.attention={AUTO}: no backend works on {device.type}; name one of {names}")


def portable(name: str) -> str:
    """``name``, or ``auto`` for a backend of GPUs: a run's model may be used on a machine without one."""
    priority = {} if name == AUTO else ATTENTION_BACKENDS.load(name).priority
    return AUTO if priority and "cpu" not in priority else name


def demand_of(streams: Streams, context: ContextShard | None, *, head_dim: int, dtype: torch.dtype) -> Demand:
    """Demand of streams whose queries, keys and values are ``dtype``."""
    chunk, size = (streams.length, 1) if context is None else (context.chunk, context.size)
    return Demand(PRECISIONS[str(dtype).removeprefix("torch.")], head_dim, chunk, streams.clean, size)


def reason_against(cls: type[AttentionBackend], demand: Demand, device: torch.device) -> str | None:
    """Missing or unsupported reason, or None if the backend works on this machine."""
    return cls.missing_reason(demand, device) or cls.unsupported_reason(demand)


def _all() -> list[type[AttentionBackend]]:
    """Classes of all backends, those that ``auto`` prefers first."""
    return sorted(ATTENTION_BACKENDS.load_all().values(), key=lambda cls: -max(cls.priority.values(), default=0))


def _unsupported(name: str, reason: str, working: list[type[AttentionBackend]]) -> ConfigError:
    """The error of a named backend; backends that ``auto`` never takes are not recommended."""
    names = [AUTO, *(cls.name for cls in working if cls.priority and cls.name != name)]
    return ConfigError(f"kernels.attention={name}: {reason}; use {', '.join(names[:-1])} or {names[-1]}")
