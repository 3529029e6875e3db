"""Report of a prediction: all its numbers for JSON, and the tables for a terminal."""

from __future__ import annotations

from typing import Any

from bd3_common.text import counted
from bd3_megatron.cost import flops
from pretrain.estimate.cpu_peak import process_peak
from pretrain.estimate.prediction import CONTEXT_BYTES, FRAGMENTATION, GROUP_BYTES, Prediction, Stage


def record(prediction: Prediction) -> dict[str, Any]:
    """All numbers for JSON: bytes, FLOPs and seconds."""
    config, stage = prediction.config, prediction.heaviest
    forward = flops.forward_flops(config.model, config.diffusion)
    found: dict[str, Any] = {
        "device": prediction.device.name,
        "world_size": prediction.world_size,
        "data_parallel": prediction.data_size,
        "micro_batches": prediction.micro_batches,
        "parameters": prediction.parameters,
        "forward_flops_per_token": vars(forward) | {"total": forward.total},
        "training_flops_per_token": flops.training_flops_per_token(config.model, config.diffusion),
        "flops_per_step": flops.training_flops_per_token(config.model, config.diffusion) * prediction.tokens_per_step,
        "tokens_per_step": prediction.tokens_per_step,
        "checkpoint_bytes": prediction.checkpoint_bytes,
        "heaviest_stage": stage.number,
        "stages": [_stage_record(each) for each in prediction.stages],
        "step_seconds": prediction.step_seconds,
        "seconds": prediction.seconds,
        "tokens_per_second": prediction.tokens_per_second,
        "mfu": prediction.utilization(),
        "days": prediction.days,
    }
    if not prediction.cuda:
        parts = process_peak(prediction)
        found["process_peak_bytes"] = sum(parts.values())
        found["process_peak_parts"] = parts
    return found


def _stage_record(stage: Stage) -> dict[str, Any]:
    return {
        "layers": stage.layers,
        "parameters": stage.parameters,
        "micro_batches_in_flight": stage.in_flight,
        "memory": memory_parts(stage),
        "activations": stage.activations.parts(),
        "allocated_bytes": stage.allocated,
        "total_bytes": stage.total,
        "traffic": {kind.kind: kind.sent for kind in stage.traffic},
    }


def memory_parts(stage: Stage) -> dict[str, float]:
    """Bytes of a stage's heaviest rank by part; what offloading keeps on the host is taken off."""
    parts: dict[str, float] = dict(stage.state.parts())
    if stage.state.host:
        parts["offloaded to the host"] = -stage.state.host
    alive = stage.activations.total + stage.working
    extra = max(0.0, stage.optimizer - alive)
    return parts | {
        "activations": stage.activations.total,
        "working": stage.working,
        "optimizer beyond them": extra,
        "communication buffers": stage.buffers,
        "context, NCCL, fragmentation": stage.allowance,
    }


def report_lines(prediction: Prediction) -> list[str]:
    """The lines of the tables."""
    config, stage = prediction.config, prediction.heaviest
    parallel, train = config.parallel, config.train
    lines = [
        f"{prediction.world_size} x {prediction.device.name}: tensor {parallel.tensor} x context {parallel.context} x "
        f"pipeline {parallel.pipeline} x data {prediction.data_size}; {train.precision}, "
        f"{counted(prediction.micro_batches, 'micro-batch', 'micro-batches')} of {counted(train.micro_batch, 'row')} "
        f"on a rank",
        f"parameters            {prediction.parameters:,}; the heaviest rank holds {stage.parameters:,}",
        *_flops_lines(prediction),
        "",
        *_memory_lines(prediction),
        "",
        *_traffic_lines(prediction),
        "",
        *_time_lines(prediction),
    ]
    return lines


def _flops_lines(prediction: Prediction) -> list[str]:
    config = prediction.config
    forward = flops.forward_flops(config.model, config.diffusion)
    step = 3 * forward.total * prediction.tokens_per_step
    shares = ", ".join(f"{name} {value / forward.total:.0%}" for name, value in vars(forward).items())
    giga = forward.total / 1e9
    again = {"none": "", "selective": "; attention once more", "full": "; forward once more"}
    return [
        f"FLOPs per data token  forward {giga:.3f} G ({shares}), backward {2 * giga:.3f} G"
        f"{again[config.parallel.recompute]}",
        f"FLOPs per step        {step:.3e} useful, {prediction.tokens_per_step:,} data tokens",
        f"checkpoint            {_size(prediction.checkpoint_bytes)}",
    ]


