"""Rows by number: equal to what was written for any numbers in any order, and damage is named."""

import json
import os
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.format.manifest import Manifest, Recipe, Split, load_manifest, save_manifest
from data_prep.format.pack import RowFormat
from data_prep.format.shards import write_shard
from data_prep.read.open_files import default_limit
from data_prep.read.reader import RowReader

LENGTH, ROWS = 10, 103


def written(folder: Path, dtype: str, documents: int = 100, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Write a data set without text; return its rows and each position's document, both ``[rows, length]``."""
    rng = np.random.default_rng(seed)
    count = documents
    form = RowFormat(LENGTH, "wrap", 1, 2, True, True)
    documents = [rng.integers(3, 60_000, size=int(n)).tolist() for n in rng.integers(0, 25, size=count)]
    stream = np.array([token for ids in documents for token in (*ids, 2)], dtype)
    stream = stream[: len(stream) // form.width * form.width]
    starts = np.cumsum([0, *(len(ids) + 1 for ids in documents)])[:-1]
    places = [(a, min(a + 7 * form.width, len(stream))) for a in range(0, len(stream), 7 * form.width)]
    chunks = [form.cut(stream[a:b], starts[(starts >= a) & (starts < b)] - a) for a, b in places]
    splits = {}
    for name in ("train", "validation"):
        (folder / name).mkdir()
        shards = [write_shard(folder / name, name, i, chunks[3 * i : 3 * i + 3]) for i in range(-(-len(chunks) // 3))]
        rows = sum(len(chunk.tokens) for chunk in chunks)
        splits[name] = Split(
            documents=count,
            text_bytes=0,
            rows=rows,
            tokens=rows * LENGTH,
            dropped_tokens=0,
            unigram_entropy=0.0,
            shards=shards,
        )
    (folder / "tokenizer.json").write_text("{}")
    recipe = Recipe(
        length=LENGTH,
        packing="wrap",
        documents=True,
        add_bos=True,
        add_eos=True,
        tokenizer="bpe:1",
        tokenizer_sample=1.0,
        bos=None,
        eos=None,
        text_field="text",
        id_field="id",
        text_documents="line",
        min_chars=1,
        max_chars=None,
        split_seed=0,
        validation_fraction=0.5,
        rows_per_member=7,
        rows_per_shard=21,
    )
    manifest = Manifest(
        package_version="0",
        length=LENGTH,
        dtype=dtype,
        vocab_size=60_001,
        bos_id=1,
        eos_id=2,
        mask_id=60_000,
        tokenizer_sha256=sha256_file(folder / "tokenizer.json"),
        recipe=recipe,
        sources=[],
        validation_unigram_nats=1.0,
        validation_unigram_perplexity=1.0,
        splits=splits,
    )
    save_manifest(manifest, folder)
    tokens = np.concatenate([chunk.tokens for chunk in chunks])
    sizes = [len(document) + 1 for document in documents]  # with EOS
    stream = np.repeat(np.arange(count), sizes)[: len(tokens) * (LENGTH - 2)].reshape(-1, LENGTH - 2)
    return tokens, np.pad(stream, ((0, 0), (1, 1)), "edge")


@pytest.fixture(scope="module", params=["<u2", "<u4"])
def data_set(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    return folder, *written(folder, request.param)


@pytest.fixture
def copy(data_set, tmp_path) -> Path:
    return Path(shutil.copytree(data_set[0], tmp_path / "copy"))


@given(data=st.data())
def test_any_rows_in_any_order(data_set, data):
    folder, tokens, documents = data_set
    reader = RowReader(folder, "train")
    assert (len(reader), reader.length) == (len(tokens), LENGTH)
    assert len(reader.shards) > 3
    indices = np.array(data.draw(st.lists(st.integers(0, len(tokens) - 1), max_size=60)), np.int64)
    found = reader.rows(indices)
    assert found.dtype == tokens.dtype
    assert found.shape == (len(indices), LENGTH)
    assert (found == tokens[indices]).all()
    assert (reader.documents(indices) == documents[indices]).all()


@pytest.mark.parametrize("limit", [1, 2, 1000])
def test_rows_do_not_depend_on_how_many_files_are_open(data_set, monkeypatch, limit):
    folder, tokens, documents = data_set
    monkeypatch.setattr("data_prep.read.open_files.default_limit", lambda: limit)
    reader = RowReader(folder, "train")
    rng = np.random.default_rng(0)
    for size in (1, 2, 200, 3):
        indices = rng.integers(0, len(tokens), size=size)
        for _ in range(2):
            assert (reader.rows(indices) == tokens[indices]).all()
            assert (reader.documents(indices) == documents[indices]).all()
        assert 1 <= len(reader._files) <= limit
    for wrong in (-1, len(tokens), 2**62):
        with pytest.raises(IndexError, match=f"row {wrong}: "):
            reader.rows(np.array([0, wrong]))


def test_all_readers_of_a_process_share_the_limit(data_set, monkeypatch):
    folder, tokens, _ = data_set
    monkeypatch.setattr("data_prep.read.open_files.default_limit", lambda: 3)
    readers = [RowReader(folder, "train") for _ in range(4)]
    for _ in range(2):
        for reader in readers:
            assert (reader.rows(np.arange(len(reader))) == tokens).all()
            assert sum(len(other._files) for other in readers) <= 3


@pytest.mark.parametrize(("soft", "limit"), [(1024, 512), (10**6, 4096), (1, 1), (resource.RLIM_INFINITY, 4096)])
def test_at_most_half_of_the_files_a_process_may_open_are_kept_open(monkeypatch, soft, limit):
    monkeypatch.setattr("data_prep.read.open_files.resource.getrlimit", lambda _: (soft, resource.RLIM_INFINITY))
    assert default_limit() == limit


def test_neighbouring_rows_are_one_read(data_set, monkeypatch):
    folder, tokens, _ = data_set
    reads = []
    read = os.preadv
    monkeypatch.setattr("data_prep.read.open_files.os.preadv", lambda *args: reads.append(1) or read(*args))
    reader = RowReader(folder, "train")
    rows = reader.manifest.splits["train"].shards[0].members[0][2]
    assert (reader.rows(np.arange(rows)[::-1]) == tokens[:rows][::-1]).all()
    assert len(reads) == 1


def test_threads_read_the_same_rows(data_set, monkeypatch):
    folder, tokens, _ = data_set
    monkeypatch.setattr("data_prep.read.open_files.default_limit", lambda: 1)
    reader = RowReader(folder, "train")
    indices = np.random.default_rng(0).integers(0, len(tokens), size=(8, 100))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(reader.rows, indices))
    assert all((rows == tokens[wanted]).all() for rows, wanted in zip(found, indices))


def test_members_of_any_size_are_read(data_set, tmp_path):
    """A manifest whose members are not all alike but for the last: found by search."""
    folder, tokens, _ = data_set
    shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((folder / "manifest.json").read_text())
    split = content["splits"]["train"]
    for shard in split["shards"][:1]:  # its first member as two, which begin at the same documents' starts
        begin, docs, rows, starts = shard["members"][0]
        raw = np.memmap(folder / "train" / shard["name"], np.uint8, "r")
        pairs = raw[docs : docs + 8 * starts].view("<i4").reshape(-1, 2)
        early = int((pairs[:, 0] < 1).sum())
        shard["members"][:1] = [[begin, docs, 1, early]]
        shard["rows"] -= rows - 1
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(content))
    reader = RowReader(tmp_path / "copy", "train")
    kept = np.r_[0, 7 : len(tokens)]
    assert (reader.rows(np.arange(len(reader))) == tokens[kept]).all()


@pytest.mark.parametrize("read_before", [False, True])
def test_a_shard_that_is_cut_after_the_data_set_was_opened_is_named(copy, read_before):
    reader = RowReader(copy, "train")
    if read_before:
        reader.rows(np.arange(len(reader)))  # every file is open now
    os.truncate(copy / "train" / "train-000001.tar", 512)
    with pytest.raises(
        DataError, match=r"train-000001\.tar: (512 bytes|ends before byte \d+), the manifest says"
    ) as caught:
        reader.rows(np.arange(len(reader)))
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_replaced_is_named_when_it_is_opened(copy, data_set):
    reader = RowReader(copy, "train")
    shard = copy / "train" / "train-000001.tar"
    raw = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(raw)
    with pytest.raises(DataError, match=r"train-000001\.tar: was replaced or changed while it was in use"):
        reader.rows(np.arange(len(reader)))
    assert (RowReader(copy, "train").rows(np.arange(len(reader))) == data_set[1]).all()


def test_a_shard_that_is_unlinked_while_it_is_open_goes_on(copy, data_set):
    reader = RowReader(copy, "train")
    every = np.arange(len(reader))
    reader.rows(every)
    shutil.rmtree(copy)
    assert (reader.rows(every) == data_set[1]).all()
    reader._files.close()
    with pytest.raises(DataError, match=r"train-000000\.tar: this shard is missing"):
        reader.rows(every)


def test_rows_outside_their_shard_are_refused(copy):
    content = json.loads((copy / "manifest.json").read_text())
    content["splits"]["train"]["shards"][1]["members"][0][0] += 10**6
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"train-000001\.tar: its rows lie outside it"):
        RowReader(copy, "train")


def test_opening_looks_at_each_shard_once(copy, monkeypatch):
    looked, stat = [], os.stat

    def counted(path, *args, **options):
        looked.append(str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr("data_prep.format.manifest.os.stat", counted)
    shards = RowReader(copy, "train").shards
    assert sum(path.endswith(".tar") for path in looked) == len(shards)


@pytest.mark.parametrize("indices", [[-1], [0, 10**6], [[0]], [0.5]])
def test_numbers_that_are_no_rows(data_set, indices):
    reader = RowReader(data_set[0], "train")
    for read in (reader.rows, reader.documents):
        with pytest.raises(IndexError, match=r"^rows? "):
            read(np.array(indices))


@pytest.mark.parametrize("change", [-10240, -512, 512])
def test_a_cut_or_grown_shard_is_named_at_open(copy, change):
    shard = copy / "train" / "train-000001.tar"
    os.truncate(shard, shard.stat().st_size + change)
    with pytest.raises(DataError, match=r"train-000001\.tar: \d+ bytes, the manifest says"):
        RowReader(copy, "train")
    RowReader(copy, "validation").verify()


def test_a_missing_shard_is_named_at_open(copy):
    (copy / "train" / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train-000002\.tar: this shard is missing"):
        RowReader(copy, "train")


@pytest.mark.parametrize("name", ["train/train-000000.tar", "tokenizer.json"])
def test_verify_finds_a_flipped_bit(copy, name):
    RowReader(copy, "train").verify()
    raw = bytearray((copy / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / name).write_bytes(raw)
    with pytest.raises(DataError, match=rf"{Path(name).name}: sha256"):
        RowReader(copy, "train").verify()


def test_a_run_does_not_take_another_tokenizer(copy, tmp_path):
    (copy / "tokenizer.json").write_text("another")
    with pytest.raises(DataError, match=r"tokenizer\.json: sha256 is [0-9a-f]{12}, the manifest says"):
        RowReader(copy, "train").copy_tokenizer(tmp_path / "taken.json")
    assert not (tmp_path / "taken.json").exists()


def test_folders_that_are_no_data_set(copy, tmp_path):
    def says(text: str, folder: Path = copy) -> None:
        with pytest.raises(DataError, match=text) as caught:
            load_manifest(folder)
        assert "\n" not in str(caught.value)

    says("no such data set; write it with bd3 prep", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    says("not a data set", tmp_path / "empty")
    path = copy / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"version": 99}))
    says("version=99: this program reads versions 2 and 3")
    path.write_text(json.dumps(content | {"length": "ten"}))
    says("length: value ten: input should be a valid integer")
    path.write_text(json.dumps(content | {"format": "other"}))
    says("not the manifest of a data set")
    path.write_text(path.read_text()[:50])
    says("is no JSON")


def test_payloads_are_aligned_for_mapping(data_set):
    for split in load_manifest(data_set[0]).splits.values():
        for shard in split.shards:
            assert all(tokens % 64 == 0 and docs % 64 == 0 for tokens, docs, *_ in shard.members)


def test_manifest_keeps_one_line_per_member(data_set):
    folder = data_set[0]
    manifest = load_manifest(folder)
    lines = (folder / "manifest.json").read_text().splitlines()
    members = sum(len(shard.members) for split in manifest.splits.values() for shard in split.shards)
    assert sum(line.strip().startswith("[ ") for line in lines) == members
