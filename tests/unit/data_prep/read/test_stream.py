"""The stream of rows: whatever the ranks, the lanes and the mix, each row comes once per epoch and in one order."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_megatron.config import DiffusionConfig, ModelConfig
from data_prep.errors import DataError
from data_prep.format.manifest import load_manifest, save_manifest
from data_prep.read.order import LaneOrder
from data_prep.read.reader import RowReader
from data_prep.read.stream import PERIOD, Mix, RowStream
from pretrain.trainer.batches import Batches
from tests.unit.data_prep.read.test_reader import LENGTH, written

BATCH = 24
DIFFUSION = DiffusionConfig(block_size=2)
GOLDEN_LANES = [10, 3, 9, 5, 8, 4, 0, 7, 1, 6, 2, 1, 10, 0, 6, 3, 5, 2, 4, 9, 7, 8]
GOLDEN_MIX = [[0, 1, 1, 0, 0, 1, 1, 1], [41968, 28032, 28033, 41969, 41970, 28034, 28035, 28036]]
seeds = st.integers(0, 2**64 - 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Three data sets of 120, 59 and 31 rows or so, of different documents."""
    made = []
    for number, documents in enumerate((100, 50, 25)):
        folder = tmp_path_factory.mktemp(f"stream{number}")
        written(folder, "<u2", documents=documents, seed=number)
        made.append(folder)
    return made


def streams(folders: list[Path]) -> dict[str, RowStream]:
    readers = [RowReader(folder, "train") for folder in folders]
    weights = [0.5, 0.3, 0.2]
    return {
        "global": RowStream(readers[:1], seed=3),
        "lanes": RowStream(readers[:1], seed=3, order="lanes", lanes=6),
        "many lanes": RowStream(readers[2:], seed=3, order="lanes", lanes=64),
        "mix": RowStream(readers, weights, 3),
        "mix in lanes": RowStream(readers, weights, 3, order="lanes", lanes=4),
    }


KINDS = ("global", "lanes", "many lanes", "mix", "mix in lanes")


def batches(stream: RowStream, rank: int, size: int) -> Batches:
    model = ModelConfig(length=LENGTH, vocab_size=60_001, mask_id=60_000, bos_id=1, eos_id=2)
    return Batches(stream, model, DIFFUSION, global_batch=BATCH, micro_batch=1, rank=rank, size=size, noise_seed=9)


def delivered(stream: RowStream, size: int, steps: range):
    """What ``size`` ranks read and see in these steps: by place of the stream, (epoch, row), ids and weights."""
    keys, ids, weights = {}, {}, {}
    for rank in range(size):
        made = batches(stream, rank, size)
        for step in steps:
            read = made.keys(step)
            assert len(read.rows) == BATCH // size
            for slot, epoch, row, batch in zip(read.slots, read.epochs, read.rows, made.at(step), strict=True):
                place = step * BATCH + int(slot)
                assert place not in keys
                keys[place] = (int(epoch), int(row))
                ids[place], weights[place] = batch.input_ids.numpy(), batch.weight.numpy()
    return keys, ids, weights


