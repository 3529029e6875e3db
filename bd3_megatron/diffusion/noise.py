"""Noise draws keyed by sample: Philox with (seed, purpose, draw, epoch, row).

No rank has a generator of its own, so a run draws the same noise under every layout, after every resume, and on every
pipeline stage without a broadcast. numpy guarantees the raw output of Philox across versions, but not its
distributions: uniforms are computed from the raw words here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from bd3_common.errors import ConfigError
from bd3_megatron.config import DiffusionConfig
from bd3_megatron.diffusion.clips import accepted
from bd3_megatron.diffusion.counts import CountLaw
from bd3_megatron.diffusion.schedules import SCHEDULES
from bd3_megatron.diffusion.strata import Strata

# Without a limit, a clip interval that blocks almost never fall into would be redrawn forever.
_MAX_REDRAWS = 10_000


class Purpose(IntEnum):
    """Independent families of draws under one seed."""

    TRAIN = 0
    EVALUATE = 1
    STRATA = 2
    SEARCH = 3


@dataclass(frozen=True)
class SampleKeys:
    """Keys of the samples that noise is drawn for.

    Attributes:
        epochs, rows: int64 ``[n]``: epoch and row number; the pair is the sample's key.
        slots: int64 ``[n]``: index of each sample in its global batch, which determines its strata.
        batch: index of the global batch (the optimizer step), the same for all samples.
        batch_rows: rows in the global batch.
    """

    epochs: NDArray[np.int64]
    rows: NDArray[np.int64]
    slots: NDArray[np.int64]
    batch: int
    batch_rows: int

    def part(self, samples: slice) -> SampleKeys:
        """Keys of a slice of the samples."""
        return replace(self, epochs=self.epochs[samples], rows=self.rows[samples], slots=self.slots[samples])


@dataclass(frozen=True)
class Noise:
    """Noise for ``n`` samples and K draws each.

    Attributes:
        t: noise level per block, float64 ``[K, n, L / B']``; with ``diffusion.masking=counts`` the fraction of the
            block's maskable tokens that is masked.
        masked: bool ``[K, n, L]``; position 0 (BOS) is never masked.
        weight: loss weight per position, float32 ``[K, n, L]``, zero where nothing is masked.
    """

    t: NDArray[np.float64]
    masked: NDArray[np.bool_]
    weight: NDArray[np.float32]


class _Uniforms:
    """Uniforms in [0, 1) with 53 bits, in order, for one key."""

    def __init__(self, seed: int, purpose: Purpose, draw: int, epoch: int, row: int):
        # The lowest counter word counts up; the other three and the key separate the streams.
        self._bits = np.random.Philox(key=[seed, int(purpose)], counter=[0, draw, epoch, row])

    def __call__(self, n: int) -> NDArray[np.float64]:
        return (self._bits.random_raw(n) >> np.uint64(11)) * np.float64(2.0**-53)


def draw_noise(
    diffusion: DiffusionConfig, length: int, seed: int, keys: SampleKeys, purpose: Purpose = Purpose.TRAIN
) -> Noise:
    """Draw masks and their loss weights (docs/science.md, steps 1 to 3 and 7), by noise levels or by counts.

    One uniform per block decides its level or its count of masked tokens. With ``stratify`` the uniforms of a global
    batch fill its strata of the unit interval, one each (:class:`Strata`).

    With a coupling, draws 2j and 2j + 1 are a pair. Levels are t and ``beta + omega - t``: where the weight ``w(t)`` of
    one is high, that of the other is low. ``antithetic`` draws the mask bits of the two independently.
    ``complementary`` draws one uniform r per position and masks the first where ``r <= p(t)``, the second where
    ``1 - r <= p(beta + omega - t)``: if the two probabilities add up to 1, exactly one of the two masks the position.
    Each draw by itself has the distribution of a single draw, so the mean of the loss is the same. First draws fill
    their strata once, and so do second draws. Pairs of counts: :class:`CountLaw`.

    Args:
        length: L.
        seed: seed of the run; with ``keys`` and ``purpose`` it determines every value.

    Raises:
        ConfigError: resampled blocks almost never fall into the clip interval.
    """
    blocks, count, draws = length // diffusion.block_size, len(keys.rows), diffusion.draws
    strata = strata_of(diffusion, length, seed, keys, purpose)
    levels = np.empty((draws, count, blocks))
    weight = np.empty((draws, count, blocks))
    masked = np.empty((draws, count, length), dtype=bool)
    coupled = 1 if diffusion.coupling == "independent" else 2  # draws per group; a group shares one uniform per block
    law = CountLaw(diffusion, blocks) if diffusion.masking == "counts" else None
    schedule = SCHEDULES.instance(diffusion.schedule)
    for group in range(draws // coupled):
        members = range(coupled * group, coupled * (group + 1))
        place = slice(members.start, members.stop)
        for n in range(count):
            streams = [_Uniforms(seed, purpose, draw, int(keys.epochs[n]), int(keys.rows[n])) for draw in members]
            if diffusion.stratify:
                u = strata.uniforms(int(keys.slots[n]), group, streams[0])
            else:
                u = streams[0](blocks)
            mirrored = np.stack([u, 1 - u][:coupled])
            if law is None:
                levels[place, n] = t = diffusion.beta + mirrored * (diffusion.omega - diffusion.beta)
                masked[place, n] = _draw_masks(diffusion, t, streams)
                weight[place, n] = schedule.loss_weight(t)
            else:
                levels[place, n], weight[place, n], masked[place, n] = law.draw(mirrored, streams)
    masked[:, :, 0] = False
    by_position = np.repeat(weight, diffusion.block_size, axis=-1).astype(np.float32)
    return Noise(levels, masked, np.where(masked, by_position, np.float32(0)))


def strata_of(diffusion: DiffusionConfig, length: int, seed: int, keys: SampleKeys, purpose: Purpose) -> Strata:
    """Strata of the global batch of these samples; arguments as of :func:`draw_noise`."""
    coupled = 1 if diffusion.coupling == "independent" else 2
    start = _Uniforms(seed, Purpose.STRATA, int(purpose), 0, keys.batch)(1)[0]
    groups, blocks = diffusion.draws // coupled, length // diffusion.block_size
    return Strata(diffusion.noise_version, keys.batch_rows, groups, blocks, coupled, float(start))


def _draw_masks(diffusion: DiffusionConfig, t: NDArray[np.float64], streams: list[_Uniforms]) -> NDArray[np.bool_]:
    """Mask bits ``[D, L]`` of a group of D draws at levels ``[D, L / B']``."""
    if diffusion.coupling == "complementary":
        return _draw_complements(diffusion, t, streams[0])
    return np.stack([_draw_mask(diffusion, levels, uniforms) for levels, uniforms in zip(t, streams)])


def _draw_mask(diffusion: DiffusionConfig, t: NDArray[np.float64], uniforms: _Uniforms) -> NDArray[np.bool_]:
    """Mask bits ``[L]`` of one row, redrawn per block until inside the clip interval (docs/science.md, step 7)."""
    size = diffusion.block_size
    p = SCHEDULES.instance(diffusion.schedule).mask_probability(t)[:, None]
    bits = uniforms(t.size * size).reshape(-1, size) <= p
    if not _redrawn(diffusion):
        return bits.reshape(-1)
    for _ in range(_MAX_REDRAWS):
        missed = _missed(diffusion, bits)
        if not missed.any():
            return bits.reshape(-1)
        again = uniforms(t.size * size).reshape(-1, size) < p
        bits = np.where(missed[:, None], again, bits)
    raise _never_met(diffusion)


def _draw_complements(diffusion: DiffusionConfig, t: NDArray[np.float64], uniforms: _Uniforms) -> NDArray[np.bool_]:
    """Mask bits ``[2, L]`` of a complementary pair at levels ``[2, L / B']``; a block is redrawn in both draws.

    The mirrored uniform is ``1 - 2^-53 - r``: exact, and on the grid of r, so that both have the same distribution.
    """
    size = diffusion.block_size
    p = SCHEDULES.instance(diffusion.schedule).mask_probability(t)[:, :, None]

    def draw() -> NDArray[np.bool_]:
        r = uniforms(t.shape[1] * size).reshape(-1, size)
        return np.stack([r, (1 - 2.0**-53) - r]) <= p

    bits = draw()
    if _redrawn(diffusion):
        for _ in range(_MAX_REDRAWS):
            missed = np.asarray(_missed(diffusion, bits).any(axis=0))  # [L / B']
            if not missed.any():
                break
            bits = np.where(missed[:, None], draw(), bits)
        else:
            raise _never_met(diffusion)
    return bits.reshape(2, -1)


def _redrawn(diffusion: DiffusionConfig) -> bool:
    return diffusion.resample and not diffusion.full_interval


def _missed(diffusion: DiffusionConfig, bits: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """True ``[..., L / B']`` for blocks of bits ``[..., L / B', B']`` whose masked fraction is outside the interval."""
    kept = accepted(diffusion.block_size, diffusion.beta, diffusion.omega, diffusion.noise_version)
    return np.asarray(~kept[bits.sum(axis=-1)])


def _never_met(diffusion: DiffusionConfig) -> ConfigError:
    return ConfigError(
        f"diffusion.beta={diffusion.beta:g}, diffusion.omega={diffusion.omega:g}: {_MAX_REDRAWS} redraws of a block "
        f"of {diffusion.block_size} never masked a fraction inside under the {diffusion.schedule} schedule; widen the "
        f"interval or set diffusion.resample=false"
    )
