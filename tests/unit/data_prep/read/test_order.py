"""The row order: a permutation per epoch, a function of seed and position and of nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.read.order import RowOrder

GOLDEN_TEN = [9, 1, 5, 0, 4, 8, 3, 7, 6, 2, 6, 2, 8, 1, 4, 0, 7, 3, 9, 5]
GOLDEN_LARGE = [527366504253, 613478423351, 730106410477, 114209852446]
seeds = st.integers(0, 2**64 - 1)


@given(st.integers(1, 400), seeds, st.integers(0, 2**40))
def test_each_epoch_visits_every_row_once(rows, seed, epoch):
    epochs, found = RowOrder(rows, seed).epoch_and_row(epoch * rows + np.arange(rows))
    assert (epochs == epoch).all()
    assert sorted(found.tolist()) == list(range(rows))


@given(st.integers(1, 2**61), seeds, st.integers(0, 2**62))
def test_large_data_sets_stay_in_range_without_repeats(rows, seed, first):
    positions = first // rows * rows + np.arange(min(rows, 200))
    _, found = RowOrder(rows, seed).epoch_and_row(positions)
    assert ((found >= 0) & (found < rows)).all()
    assert len(np.unique(found)) == len(positions)


@given(st.integers(1, 50), seeds, st.lists(st.integers(0, 10**6), min_size=1, max_size=40), st.integers(1, 40))
def test_positions_may_be_batched_and_ordered_anyhow(rows, seed, positions, cut):
    order = RowOrder(rows, seed)
    together = np.stack(order.epoch_and_row(np.array(positions)))
    halves = [np.stack(order.epoch_and_row(np.array(part, np.int64))) for part in (positions[:cut], positions[cut:])]
    alone = [np.stack(order.epoch_and_row(np.array([p]))) for p in positions]
    assert (together == np.concatenate(halves, axis=1)).all()
    assert (together == np.concatenate(alone, axis=1)).all()


def test_epochs_and_seeds_differ():
    rows = 1000
    orders = [tuple(RowOrder(rows, seed).epoch_and_row(np.arange(2 * rows))[1]) for seed in range(20)]
    epochs = {half for order in orders for half in (order[:rows], order[rows:])}
    assert len(epochs) == 40


def test_golden_orders():
    """Pinned: another order would break the resumption of every run that began under this one."""
    assert RowOrder(10, 0).epoch_and_row(np.arange(20))[1].tolist() == GOLDEN_TEN
    assert RowOrder(10**12, 2**64 - 1).epoch_and_row(np.array([0, 1, 10**12, 10**18]))[1].tolist() == GOLDEN_LARGE


def test_rows_and_places_look_independent():
    """Chi-square of (place, row) over 4,000 epochs of 8 rows: 49 degrees of freedom, 99.9 % below 85.4."""
    rows, epochs = 8, 4000
    _, found = RowOrder(rows, 3).epoch_and_row(np.arange(rows * epochs))
    counts = np.zeros((rows, rows))
    np.add.at(counts, (np.tile(np.arange(rows), epochs), found), 1)
    expected = epochs / rows
    assert ((counts - expected) ** 2 / expected).sum() < 85.4


def test_neighbours_do_not_stay_neighbours():
    rows = 100_000
    _, found = RowOrder(rows, 1).epoch_and_row(np.arange(rows))
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(rows), found)[0, 1]) < 0.02
    assert (np.abs(np.diff(found)) == 1).mean() < 1e-3


def test_shape_is_kept_and_bad_values_are_refused():
    order = RowOrder(7, 0)
    epochs, found = order.epoch_and_row(np.arange(12).reshape(3, 4))
    assert epochs.shape == found.shape == (3, 4)
    assert epochs.dtype == found.dtype == np.int64
    assert order.epoch_and_row(np.array([], np.int64))[1].shape == (0,)
    with pytest.raises(ValueError, match="position -1"):
        order.epoch_and_row(np.array([3, -1]))
    with pytest.raises(ValueError, match="rows=0"):
        RowOrder(0, 0)
    with pytest.raises(ValueError, match="seed=-1"):
        RowOrder(7, -1)