@pytest.mark.parametrize("kind", KINDS)
def test_any_ranks_deliver_the_stream_of_one(folders, kind):
    """8 -> 4 -> 6 -> 1 ranks over 2.3 epochs and more; each stage goes on where the last ended."""
    stream = streams(folders)[kind]
    steps = -(-int(2.3 * len(stream)) // BATCH)
    alone = delivered(stream, 1, range(steps))
    assert sorted(alone[0]) == list(range(steps * BATCH))
    borders = [0, steps // 4, steps // 2, 3 * steps // 4, steps]
    for size, begin, end in zip((8, 4, 6, 1), borders, borders[1:]):
        for one, other in zip(alone, delivered(streams(folders)[kind], size, range(begin, end))):
            for place in range(begin * BATCH, end * BATCH):
                assert np.array_equal(one[place], other[place])
    # Each data set shows each row once per epoch of its own, and begins the next one when the last is through.
    bounds = np.cumsum([0, *map(len, stream.readers)])
    read = [alone[0][place] for place in range(steps * BATCH)]
    for low, high, count in zip(bounds, bounds[1:], stream.positions(steps * BATCH)):
        own = [(epoch, row) for epoch, row in read if low <= row < high]
        assert len(own) == count
        rows = high - low
        for epoch in range(-(-count // rows)):
            part = own[epoch * rows : (epoch + 1) * rows]
            assert {number for number, _ in part} == {epoch}
            assert len(set(part)) == len(part)
    # No two samples share a key of the noise.
    assert len(set(read)) == len(read)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_documents_by_number_are_those_of_the_readers(folders, kind):
    stream = streams(folders)[kind]
    _, numbers = stream.at(np.arange(200))
    tokens = np.concatenate([reader.rows(np.arange(len(reader))) for reader in stream.readers])
    own = [reader.documents(np.arange(len(reader))) for reader in stream.readers]
    before = np.cumsum([0, *(reader.documents_started for reader in stream.readers)])
    documents = np.concatenate([found + first for found, first in zip(own, before)])  # counted through all data sets
    assert (stream.rows(numbers) == tokens[numbers]).all()
    assert (stream.documents(numbers) == documents[numbers]).all()
    for wrong in (-1, len(stream)):
        with pytest.raises(IndexError, match=f"row {wrong}: "):
            stream.rows(np.array([0, wrong]))


shapes = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(shapes, st.integers(1, 80), seeds, st.integers(0, 1000))
def test_lanes_visit_every_row_once_per_epoch(shards, lanes, seed, epoch):
    order = LaneOrder(np.array(shards), seed, lanes)
    positions = epoch * order.rows + np.arange(order.rows)
    epochs, rows = order.epoch_and_row(positions)
    assert (epochs == epoch).all()
    assert sorted(rows.tolist()) == list(range(order.rows))
    some = np.random.default_rng(0).permutation(len(positions))[:7]
    assert (order.epoch_and_row(positions[some])[1] == rows[some]).all()


@given(shapes, st.integers(1, 12), seeds)
def test_a_lane_reads_its_shards_one_after_another(shards, lanes, seed):
    order = LaneOrder(np.array(shards), seed, lanes)
    positions = np.arange(order.rows)
    shard = np.repeat(np.arange(len(shards)), shards)[order.epoch_and_row(positions)[1]]
    for lane in range(lanes):
        read = shard[order.lane(positions) == lane]
        assert len(np.unique(read)) == (np.diff(read) != 0).sum() + (len(read) > 0)


def test_lanes_shuffle_shards_rows_and_epochs():
    order = LaneOrder(np.full(20, 50), 1, 4)
    _, rows = order.epoch_and_row(np.arange(2000))
    first, second = rows[:1000], rows[1000:]
    assert (first == second).mean() < 0.05
    lane = first[::4]
    assert (np.diff(lane[:50]) == 1).mean() < 0.2
    assert len(np.unique(lane[:50] // 50)) == 1


def test_golden_lanes_and_mix():
    """Pinned: another order would break the resumption of every run that began under this one."""
    assert LaneOrder(np.array([4, 4, 3]), 5, 2).epoch_and_row(np.arange(22))[1].tolist() == GOLDEN_LANES
    owners, own = Mix([0.6, 0.4], 5).at(np.arange(70_000, 70_008))
    assert [owners.tolist(), own.tolist()] == GOLDEN_MIX


@given(st.lists(st.floats(1e-7, 1e7), min_size=1, max_size=12), seeds)
@settings(max_examples=25, deadline=None)
def test_a_mix_keeps_its_shares_and_reads_each_data_set_in_order(weights, seed):
    mix = Mix(weights, seed)
    assert mix.counts.sum() == PERIOD
    assert (mix.counts >= 1).all()
    exact = np.array(weights) / np.sum(weights) * PERIOD
    if (exact >= 1).all():
        assert (np.abs(mix.counts - exact) <= 1).all()
    owners, own = mix.at(np.arange(PERIOD - 500, PERIOD + 500))
    before = mix.positions(PERIOD - 500)
    for number in range(len(weights)):
        mine = own[owners == number]
        assert (mine == before[number] + np.arange(len(mine))).all()
        assert mix.positions(PERIOD + 500)[number] == before[number] + len(mine)
    assert mix.positions(3 * PERIOD + 77).sum() == 3 * PERIOD + 77


def test_shares_are_even_within_a_period():
    owners, _ = Mix([7, 3], 0).at(np.arange(PERIOD))
    parts = owners.reshape(64, -1).mean(1)
    assert np.abs(parts - 0.3).max() < 0.06  # 4 standard deviations of 1024 draws


@pytest.mark.parametrize(
    ("field", "value"), [("mask_id", 59_999), ("vocab_size", 60_002), ("tokenizer_sha256", "0" * 64)]
)
def test_data_sets_that_do_not_go_together_are_both_named(folders, tmp_path, field, value):
    other = Path(shutil.copytree(folders[1], tmp_path / "other"))
    save_manifest(load_manifest(other).model_copy(update={field: value}), other)
    readers = [RowReader(folder, "train") for folder in (folders[0], other)]
    with pytest.raises(DataError, match=f"^{field}: {re.escape(str(folders[0]))} has .*{re.escape(str(other))} has"):
        RowStream(readers, [1, 1])


def test_bad_weights_and_lanes(folders):
    readers = [RowReader(folder, "train") for folder in folders]
    with pytest.raises(ValueError, match="weight 0 of data set 1"):
        RowStream(readers, [1, 0, 1])
    with pytest.raises(ValueError, match="2 weights for 3 data sets"):
        RowStream(readers, [1, 2])
    with pytest.raises(ValueError, match="lanes=0"):
        RowStream(readers[:1], order="lanes", lanes=0)


def test_unigram_perplexity_of_a_mix_is_weighted_by_tokens(folders, tmp_path):
    manifests = [load_manifest(folder) for folder in folders[:2]]
    for number, (manifest, nats) in enumerate(zip(manifests, (1.0, 2.0))):
        copy = Path(shutil.copytree(folders[number], tmp_path / str(number)))
        save_manifest(manifest.model_copy(update={"validation_unigram_nats": nats}), copy)
    tokens = [manifest.splits["validation"].tokens for manifest in manifests]
    stream = RowStream([RowReader(tmp_path / str(number), "validation") for number in range(2)])
    assert stream.unigram_perplexity == pytest.approx(np.exp((tokens[0] + 2 * tokens[1]) / sum(tokens)))


@pytest.mark.parametrize("kind", ["global", "mix"])
def test_a_row_is_found_where_it_is_stored(folders, kind):
    stream = streams(folders)[kind]
    numbers = np.random.default_rng(0).permutation(len(stream))
    for number, place in zip(numbers, stream.locate(numbers)):
        reader = RowReader(place["data"], "train")
        assert np.array_equal(reader.rows(np.array([place["row"]])), stream.rows(np.array([number])))
        shard = [shard.name for shard in reader.shards].index(place["shard"])
        assert 0 <= place["row_in_shard"] < reader.shards[shard].rows
        assert place["row"] == sum(shard.rows for shard in reader.shards[:shard]) + place["row_in_shard"]
