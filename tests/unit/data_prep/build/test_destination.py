"""Data sets written to a store: the objects of a local one, whatever breaks off, and nobody else's are touched."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
from pydantic import ValidationError

from data_prep.build import assemble, destination
from data_prep.build.destination import UNFINISHED, Store
from data_prep.build.prep import prep
from data_prep.errors import DataError
from data_prep.format import remote, upload
from data_prep.format.manifest import load_manifest
from data_prep.read.cache import ShardCache
from data_prep.read.reader import RowReader
from data_prep.repack.repack import RepackConfig, repack
from data_prep.verify.check import check
from pretrain import cli
from tests.unit.commands import bd3, die_at
from tests.unit.data_prep.build.test_prep import contents, corpus, prep_config, small_parts, trained

URL = "memory://bucket/data"


@pytest.fixture
def store(tmp_path, monkeypatch, fresh_fsspec):
    """The text, its data set on this disk, options of one in the store, and how often each object is uploaded."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    monkeypatch.setenv("BD3_CACHE", str(tmp_path / "cache"))
    corpus(tmp_path)
    prep(prep_config(tmp_path, tokenizer=trained(tmp_path), out=str(tmp_path / "whole")))
    uploads: list[str] = []
    put = upload._put

    def counted(files, path, place):
        uploads.append(place.rpartition("data/")[2])
        put(files, path, place)

    monkeypatch.setattr(upload, "_put", counted)
    return uploads


def config(tmp_path: Path, **changes):
    return prep_config(tmp_path, **{"tokenizer": trained(tmp_path), "out": URL} | changes)


def objects(url: str = URL) -> dict[str, bytes]:
    files, root = fsspec.url_to_fs(url)
    return {path[len(root) + 1 :]: files.cat_file(path) for path in files.find(root)}


