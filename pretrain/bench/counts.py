"""`bd3 bench counts`: a block's gradient by the number of its masked tokens, and the probabilities that follow."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bd3_common.errors import ConfigError
from bd3_megatron.config import LOWEST_LEVEL
from bd3_megatron.diffusion.clips import count_law
from bd3_megatron.diffusion.estimators import likelihood_objective
from bd3_megatron.diffusion.noise import Noise, SampleKeys
from pretrain.bench.options import SCATTER_GROUPS, CountsOptions
from pretrain.checkpoint.loaded_run import LoadedRun, load_chosen
from pretrain.evaluation.rows import make_batch
from pretrain.run_folder.data import open_stream, order_seed

Floats = NDArray[np.float64]

_MOST = 16
"""counts that are measured; between them the norm is interpolated"""


def bench_counts(options: CountsOptions) -> None:
    """Print the gradient of a block's nll by count, and the probabilities under which the bound's varies least.

    The gradient of a block with k of n tokens masked, weighted by 1 / (k q(k)), has the second moment
    ``sum over k of m(k) / (k^2 q(k))``, m(k) being the mean squared norm of the gradient of the summed nll. It is
    least for ``q(k)`` proportional to ``sqrt(m(k)) / k``.

    Raises:
        ConfigError: the run's objective draws no counts.
    """
    loaded = load_chosen(options)
    size = loaded.config.diffusion.block_size
    if loaded.config.diffusion.objective == "causal" or size == 1:
        raise ConfigError(f"{options.run}: this objective masks all or nothing, so that no count is drawn; use another")
    torch.set_num_threads(options.threads)
    counts = np.unique(np.linspace(1, size, min(size, _MOST)).round().astype(int))
    nll, squares = _measure(options, loaded, counts)
    rows = [
        {"count": int(k), "nll": float(x / k), "gradient": math.sqrt(s.mean()), "gradient_stderr": _error(np.sqrt(s))}
        for k, x, s in zip(counts, nll, squares)
    ]
    k = np.arange(1, size + 1)
    moments = np.interp(k, counts, np.sqrt(squares.mean(1))) ** 2
    q = np.sqrt(moments) / k
    q /= q.sum()
    found: dict[str, Any] = {
        "step": loaded.checkpoint.step,
        "block_size": size,
        "rows": rows,
        "count_probabilities": [0.0, *q.tolist()],
        "second_moments": _second_moments(loaded, moments, q),
    }
    if options.json_:
        print(json.dumps(found))
        return
    print(f"step {loaded.checkpoint.step}, {options.weights} weights, B'={size}; {options.samples} blocks per count")
    print(f"\n{'masked':>6}{'nll':>9}{'gradient norm':>15}{'+-':>9}{'least variance':>16}")
    for row in rows:
        print(
            f"{row['count']:>6}{row['nll']:>9.3f}{row['gradient']:>15.4g}{row['gradient_stderr']:>9.2g}"
            f"{q[row['count'] - 1]:>16.4f}"
        )
    print("\nsecond moment of a block's gradient, relative to uniform counts")
    for name, moment in found["second_moments"].items():
        print(f"  {name:<32}{moment:>9.3f}")
    whole = f"--diffusion.masking counts --diffusion.beta {LOWEST_LEVEL} --diffusion.omega 1"
    print(f"\n{whole} --diffusion.count-probabilities 0 " + " ".join(f"{x:.6f}" for x in _sums_to_1(q)))


def _sums_to_1(q: Floats) -> Floats:
    """Rounded to 6 digits, the sum 1 kept."""
    rounded = q.round(6)
    rounded[rounded.argmax()] += 1 - rounded.sum()
    return rounded


def _second_moments(loaded: LoadedRun, moments: Floats, q: Floats) -> dict[str, float]:
    """Of objectives, relative to uniform counts. A clipped interval's is of another expectation than the bound's."""
    diffusion = loaded.config.diffusion
    size = diffusion.block_size
    k = np.arange(1, size + 1)
    uniform = float((moments / k**2).sum() * size)
    found = {"counts, uniform": 1.0, "counts, least variance": float((moments / (k**2 * q)).sum()) / uniform}
    whole = likelihood_objective(diffusion, "levels")
    intervals = [whole, whole.model_copy(update={"beta": 0.3, "omega": 0.8})]
    if diffusion.masking == "levels" and not diffusion.full_interval:
        intervals.append(diffusion)
    for levels in intervals:
        resampled = ", resampled" if levels.resample and not levels.full_interval else ""
        found[f"levels [{levels.beta:g}, {levels.omega:g}]{resampled}"] = float(
            count_law(levels).second[1:] @ moments / uniform
        )
    return found


def _measure(options: CountsOptions, loaded: LoadedRun, counts: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Of a block with each of the counts: mean summed nll ``[n]``; mean squared gradient norm by group ``[n, groups]``.

    One block of a row is masked at a time: the others are clean, which does not matter to it, because a noisy block
    sees itself and clean blocks before it.
    """
    config = loaded.config
    model, data = config.model, config.data
    if options.data is not None:
        data = data.at(options.data)
    stream = open_stream(data, "train", model, order_seed(config))
    diffusion = likelihood_objective(config.diffusion).model_copy(update={"draws": 1})
    size = diffusion.block_size
    blocks = model.length // size
    nll = np.zeros(len(counts))
    sums, number = np.zeros((len(counts), SCATTER_GROUPS)), np.zeros(SCATTER_GROUPS)
    generator = np.random.default_rng(options.seed)
    changed = config.model_copy(update={"diffusion": diffusion})
    with loaded.engine(changed) as engine:
        module = engine.module.eval()
        for sample in range(options.samples):
            slots = np.array([sample])
            epochs, rows = stream.at(slots)
            keys = SampleKeys(epochs, rows, slots, 0, 1)
            # The first block has BOS, so that it is measured only where it is the only one.
            block = int(generator.integers(min(1, blocks - 1), blocks))
            order = block * size + generator.permutation(size)
            order = order[order > 0]
            number[sample % SCATTER_GROUPS] += 1
            for place, k in enumerate(counts):
                masked = np.zeros((1, 1, model.length), dtype=bool)
                masked[..., order[:k]] = True
                noise = Noise(np.full((1, 1, blocks), k / size), masked, masked.astype(np.float32))
                batch = make_batch(stream, model, diffusion, keys, 0, document_mask=data.document_mask, noise=noise)
                module.zero_grad(set_to_none=True)
                loss = module(batch.to(engine.world.device)).sum()
                loss.backward()
                nll[place] += loss.item() / options.samples
                sums[place, sample % SCATTER_GROUPS] += _squared_norm(module)
    return nll, sums / number


def _squared_norm(module: torch.nn.Module) -> float:
    gradients = [p.grad.float() for p in module.parameters() if p.grad is not None]
    return float(sum(g.square().sum() for g in gradients))


def _error(values: Floats) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))
