"""The attention backends on CUDA against the fp32 reference.

How near is near: the reference itself in the lower precision makes errors too, of rounding its scores, its weights
and its results. A kernel may err by `FACTOR` times the largest of these, and by `FLOOR` of the largest value where
they happen to be small.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bd3_megatron.attention.backends import (
    ATTENTION_BACKENDS,
    AUTO,
    AttentionBackend,
    candidates,
    choose,
    demand_of,
    reason_against,
)
from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.mask import Streams

FACTOR = 3
FLOOR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
LAUNCHES = 1000

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """What differs: streams, precision, heads, several documents in a row, queries of the noisy streams only."""

    streams: Streams
    dtype: torch.dtype = BF16
    head_dim: int = 128
    heads: int = 4
    groups: int = 4
    documents: bool = False
    noisy_only: bool = False

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def __str__(self) -> str:
        s = self.streams
        more = "-documents" * self.documents + "-noisy" * self.noisy_only
        return (
            f"L{s.length}-B{s.block_size}-K{s.noisy}-clean{s.clean}-{str(self.dtype).removeprefix('torch.')}-"
            f"{self.heads}x{self.head_dim}-g{self.groups}{more}"
        )


def blocks(size: int, draws: int = 1, length: int = 512, short: int = 0) -> Streams:
    return Streams(length, size, draws, length - short if size < length else 0)


# Every value of every choice, and most pairs of them; a kernel is compiled for each.
CASES = [
    Case(blocks(4)),
    Case(blocks(4, 2), head_dim=64, heads=8, groups=2),
    Case(blocks(1), head_dim=64, noisy_only=True),
    Case(blocks(1), FP16, documents=True),
    Case(blocks(16), heads=8, groups=2, documents=True),
    Case(blocks(16, 2), FP16, head_dim=64, documents=True, noisy_only=True),
    Case(blocks(16, 4), noisy_only=True),
    Case(blocks(128), head_dim=64, heads=8, groups=2, documents=True),
    Case(blocks(128, 2), heads=8, groups=2, noisy_only=True),
    Case(blocks(128, short=128), FP16, heads=8, groups=1),
    Case(blocks(512), head_dim=64, heads=8, groups=2),
    Case(blocks(512, 2), documents=True),
    Case(blocks(96, length=1152)),
    Case(Streams(512, 1, 0, 512), head_dim=64),
    Case(Streams(512, 1, 0, 512), documents=True),
]
# What FlashAttention refuses: rows of broken tiles, other widths, fp32.
OTHERS = [
    Case(blocks(4, length=500), heads=8, groups=2),
    Case(blocks(16, 2, length=528, short=16), head_dim=80, documents=True),
    Case(blocks(4), FP32, head_dim=64, documents=True),
]
KERNELS = [cls.name for cls in candidates(AUTO, "cuda")]
PARAMETERS = [(name, case) for name in KERNELS for case in CASES]
PARAMETERS += [(name, case) for name in KERNELS if name != "flash" for case in OTHERS]


def backend_for(name: str, case: Case, device: torch.device, context: ContextShard | None = None) -> AttentionBackend:
    demand = demand_of(case.streams, context, head_dim=case.head_dim, dtype=case.dtype)
    if reason := reason_against(ATTENTION_BACKENDS.load(name), demand, device):
        pytest.skip(f"{name}: {reason}")
    return choose(name, case.streams, context, head_dim=case.head_dim, dtype=case.dtype, device=device)


def inputs(case: Case, device: torch.device, batch: int = 2) -> tuple[list[Tensor], Tensor | None]:
    """Query, key and value, and documents that begin anywhere."""
    streams = case.streams
    shapes = [(streams.tokens, batch, n, case.head_dim) for n in (case.heads, case.groups, case.groups)]
    if case.noisy_only:
        shapes[0] = (streams.predicting, *shapes[0][1:])
    qkv = [torch.randn(shape, device=device, dtype=case.dtype, requires_grad=True) for shape in shapes]
    return qkv, random_documents(streams, device, batch) if case.documents else None


def random_documents(streams: Streams, device: torch.device, batch: int = 2) -> Tensor:
    starts = torch.rand(batch, streams.length, device=device) < 5 / streams.length
    return starts.cumsum(1, dtype=torch.int32)


def with_gradients(out: Tensor, qkv: list[Tensor], upstream: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(out, qkv, upstream.to(out.dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients)))


def plain(
    case: Case, qkv: list[Tensor], upstream: Tensor, dtype: torch.dtype, documents: Tensor | None
) -> dict[str, Tensor]:
    """The reference in a precision, without a kernel that would fuse it."""
    cast = [x.detach().to(dtype).requires_grad_() for x in qkv]
    with sdpa_kernel(SDPBackend.MATH):
        out = ATTENTION_BACKENDS.load("reference")(case.streams).attend(*cast, case.scale, documents)
        return with_gradients(out, cast, upstream)


def assert_near(found: dict[str, Tensor], exact: dict[str, Tensor], rounded: dict[str, Tensor]) -> None:
    dtype = found["out"].dtype
    for name, value in found.items():
        assert value.isfinite().all(), name
        error, usual = ((x.float() - exact[name]).abs().max().item() for x in (value, rounded[name]))
        allowed = FACTOR * usual + FLOOR[dtype] * exact[name].abs().max().item()
        assert error <= allowed, f"{name}: largest error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize(("name", "case"), PARAMETERS, ids=lambda x: str(x))
def test_backend_equals_the_reference_in_fp32(name, case, device):
    backend = backend_for(name, case, device)
    qkv, documents = inputs(case, device)
    upstream = torch.randn_like(qkv[0])
    found = with_gradients(backend.attend(*qkv, case.scale, documents), qkv, upstream)
    exact, rounded = (plain(case, qkv, upstream, dtype, documents) for dtype in (torch.float32, case.dtype))
    assert_near(found, exact, rounded)


class OneOfTwo(ContextShard):
    """A rank's shard whose ``gather`` takes what the other holds from the whole keys and values, in that order."""

    def holding(self, key: Tensor, value: Tensor, streams: Streams) -> OneOfTwo:
        object.__setattr__(self, "whole", [x[streams.noisy * self.length :] for x in (key, value)])
        return self

    def gather(self, x: Tensor) -> Tensor:
        return self.whole.pop(0)