def _memory_lines(prediction: Prediction) -> list[str]:
    config, stage = prediction.config, prediction.heaviest
    where = f" (stage {stage.number})" if len(prediction.stages) > 1 else ""
    lines = [f"memory of the heaviest rank{where}"]
    lines += [f"  {name:<30}{_size(value):>12}" for name, value in memory_parts(stage).items() if value]
    lines.append(f"  {'all':<30}{_size(stage.total):>12} of {_size(prediction.device.memory)}")
    kept = {name: value for name, value in stage.activations.parts().items() if value}
    lines.append(
        f"  activations of {stage.in_flight:g} micro-batch(es): "
        + ", ".join(f"{name.replace('_', ' ')} {_size(value)}" for name, value in kept.items())
    )
    if prediction.cuda:
        lines.append(
            f"  tensors take {_size(stage.allocated)}; assumed besides: {_size(CONTEXT_BYTES)} of CUDA, "
            f"{_size(GROUP_BYTES)} for each kind of group, {FRAGMENTATION:.0%} of activations lost. "
            f"Not yet compared with a GPU."
        )
    else:
        parts = process_peak(prediction)
        named = ", ".join(f"{name} {_size(value)}" for name, value in parts.items())
        lines.append(f"  peak of the process           {_size(sum(parts.values())):>12}: {named}")
    left_out = prediction.counter().backend.uncounted
    uncounted = [
        ("data.document_mask=true: its masks for each row are", prediction.cuda and config.data.document_mask),
        (f"kernels.attention={config.kernels.attention}: {left_out} are", left_out is not None),
        ("fp8.enabled=true: memory and time are those of bf16; FP8 copies and faster products are", config.fp8.enabled),
    ]
    lines += [f"  {what} not counted" for what, given in uncounted if given]
    if stage.total > prediction.device.memory:
        lines.append(
            "  does not fit: shard more (tensor, pipeline, distributed optimizer), recompute, or less per batch"
        )
    if len(prediction.stages) > 1:
        lines.append(
            f"  {'stage':>5}{'layers':>8}{'parameters':>16}{'in flight':>11}{'state':>12}{'activations':>13}{'all':>12}"
        )
        lines += [
            f"  {s.number:>5}{s.layers:>8}{s.parameters:>16,}{s.in_flight:>11g}{_size(s.state.total):>12}"
            f"{_size(s.activations.total):>13}{_size(s.total):>12}"
            for s in prediction.stages
        ]
    return lines


def _traffic_lines(prediction: Prediction) -> list[str]:
    kinds = prediction.heaviest.traffic
    if not kinds:
        return ["sent by a rank in a step: nothing"]
    lines = ["sent by a rank in a step"]
    for kind in kinds:
        inside = kind.span <= prediction.per_node
        link = "in the node" if inside else "over the network"
        seconds = kind.sent / prediction.link_rate(kind)
        beside = ", beside computation" if kind.hidden else ""
        lines.append(f"  {kind.kind:<52}{_size(kind.sent):>12}{seconds:>9.3f} s {link}{beside}")
    return lines


def _time_lines(prediction: Prediction) -> list[str]:
    seconds, mfu = prediction.seconds, prediction.utilization()
    parts = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items() if value >= 5e-4)
    steps = prediction.config.train.steps
    days = f"{prediction.days:.2f} days" if prediction.days >= 0.1 else f"{prediction.days * 24 * 60:.1f} minutes"
    return [
        f"step                  {prediction.step_seconds:.3f} s: {parts}",
        f"data tokens/s         {prediction.tokens_per_second:,.0f}; MFU {mfu['useful']:.1%} of useful FLOPs, "
        f"{mfu['six_n']:.1%} of 6 N D",
        f"{steps:,} steps".ljust(22) + days,
        f"assumed: matrix products at {prediction.efficiency:.0%} of {prediction.peak_flops / 1e12:.4g} TFLOP/s, links "
        f"and memory at their full rates, only gradients sent beside computation; evaluation, checkpoints left out",
    ]


def _size(value: float) -> str:
    """``1.23 GB`` of 1e9 bytes."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if abs(value) >= unit:
            return f"{value / unit:.2f} {name}"
    return f"{value / 1e3:.1f} kB"
