"""Token tars written by webdataset: indexed in place, read row by row, checked, and refused by name."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data_prep.build.index import index_folder
from data_prep.build.token_tar import IndexConfig
from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.format.manifest import SPLITS, load_manifest
from data_prep.read.cache import ShardCache
from data_prep.read.reader import RowReader
from data_prep.verify.check import check

LENGTH = 8


@pytest.fixture(scope="module")
def tokenizer(data_set) -> Path:
    return data_set / "tokenizer.json"


def write_tar(path: Path, samples: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{path.stem}{number:04d}"} | sample)


def index(folder: Path, tokenizer: Path, **options) -> None:
    options = {"length": LENGTH, "validation_fraction": 0.3, "workers": 1} | options
    index_folder(IndexConfig(index=str(folder), tokenizer=str(tokenizer), **options), lambda line: None)


def rows_of(folder: Path) -> dict[str, np.ndarray]:
    readers = {name: RowReader(folder, name) for name in SPLITS}
    return {name: reader.rows(np.arange(len(reader))) for name, reader in readers.items()}


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 200, size=shape)


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8", ">i4"])
@pytest.mark.parametrize("each", [1, 3])
def test_arrays_of_whole_rows_are_the_rows(tmp_path, tokenizer, dtype, each):
    expected = ids(2, 30, each, LENGTH).astype(dtype)
    for number, samples in enumerate(expected):
        arrays = [sample[0] if each == 1 else sample for sample in samples]
        write_tar(tmp_path / "set" / f"{number}.tar", [{"npy": a, "json": {"source": "web"}} for a in arrays])
    before = {path: sha256_file(path) for path in (tmp_path / "set").iterdir()}
    index(tmp_path / "set", tokenizer)
    assert {path: sha256_file(path) for path in before} == before
    found = rows_of(tmp_path / "set")
    assert all(len(rows) for rows in found.values())
    assert sorted(map(tuple, np.concatenate(list(found.values())))) == sorted(map(tuple, expected.reshape(-1, LENGTH)))
    assert not load_manifest(tmp_path / "set").recipe.documents
    assert not check(tmp_path / "set", workers=1).faults


@given(data=st.data())
def test_rows_are_cut_from_samples_of_any_length(tmp_path_factory, tokenizer, data):
    folder = tmp_path_factory.mktemp("set")
    encoding = data.draw(st.sampled_from(["npy", "json"]))
    lengths = data.draw(st.lists(st.lists(st.integers(0, 30), min_size=12, max_size=20), min_size=2, max_size=3))
    streams: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "validation": []}
    for number, (name, tar) in enumerate(zip(("train", "validation", "train"), lengths)):
        samples = [ids(LENGTH if n == 0 else length, seed=n) for n, length in enumerate(tar)]
        write_tar(
            folder / name / f"{number}.tar", [{encoding: s if encoding == "npy" else s.tolist()} for s in samples]
        )
        stream = np.concatenate(samples)
        owner = np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])
        whole = len(stream) // LENGTH * LENGTH
        streams[name].append((stream[:whole], owner[:whole]))
    index(folder, tokenizer, documents=True)
    for name, parts in streams.items():
        reader = RowReader(folder, name)
        tokens = np.concatenate([stream for stream, _ in parts]).reshape(-1, LENGTH)
        # A document is a sample that has an id in the rows; tars share none.
        owners = [np.unique(owner, return_inverse=True)[1] for _, owner in parts]
        first = np.cumsum([0, *(owner.max() + 1 for owner in owners)])
        documents = np.concatenate([owner + begin for owner, begin in zip(owners, first)]).reshape(-1, LENGTH)
        chosen = np.array(data.draw(st.lists(st.integers(0, len(tokens) - 1), max_size=20)), np.int64)
        assert (reader.rows(chosen) == tokens[chosen]).all()
        assert (reader.documents(chosen) == documents[chosen]).all()
        assert (len(reader), reader.documents_started) == (len(tokens), documents.max() + 1)
    found = check(folder, workers=1)
    assert not found.faults
    assert found.splits["train"].rows == sum(len(stream) // LENGTH for stream, _ in streams["train"])


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([{"npy": np.array([{"a": 1}], object)}], r"0000\.npy: object instead of integers"),
        ([{"pyd": [1, 2, 3]}], r"0000\.pyd: pickled data can execute code when it is read, and is refused"),
        ([{"npy": np.ones(8)}], r"0000\.npy: float64 instead of integers"),
        ([{"npy": np.asfortranarray(ids(3, 8))}], r"0000\.npy: in Fortran order"),
        ([{"npy": ids(8)}, {"npy": ids(8).astype("i4")}], "arrays of <i4 and <i8; write all of one tar in one type"),
        ([{"npy": ids(8) + 10**6}], r"0000\.npy: id \d+: not among the tokenizer's ids 0 to \d+"),
        ([{"npy": -ids(8)}], r"0000\.npy: id -\d+: not among"),
        ([{"json": {"text": "abc"}}], r"0000\.json: an object without input_ids, tokens, ids"),
        ([{"json": [10**30]}], r"0000\.json: an integer of more than 64 bits"),
        ([{"json": [1.5, 2]}], r"0000\.json: no list of integers"),
        ([{"txt": "words"}], r"no sample has a \.npy or \.json member"),
        ([{"a.npy": ids(8), "b.npy": ids(8)}], r"name the one with the ids, as in --member b\.npy"),
        ([{"npy": ids(3)}], "the (train|validation) split has no row of 8 tokens"),
    ],
)
def test_what_cannot_be_indexed_is_one_line(tmp_path, tokenizer, samples, words):
    write_tar(tmp_path / "set" / "a.tar", samples)
    with pytest.raises(DataError, match=words) as caught:
        index(tmp_path / "set", tokenizer)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["a.tar"]


def header(text: bytes, version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"(((",
        header(b"((("),
        header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (10000000000000000,)}"),
        header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999999999999,)}"),
        header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (True,)}"),
        header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (-8,)}") + bytes(64),
        header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (8"),
        header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (8,)}") + bytes(63),
        header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (8,)}", b"\x09\x00") + bytes(64),
    ],
)
def test_a_damaged_array_is_one_line(tmp_path, tokenizer, payload):
    (tmp_path / "set").mkdir()
    with webdataset.TarWriter(str(tmp_path / "set" / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "0", "npy": payload})
    with pytest.raises(DataError, match=r"a\.tar: 0\.npy: ") as caught:
        index(tmp_path / "set", tokenizer)
    assert "\n" not in str(caught.value)


def test_a_huge_number_in_metadata_does_no_harm(tmp_path, tokenizer):
    write_tar(tmp_path / "set" / "a.tar", [{"npy": row, "json": [10**30]} for row in ids(20, LENGTH)])
    index(tmp_path / "set", tokenizer)
    assert sum(map(len, rows_of(tmp_path / "set").values())) == 20


def test_a_name_that_is_not_utf8_is_one_line(tmp_path, tokenizer):
    write_tar(tmp_path / "set" / "a.tar", [{"npy": ids(LENGTH)}])
    os.rename(tmp_path / "set" / "a.tar", os.fsencode(tmp_path / "set") + b"/a\xff.tar")
    with pytest.raises(DataError, match=r"a\\xff\.tar: the name is not UTF-8"):
        index(tmp_path / "set", tokenizer)


def test_nothing_of_a_pickle_is_executed(tmp_path, tokenizer):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    payload = io.BytesIO()
    np.save(payload, np.array([Bomb()], object), allow_pickle=True)
    for name, raw in (("npy", payload.getvalue()), ("pyd", pickle.dumps(Bomb()))):
        write_tar(tmp_path / name / "a.tar", [{"bin": b""}])
        with webdataset.TarWriter(str(tmp_path / name / "b.tar"), encoder=False) as writer:
            writer.write({"__key__": "0", name: raw})
        with pytest.raises(DataError):
            index(tmp_path / name, tokenizer)
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def indexed(tmp_path, tokenizer) -> Path:
    for number in range(2):
        write_tar(tmp_path / "set" / f"{number}.tar", [{"npy": row} for row in ids(40, LENGTH, seed=number)])
    index(tmp_path / "set", tokenizer)
    return tmp_path / "set"


def test_the_member_can_be_named(tmp_path, tokenizer):
    write_tar(tmp_path / "set" / "a.tar", [{"x.npy": ids(8), "y.npy": ids(8, seed=1)} for _ in range(20)])
    index(tmp_path / "set", tokenizer, member="y.npy")
    assert all((rows == ids(8, seed=1)).all() for rows in rows_of(tmp_path / "set").values())
    assert not check(tmp_path / "set", workers=1).faults


def test_an_index_is_replaced_when_asked_for(indexed, tokenizer):
    before = rows_of(indexed)
    with pytest.raises(DataError, match="there is one already; pass --overwrite"):
        index(indexed, tokenizer)
    index(indexed, tokenizer, length=4, overwrite=True)
    after = rows_of(indexed)
    assert sum(rows.size for rows in after.values()) == sum(rows.size for rows in before.values())
    assert len(list((indexed / "index").iterdir())) == 2


def test_compressed_tars_and_empty_folders_are_named(tmp_path, tokenizer):
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match=r"no \.tar file in it"):
        index(tmp_path / "set", tokenizer)
    (tmp_path / "set" / "a.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.tar\.gz: compressed"):
        index(tmp_path / "set", tokenizer)
    with pytest.raises(DataError, match="no such folder"):
        index(tmp_path / "none", tokenizer)


def test_damage_is_found(indexed):
    raw = bytearray((indexed / "1.tar").read_bytes())
    raw[700] ^= 1  # in the first array
    (indexed / "1.tar").write_bytes(raw)
    assert list(check(indexed, workers=1).faults) == [str(indexed / "1.tar")]
    with pytest.raises(DataError, match=r"1\.tar: sha256"):
        RowReader(indexed, "train").verify()
    (indexed / "1.tar").unlink()
    with pytest.raises(DataError, match=r"1\.tar: this shard is missing"):
        RowReader(indexed, "train")
    assert "this shard is missing" in check(indexed, workers=1).faults[str(indexed / "1.tar")][0]


def test_a_damaged_or_foreign_index_is_named(indexed, tmp_path):
    manifest = json.loads((indexed / "manifest.json").read_text())
    path = indexed / manifest["splits"]["train"]["index"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"index/train-\w+\.npy: sha256"):
        RowReader(indexed, "train")
    assert any("index/train" in name for name in check(indexed, workers=1).faults)
    manifest["splits"]["train"]["shards"][0]["name"] = "../outside.tar"
    (indexed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="must be a path inside"):
        RowReader(indexed, "train")


def test_a_copy_elsewhere_is_read_through_the_cache(indexed, tmp_path):
    shutil.copytree(indexed, tmp_path / "far")
    reader = RowReader(f"file://{tmp_path / 'far'}", "train", ShardCache(tmp_path / "cache", 10**8))
    assert reader.remote
    assert (reader.rows(np.arange(len(reader))) == rows_of(indexed)["train"]).all()


def test_an_index_elsewhere_longer_than_its_samples_is_not_fetched(indexed, tmp_path):
    shutil.copytree(indexed, tmp_path / "far")
    (index,) = (tmp_path / "far/index").glob("train-*.npy")
    with index.open("ab") as file:
        file.write(bytes(10**6))
    with pytest.raises(DataError, match=r"index/train-.*: has more than \d+ bytes"):
        RowReader(f"file://{tmp_path / 'far'}", "train", ShardCache(tmp_path / "cache", 10**8))