@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_two_ranks_that_share_a_row_attend_as_one(name, documented, device):
    case = Case(blocks(4, 2, length=1024), documents=documented, heads=8, groups=2)
    streams = case.streams
    qkv, documents = inputs(case, device)
    upstream = torch.randn_like(qkv[0])
    exact, rounded = (plain(case, qkv, upstream, dtype, documents) for dtype in (torch.float32, case.dtype))
    shards = [OneOfTwo(streams.length, 2, rank).holding(*qkv[1:], streams) for rank in range(2)]
    outs, sums = [], [torch.zeros_like(x, dtype=torch.float32) for x in qkv]
    for shard in shards:
        backend = backend_for(name, case, device, shard)

        def held(x: Tensor, shard: ContextShard = shard) -> Tensor:
            return shard.take(x.unflatten(0, (-1, streams.length)), 1).flatten(0, 1)

        out = backend.attend(*(held(x) for x in qkv), case.scale, documents)
        for total, part in zip(sums, torch.autograd.grad(out, qkv, held(upstream))):
            total += part
        outs.append(out.detach().unflatten(0, (streams.count, 2, -1)))
    first, last = ([out[:, chunk] for out in outs] for chunk in range(2))  # chunks 0, 1 and 3, 2
    whole = torch.cat([*first, *reversed(last)], 1).flatten(0, 1)
    assert_near(dict(zip(("out", "dq", "dk", "dv"), (whole, *sums))), exact, rounded)


@pytest.mark.parametrize(
    "case", [Case(blocks(4), heads=8, groups=8), Case(blocks(16, 2), head_dim=64, heads=8, groups=2)], ids=str
)
def test_flash_gives_the_same_gradients_at_every_launch(case, device):
    """But for the order in which fp32 sums are made; a race shows as a value far off."""
    backend = backend_for("flash", case, device)
    qkv, _ = inputs(case, device, batch=8)
    out = backend.attend(*qkv, case.scale, None)
    upstream = torch.randn_like(out)
    first = torch.autograd.grad(out, qkv, upstream, retain_graph=True)
    worst = torch.zeros(3, device=device)
    for _ in range(LAUNCHES):
        again = torch.autograd.grad(out, qkv, upstream, retain_graph=True)
        differences = [(one.float() - other.float()).abs().max() for one, other in zip(again, first)]
        worst = torch.maximum(worst, torch.stack(differences).nan_to_num(torch.inf))
    largest = torch.stack([x.abs().max().float() for x in first])
    assert (worst <= 0.01 * largest).all(), f"differences {worst.tolist()} beside values up to {largest.tolist()}"


def test_flex_compiles_nothing_for_further_micro_batches(device):
    case = Case(blocks(16), documents=True)
    backend = backend_for("flex", case, device)
    qkv, documents = inputs(case, device)

    def micro_batch(documents: Tensor) -> None:
        for asking in (qkv[0], qkv[0][: case.streams.predicting]):  # the last layer has noisy queries only
            backend.attend(asking, *qkv[1:], case.scale, documents).sum().backward()

    micro_batch(documents)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            micro_batch(random_documents(case.streams, device))


def test_flash_compiles_nothing_for_further_micro_batches(device):
    case = Case(blocks(16), documents=True)
    backend = backend_for("flash", case, device)
    from flash_attn.cute import interface

    qkv, documents = inputs(case, device)
    kernels = [interface._flash_attn_fwd.compile_cache.cache, interface._flash_attn_bwd.compile_cache.cache]
    counts = []
    for _ in range(3):
        backend.attend(*qkv, case.scale, documents).sum().backward()
        documents = random_documents(case.streams, device)
        counts.append([len(cache) for cache in kernels])
    assert counts[0] == counts[1] == counts[2]


def test_auto_takes_flash_on_hopper_where_the_package_is(device):
    case = Case(blocks(4))
    backend_for("flash", case, device)
    taken = choose("auto", case.streams, None, head_dim=case.head_dim, dtype=case.dtype, device=device)
    assert taken.name == "flash"
