"""Prediction of a run's memory, traffic and time from its configuration alone: the numbers of `bd3 estimate`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from bd3_megatron.config import ModelConfig
from bd3_megatron.cost import flops, memory, traffic
from bd3_megatron.cost.activations import Activations, Counter
from bd3_megatron.cost.memory import State, heaviest
from bd3_megatron.cost.partition import Chunk, parameter_count, stage_chunks
from pretrain.config.schema import RunConfig
from pretrain.estimate.devices import Device

# Allowances on CUDA that no count gives: what the driver, cuBLAS and the kernels' code take, what NCCL takes for each
# group of ranks, and memory that the caching allocator cannot reuse, as a part of what lives for a micro-batch.
CONTEXT_BYTES = 0.6e9
GROUP_BYTES = 0.3e9
FRAGMENTATION = 0.05
# Times that a kept activation's bytes move outside of matrix products: written and read in the forward pass, read in
# the backward pass, where a gradient of its size is written and read.
_MOVES = 5
# Bytes that the optimizer step moves for each parameter that a rank updates: Adam reads 16 and writes 12, the EMA 12,
# norm and clipping 12, zeroing 4, weights for the model 4.
_OPTIMIZER_MOVES = 60


@dataclass(frozen=True)
class Stage:
    """One pipeline stage; bytes are of its heaviest rank.

    Attributes:
        parameters: on one tensor-parallel rank, vocabulary padding included.
        state: bytes kept all the time.
        in_flight: micro-batches whose activations are kept at once, in whole stages (a fraction where chunks differ).
        activations: of all micro-batches in flight, by part.
        working: alive for a moment beside them (gradients of a layer, recomputation, logits).
        optimizer: temporaries of the optimizer step, when no activations are alive.
        buffers: of communication.
        allowance: CUDA context, NCCL, fragmentation; 0 on the CPU.
        forward: FLOPs of one micro-batch's forward pass on one rank.
        traffic: sent by one rank in a step.
    """

    number: int
    layers: int
    parameters: int
    state: State
    in_flight: float
    activations: Activations
    working: float
    optimizer: float
    buffers: float
    allowance: float
    forward: float
    traffic: list[traffic.Traffic]

    @property
    def allocated(self) -> float:
        """Peak of what tensors take, bytes."""
        return self.state.total + self.buffers + max(self.activations.total + self.working, self.optimizer)

    @property
    def total(self) -> float:
        return self.allocated + self.allowance


@dataclass(frozen=True)
class Prediction:
    """All numbers of one configuration on one kind of device.

    Attributes:
        config: with ``model.vocab_size`` resolved.
        data_size: data-parallel ranks.
        efficiency: assumed part of the peak that matrix products reach.
        per_node: devices of one node.
    """

    config: RunConfig
    world_size: int
    data_size: int
    device: Device
    efficiency: float
    per_node: int

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def parameters(self) -> int:
        return self.model.parameters(self.model.vocab_size)

    @property
    def cuda(self) -> bool:
        return self.device.name != "CPU"

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank in one step."""
        return self.config.train.global_batch // (self.config.train.micro_batch * self.data_size)

    @property
    def tokens_per_step(self) -> int:
        """Data tokens in one step over all ranks."""
        return self.config.train.global_batch * self.model.length

    @property
    def mask_rate(self) -> float:
        return self.config.diffusion.mean_masked_fraction

    @property
    def peak_flops(self) -> float:
        """Peak FLOP/s of one device in the precision of training."""
        stated = self.config.log.peak_tflops
        if stated is not None:
            return stated * 1e12
        return self.device.bf16_flops if self.config.train.precision == "bf16" else self.device.fp32_flops

    @property
    def checkpoint_bytes(self) -> int:
        return memory.checkpoint_bytes(self.config.engine(), self.data_size)

    def counter(self, micro_batch: int | None = None) -> Counter:
        config = self.config
        return Counter(
            config.engine(),
            micro_batch or config.train.micro_batch,
            self.mask_rate,
            self.cuda,
            config.data.document_mask,
        )

    def evaluation(self, limit: float) -> tuple[float, float]:
        """Bytes of tensors alive in an evaluation on the heaviest stage, smaller than ``limit`` and others: the most of
        each at one moment."""
        options, chunks = self.config.eval, stage_chunks(self.model, self.parallel)[self.heaviest.number]
        micro = options.micro_batch or self.config.train.micro_batch
        counter = self.counter(min(micro, options.rows or micro))
        moments = [moment for chunk in chunks for moment in counter.evaluating(chunk)]
        small, large = ([sum(t for t in m if (t >= limit) == side) for m in moments] for side in (False, True))
        return max(small), max(large)

    def mapped_activations(self, limit: float) -> float:
        """Bytes of kept activations in tensors of at least ``limit`` bytes: those between the matrices of MLPs."""
        if self.parallel.recompute == "full":
            return 0.0
        counter, stage = self.counter(), self.heaviest
        return stage.in_flight * stage.layers * sum(t for t in counter.in_mlp() if t >= limit)

    # ---- a stage ----

    @cached_property
    def stages(self) -> list[Stage]:
        return [self._stage(number, chunks) for number, chunks in enumerate(stage_chunks(self.model, self.parallel))]

    @property
    def parallel(self):
        return self.config.parallel

    @property
    def heaviest(self) -> Stage:
        """The stage whose ranks need most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    def _stage(self, number: int, chunks: list[Chunk]) -> Stage:
        parallel, counter = self.parallel, self.counter()
        state = heaviest(memory.state_bytes(self.config.engine(), self.data_size, number))
        flying = in_flight(parallel.pipeline, len(chunks), number, self.micro_batches)
        kept = Activations()
        for chunk, count in zip(chunks, flying):
            kept += counter.chunk(chunk) * count
        activations = kept
        working = counter.working(chunks[-1])
        groups = sum(n > 1 for n in (parallel.tensor, parallel.context, parallel.pipeline, self.data_size))
        allowance = 0.0
        if self.cuda:
            allowance = CONTEXT_BYTES + groups * GROUP_BYTES + FRAGMENTATION * (kept.total + working)
        return Stage(
            number=number,
            layers=sum(chunk.layers for chunk in chunks),
            parameters=sum(parameter_count(self.model, chunk, parallel.tensor) for chunk in chunks),
            state=state,
            in_flight=sum(flying) / len(chunks),
            activations=activations,
            working=working,
            # torch's Adam takes the square roots of all second moments at once on CUDA, tensor by tensor on CPU.
            optimizer=4.0 * state.owned if self.cuda else 8.0 * self._largest,
            buffers=self._buffers(counter),
            allowance=allowance,
            forward=self._forward(chunks),
            traffic=self._traffic(chunks, number, state, counter),
        )

    @property
    def _largest(self) -> int:
        """Elements of the largest parameter of a rank."""
        model, tensor = self.model, self.parallel.tensor
        return max(model.vocab_size * model.hidden, model.hidden * model.ffn * 2) // tensor

    def _buffers(self, counter: Counter) -> float:
        """Gathered activations of sequence parallelism, what pipelines receive, and ZeRO's buckets."""
        parallel, zero, size = self.parallel, self.config.zero, self.config.train.element_bytes
        whole = counter.rows.positions / parallel.context * counter.micro_batch * self.model.hidden * size
        found = whole if parallel.sequence else 0.0
        if parallel.pipeline > 1:
            found += 2 * whole / (parallel.tensor if parallel.sequence else 1)
        if zero.stage > 1:
            found += memory.ZERO_BUCKET * 4
        if zero.stage == 3:  # gathered weights stay until as many as DeepSpeed's limit are alive
            found += min(1e9, self.parameters / parallel.tensor) * size
        return found

    def _forward(self, chunks: list[Chunk]) -> float:
        """Forward FLOPs of one micro-batch on one rank of a stage."""
        one, two = (self._flops(self.model.model_copy(update={"layers": n})) for n in (1, 2))
        layer = two.total - one.total
        end = one.total - layer  # the head, less what the last layer leaves out
        count = sum(chunk.layers for chunk in chunks) * layer + (end if any(chunk.head for chunk in chunks) else 0)
        tokens = self.config.train.micro_batch * self.model.length
        return count * tokens / (self.parallel.tensor * self.parallel.context)

    def _flops(self, model: ModelConfig) -> flops.Flops:
        return flops.forward_flops(model, self.config.diffusion, self.mask_rate)

    def _traffic(self, chunks: list[Chunk], number: int, state: State, counter: Counter) -> list[traffic.Traffic]:
        parallel, rows = self.parallel, counter.rows
        last = parallel.pipeline * parallel.interleave - 1
        virtual = [number + parallel.pipeline * place for place in range(len(chunks))]
        return traffic.step_traffic(
            self.config.engine(),
            chunks=chunks,
            stages=[(v, last - v) for v in virtual],
            state=state,
            positions=rows.positions,
            after=rows.after,
            clean_positions=rows.clean or rows.positions,
            head_rows=counter.head_rows,
            micro_batch=counter.micro_batch,
            micro_batches=self.micro_batches,
            data_size=self.data_size,
        )

    # ---- time ----

    def link_rate(self, kind: traffic.Traffic) -> float:
        """Bytes/s of the link that a kind of traffic runs over."""
        return self.device.link if kind.span <= self.per_node else self.device.network

    @cached_property
    def seconds(self) -> dict[str, float]:
        """One optimizer step by part, in seconds, of the slowest stage.

        Matrix products run at ``efficiency`` times the peak; norms and other pointwise work is bound by memory;
        communication runs at the full rate of its link and, but for gradients with ``parallel.overlap``, beside
        nothing; a pipeline of p stages with v chunks is idle for (p - 1) / v micro-batches.
        """
        found = [self._stage_seconds(stage) for stage in self.stages]
        return max(found, key=lambda parts: sum(parts.values()))

    def _stage_seconds(self, stage: Stage) -> dict[str, float]:
        count = self.micro_batches
        again = {"none": 0.0, "selective": self._attention_share, "full": 1.0}[self.parallel.recompute]
        products = (3 + again) * stage.forward / (self.peak_flops * self.efficiency)
        kept = sum((self._made(chunk) for chunk in stage_chunks(self.model, self.parallel)[stage.number]), 0.0)
        pointwise = _MOVES * kept / self.device.bandwidth
        sent = {kind: kind.sent / self.link_rate(kind) for kind in stage.traffic}
        once = ("data-parallel", "ZeRO", "tied")
        within = sum(s for kind, s in sent.items() if not kind.kind.startswith(once))
        hidden = sum(s for kind, s in sent.items() if kind.hidden)
        after = sum(s for kind, s in sent.items() if kind.kind.startswith(once) and not kind.hidden)
        micro = products + pointwise + within / count
        idle = (self.parallel.pipeline - 1) / self.parallel.interleave
        return {
            "matrix products": count * products,
            "pointwise": count * pointwise,
            "communication in layers": within,
            "pipeline bubble": idle * micro,
            "gradients and weights": after + max(0.0, hidden - 2 / 3 * micro),
            "optimizer": _OPTIMIZER_MOVES * stage.state.owned / self.device.bandwidth,
        }

    def _made(self, chunk: Chunk) -> float:
        """Activations of a chunk without recomputation; computing them twice moves them twice."""
        counter = self.counter()
        layers = [counter.layer(n).total for n in range(chunk.first_layer, chunk.first_layer + chunk.layers)]
        times = 1.5 if self.parallel.recompute == "full" else 1.0
        return times * sum(layers) + (counter.head().total if chunk.head else 0.0)

    @property
    def _attention_share(self) -> float:
        parts = self._flops(self.model)
        return parts.attention / parts.total

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Data tokens."""
        return self.tokens_per_step / self.step_seconds

    @property
    def days(self) -> float:
        return self.config.train.steps * self.step_seconds / 86_400

    def utilization(self) -> dict[str, float]:
        """MFU against the useful FLOPs, and against 6 N."""
        rate = self.tokens_per_second / (self.peak_flops * self.world_size)
        useful = flops.training_flops_per_token(self.model, self.config.diffusion, self.mask_rate)
        return {"useful": useful * rate, "six_n": flops.six_n(self.model) * rate}


def in_flight(stages: int, chunks: int, stage: int, micro_batches: int) -> list[int]:
    """Micro-batches whose activations each chunk of a stage keeps at most, in Megatron's 1F1B schedules.

    Plain: stage s of p begins its first backward pass when p - s micro-batches have passed. Interleaved: it takes
    2 (p - s - 1) + (v - 1) p chunks ahead and one more, p micro-batches of one chunk after p of the other.
    """
    if chunks == 1:
        return [min(micro_batches, stages - stage)]
    ahead = min(micro_batches * chunks, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1)
    counts = [0] * chunks
    for turn in range(ahead):
        counts[turn // stages % chunks] += 1
    return counts
