"""Text from an S3-compatible store to a data set, and a data set in the store back to rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.build.prep import PrepConfig, prep
from data_prep.errors import DataError
from data_prep.format import remote
from data_prep.read.cache import ShardCache
from data_prep.read.reader import RowReader


def texts(name: str) -> bytes:
    lines = [{"id": f"{name}-{i}", "text": f"{name} {i} " + "it is a truth " * (i % 7 + 3)} for i in range(60)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def config(inputs: list[str], out: Path) -> PrepConfig:
    sizes = {"length": 16, "rows_per_member": 8, "rows_per_shard": 24, "validation_fraction": 0.3}
    return PrepConfig(inputs=inputs, out=str(out), tokenizer="bpe:280", **sizes)


@pytest.fixture
def stored(s3, tmp_path, monkeypatch):
    """A data set made of texts in the store, on this disk and in the store; retries do not wait."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    for name in ("one", "two"):
        s3.put_object(Bucket="texts", Key=f"in/{name}.jsonl", Body=texts(name))
    prep(config(["s3://texts/in/"], tmp_path / "data"))
    for path in (tmp_path / "data").rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), "texts", f"data/{path.relative_to(tmp_path / 'data')}")
    return tmp_path / "data"


def test_texts_in_the_store_give_the_data_set_of_local_ones(stored, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_bytes(texts(name))
    prep(config([str(tmp_path / f"{name}.jsonl") for name in ("one", "two")], tmp_path / "local"))
    files = [path.relative_to(stored) for path in stored.rglob("*") if path.is_file()]
    assert len(files) > 5
    for file in files:
        assert (tmp_path / "local" / file).read_bytes() == (stored / file).read_bytes()
    lines: list[str] = []
    prep(config(["s3://texts/in/"], stored), lines.append)
    assert "nothing to do" in lines[0]


def test_a_data_set_in_the_store_gives_its_rows(stored, tmp_path):
    here = RowReader(stored, "train")
    limit = 2 * max(shard.bytes for shard in here.shards)  # less than all of it
    there = RowReader("s3://texts/data", "train", ShardCache(tmp_path / "cache", limit))
    assert len(here.shards) > 3
    numbers = np.random.default_rng(0).permutation(len(here))
    there.prefetch(numbers[:5])
    for some in np.array_split(numbers, 6):
        assert (there.rows(some) == here.rows(some)).all()
        assert (there.documents(some) == here.documents(some)).all()
        assert sum(path.stat().st_size for path in (tmp_path / "cache" / "bd3-shards").glob("*.tar")) <= limit


def test_a_damaged_shard_in_the_store_is_named(stored, s3, tmp_path):
    shard = RowReader(stored, "train").shards[1]
    key = f"data/train/{shard.name}"
    whole = (stored / "train" / shard.name).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    cache = ShardCache(tmp_path / "cache", 1 << 30, tries=2)
    rows = np.array([24])  # of the second shard
    for body, message in ((bytes(flipped), "sha256 is"), (whole[:5120], "it has 5120 bytes, 10240 are expected")):
        s3.put_object(Bucket="texts", Key=key, Body=body)
        reader = RowReader("s3://texts/data", "train", cache)
        reader.rows(np.array([0]))
        with pytest.raises(DataError, match=f"s3://texts/{key}: cannot be fetched after 2 tries") as caught:
            reader.rows(rows)
        assert message in str(caught.value)
    s3.delete_object(Bucket="texts", Key=key)
    with pytest.raises(DataError, match=f"s3://texts/{key}: no such file"):
        reader.rows(rows)
    assert not list((tmp_path / "cache" / "bd3-shards").glob("*.partial"))