def leftovers(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def stop(*args, **options):
    raise KeyboardInterrupt


def test_a_store_gets_the_files_of_a_local_data_set(store, tmp_path):
    manifest = prep(config(tmp_path))
    assert objects() == contents(tmp_path / "whole")
    assert sorted(store) == sorted([*objects(), UNFINISHED])
    assert store[-1] == "manifest.json"
    assert leftovers(tmp_path) == []
    lines: list[str] = []
    assert prep(config(tmp_path), lines.append) == manifest
    assert lines == [f"{URL}: already there, same recipe and sources; nothing to do"]
    assert check(URL, workers=1).faults == {}
    reader = RowReader(URL, "train", ShardCache(tmp_path / "shards", 1 << 30))
    numbers = np.arange(len(reader))
    assert (reader.rows(numbers) == RowReader(tmp_path / "whole", "train").rows(numbers)).all()


def test_few_shards_are_on_this_disk_at_a_time(store, tmp_path, monkeypatch):
    there = []
    put = upload._put

    def look(files, path, place):
        there.append(len(list((tmp_path / "cache").rglob("data/*/*.tar"))))
        put(files, path, place)

    monkeypatch.setattr(upload, "_put", look)
    prep(config(tmp_path))
    assert max(there) == 1
    assert len(there) > 6


@pytest.mark.parametrize("broken", ["put", "note", "publish", "removal"])
def test_a_prep_that_was_broken_off_uploads_nothing_twice(store, tmp_path, monkeypatch, broken):
    with monkeypatch.context() as patch:
        if broken == "put":
            patch.setattr(assemble, "write_shard", lambda *a, w=assemble.write_shard: w(*a) if a[2] < 2 else stop())
        elif broken == "note":
            patch.setattr(assemble, "write_text", stop)
        elif broken == "publish":
            patch.setattr(destination.Store, "publish", stop)
        else:
            patch.setattr(destination, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            prep(config(tmp_path))
    assert ("manifest.json" in objects()) == (broken == "removal")
    assert prep(config(tmp_path)) == load_manifest(tmp_path / "whole")
    assert objects() == contents(tmp_path / "whole")
    assert len(store) == len(set(store))
    assert leftovers(tmp_path) == []


def test_kills_at_every_upload(tmp_path):
    """kill -9 within an upload, behind one, and around that of the manifest; a folder stands for the store."""
    corpus(tmp_path, documents=80)
    options = ["--length", 16, "--tokenizer", trained(tmp_path), "--rows-per-member", 8, "--rows-per-shard", 48]
    command = ["prep", tmp_path / "text.jsonl", *options, "--workers", 1]
    assert bd3(*command, "--out", tmp_path / "whole", log=tmp_path / "log", before=small_parts).code == 0
    url = f"file://{tmp_path}/store/data"
    command += ["--out", url, "--work", tmp_path / "work"]
    build, local = "data_prep.build", "fsspec.implementations.local"
    for place in [
        ("data_prep.format.upload", "_put", 3),
        (local, "LocalFileSystem.mv", 1),
        (f"{build}.assemble", "write_text", 1),  # a shard is uploaded and not yet noted
        (f"{build}.destination", "upload", 3),  # of the manifest
        (f"{build}.destination", "remove", 1),  # of the claim
    ]:
        assert bd3(*command, log=tmp_path / "log", before=partial(_prepared, place)).code == -9, place
        assert {path.stat().st_mode & 0o77 for path in tmp_path.glob("work/*")} <= {0}
    done = bd3(*command, log=tmp_path / "log", before=small_parts)
    assert done.code == 0, done.err
    assert contents(tmp_path / "store" / "data") == contents(tmp_path / "whole")
    assert list((tmp_path / "work").iterdir()) == []


def _prepared(place: tuple) -> None:
    small_parts()
    die_at(*place)


def test_what_others_have_there_is_refused(store, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/data/notes.txt", b"mine")
    for overwrite, message in ((False, "exists and is not a data set"), (True, "--overwrite replaces data sets only")):
        with pytest.raises(DataError, match=message):
            prep(config(tmp_path, overwrite=overwrite))
    assert objects() == {"notes.txt": b"mine"}
    memory.rm("/bucket/data/notes.txt")
    prep(config(tmp_path))
    with pytest.raises(DataError, match="length=16, not 32; choose another --out or pass --overwrite"):
        prep(config(tmp_path, length=32))
    memory.pipe("/bucket/data/train/notes.txt", b"mine")
    with pytest.raises(DataError, match=r"it also holds train/notes\.txt"):
        prep(config(tmp_path, length=32, overwrite=True))
    memory.rm("/bucket/data/train/notes.txt")
    before = objects()
    with pytest.raises(DataError, match="fill no row"):
        prep(config(tmp_path, length=5000, overwrite=True))
    assert objects() == before
    memory.rm("/bucket/data/train/train-000001.tar")
    with pytest.raises(DataError, match=r"train-000001\.tar: 0 bytes, the manifest says"):
        prep(config(tmp_path))
    prep(config(tmp_path, length=32, overwrite=True))
    prep(prep_config(tmp_path, length=32, tokenizer=trained(tmp_path)))
    assert objects() == contents(tmp_path / "data")
    assert leftovers(tmp_path) == []


def test_unfinished_work_of_another_folder(store, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(destination.Store, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            prep(config(tmp_path, work=str(tmp_path / "one")))
    with pytest.raises(DataError, match=r"holds unfinished work of another bd3 prep; go on with its folder \(--work\)"):
        prep(config(tmp_path))
    count = len(store)
    prep(config(tmp_path, overwrite=True))
    assert set(store[count:]) == {UNFINISHED, "tokenizer.json", "manifest.json"}  # the shards are equal
    assert objects() == contents(tmp_path / "whole")


def test_a_place_taken_meanwhile(store, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "_samples", partial(_taken, assemble._samples, tmp_path))
    with pytest.raises(DataError, match="another bd3 prep has taken it meanwhile"):
        prep(config(tmp_path))
    assert "manifest.json" not in objects()


def _taken(samples, tmp_path, *args):
    other = Store(URL, str(tmp_path / "other"))
    other.work.folder.mkdir(parents=True, exist_ok=True)
    other.claim()
    return samples(*args)


def test_wrong_copies_are_tried_again_and_named(store, tmp_path, monkeypatch):
    put, calls = upload._put, []

    def damaged(files, path, place, most):
        put(files, path, place)
        calls.append(place)
        if "train-000001" in place and len([call for call in calls if call == place]) <= most:
            files.pipe_file(place, files.cat_file(place)[:-1] + b"!")

    monkeypatch.setattr(upload, "_put", partial(damaged, most=2))
    prep(config(tmp_path))
    assert objects() == contents(tmp_path / "whole")
    monkeypatch.setattr(upload, "_put", partial(damaged, most=99))
    with pytest.raises(DataError, match=r"train-000001\.tar: cannot be written after 5 tries \(the copy differs"):
        prep(config(tmp_path, length=32, overwrite=True))

    def refused(*args):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(upload, "_put", refused)
    for out in ("memory://bucket/new", f"{URL}2"):
        with pytest.raises(DataError, match=r"unfinished\.json: access denied \(Access Denied\)"):
            prep(config(tmp_path, out=out))
    assert len(list((tmp_path / "cache" / "prep").iterdir())) == 1


def test_addresses_and_work_folders_that_cannot_be(store, tmp_path):
    for out, message in (
        ("s3://key:hidden@bucket/data", "out: a password in the address"),
        ("s3://", "not the address of a folder"),
        ("s3://bucket/*", "not the address of a folder"),
        ("nope://bucket/data", "nope://bucket/data: cannot be listed"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            prep(config(tmp_path, out=out))
        assert "hidden" not in str(caught.value)
    with pytest.raises(ValidationError, match="only for a URL"):
        config(tmp_path, out="data", work="work")
    with pytest.raises(ValidationError, match="all tasks need one work folder: name it with --work"):
        config(tmp_path, part="0/2")
    folder = Store(URL, str(tmp_path / "work")).work.folder
    folder.parent.mkdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(DataError, match="is a link or belongs to another user; remove it, or choose another --work"):
        prep(config(tmp_path, work=str(tmp_path / "work")))
    assert objects() == {}


def test_shares_of_one_store(store, tmp_path):
    shares = [config(tmp_path, part=f"{k}/2", work=str(tmp_path / "work")) for k in range(2)]
    results = [prep(share) for share in shares]
    assert results[-1] is not None
    assert objects() == contents(tmp_path / "whole")


def test_faults_of_a_remote_data_set_are_named(store, tmp_path, capsys):
    prep(config(tmp_path))
    memory = fsspec.filesystem("memory")
    shard = memory.cat_file("/bucket/data/train/train-000001.tar")
    memory.pipe("/bucket/data/train/train-000001.tar", shard[:-1] + b"!")
    memory.rm("/bucket/data/train/train-000002.tar")
    memory.pipe("/bucket/data/extra", b"")
    assert cli.main(["check", URL, "--json", "--workers", "1"]) == 1
    found = {fault["file"]: fault["faults"] for fault in json.loads(capsys.readouterr().out)["faults"]}
    assert found[f"{URL}/extra"] == ["does not belong to the data set; remove it"]
    assert found[f"{URL}/train/train-000001.tar"][0].startswith("sha256 is ")
    assert found[f"{URL}/train/train-000002.tar"][0].startswith("no such file")
    assert len(found) == 3
    assert cli.main(["check", "memory://bucket/none"]) == 2
    assert capsys.readouterr().err == "memory://bucket/none/manifest.json: no such file; check the address\n"


def test_a_data_set_is_repacked_from_store_to_store(store, tmp_path):
    prep(config(tmp_path))
    repack(RepackConfig(data=URL, out="memory://bucket/long", length=32))
    repack(RepackConfig(data="memory://bucket/long", out=str(tmp_path / "back"), length=16))
    found, whole = contents(tmp_path / "back"), contents(tmp_path / "whole")
    assert {name for name in whole if found[name] != whole[name]} == {"manifest.json"}
    assert load_manifest(tmp_path / "back").repacked_from.name == "long"
    with pytest.raises(DataError, match="is the data set to repack"):
        repack(RepackConfig(data=URL, out=f"{URL}/long", length=32))


def test_an_s3_bucket(store, s3, tmp_path, monkeypatch, capsys):
    """A real protocol: shards in several parts of an upload, checksums of the store, a bucket that is missing."""
    monkeypatch.setattr(upload, "PART", 5 << 20)
    big = tmp_path / "big"
    big.write_bytes(os.urandom(11 << 20))
    read = []
    monkeypatch.setattr(upload, "sha256_remote", read.append)
    stamp = upload.upload(big, "s3://texts/big")
    assert stamp.endswith("-3")
    assert upload.upload(big, "s3://texts/big") == stamp
    url = "s3://texts/deep/data"
    with monkeypatch.context() as patch:
        patch.setattr(destination.Store, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            prep(config(tmp_path, out=url))
    prep(config(tmp_path, out=url))
    assert store.count("train/train-000000.tar") == 1
    assert read == []
    listing = s3.list_objects_v2(Bucket="texts", Prefix="deep/data/")["Contents"]
    found = {e["Key"][10:]: s3.get_object(Bucket="texts", Key=e["Key"])["Body"].read() for e in listing}
    assert found == contents(tmp_path / "whole")
    assert cli.main(["check", url, "--workers", "1"]) == 0
    with pytest.raises(DataError, match="s3://none/data: no such file or folder; check the address"):
        prep(config(tmp_path, out="s3://none/data"))
    assert "test" not in (tmp_path / "whole" / "manifest.json").read_text()
