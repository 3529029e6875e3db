"""Repacked data sets equal those prepared that way: rows of other lengths and packings, whatever the splits hold."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from bd3_common import atomic
from data_prep.build import pool, work_folder
from data_prep.build.prep import PrepConfig, prep
from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.format.manifest import Manifest, load_manifest
from data_prep.repack.repack import RepackConfig, repack
from data_prep.verify.check import check
from tests.unit.commands import bd3, die_at

LETTERS = list("abcdefghijklmnopqrstuvwxyz")
SIZES = {"rows_per_member": 4, "rows_per_shard": 8}
LARGE = {"rows_per_member": 16, "rows_per_shard": 64}


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(atomic, "sync", lambda path: None)
    monkeypatch.setattr(work_folder, "sync", lambda path: None)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Documents of 1 to 40 letters, some in a row with nothing that the tokenizer knows, and two records left out."""
    folder = tmp_path_factory.mktemp("texts")
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(LETTERS)}, []))
    tokenizer.add_special_tokens(["[BOS]", "[EOS]", "[MASK]"])
    tokenizer.save(str(folder / "letters.json"))
    rng = np.random.default_rng(1)
    with (folder / "text.jsonl").open("w") as stream:
        for n in range(150):
            known = "".join(rng.choice(LETTERS, int(rng.integers(1, 40))))
            stream.write(json.dumps({"id": str(n), "text": "123" if n % 10 in (3, 4) else known}) + "\n")
        stream.write("no JSON\n" + json.dumps({"text": ""}) + "\n")
    return folder


def prepared(texts: Path, out: Path, **options) -> Manifest:
    values = {"inputs": (str(texts / "text.jsonl"),), "out": str(out), "tokenizer": str(texts / "letters.json")}
    return prep(PrepConfig(**values | {"validation_fraction": 0.3, "length": 32, "workers": 1} | SIZES | options))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def difference(repacked: Path, whole: Path) -> set[str]:
    """Files that differ, but for the manifest's name of the source."""
    found, wanted = contents(repacked), contents(whole)
    manifest = json.loads(found["manifest.json"])
    assert manifest.pop("repacked_from")["name"]
    assert manifest == json.loads(wanted["manifest.json"])
    assert found.keys() == wanted.keys()
    return {name for name in found if found[name] != wanted[name]}


def unguarded(**more) -> dict:
    return {"packing": "stream", "add_bos": False, "add_eos": False} | more


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        ({"length": 32}, {"length": 64}),
        ({"length": 64}, {"length": 32}),
        ({"length": 27, "documents": False}, {"length": 39, "rows_per_shard": 16}),
        ({"length": 19}, {"documents": False, "length": 33}),
        ({}, {"packing": "stream"}),
        ({"packing": "stream"}, {"packing": "wrap", "length": 15}),
        ({"packing": "stream", "length": 4} | LARGE, unguarded(length=7)),
        ({"packing": "stream", "length": 5, "add_eos": False} | LARGE, unguarded(add_eos=True)),
        ({"packing": "stream", "add_bos": False, "documents": False}, {"packing": "wrap", "rows_per_member": 2}),
        (unguarded(length=64), unguarded(length=31)),
    ],
    ids=str,
)
def test_a_repacked_data_set_equals_one_prepared_that_way(texts, tmp_path, made, wanted):
    prepared(texts, tmp_path / "made", **made)
    whole = {"add_bos": True, "add_eos": True} if wanted.get("packing") == "wrap" else {}
    manifest = prepared(texts, tmp_path / "whole", **{"length": 32} | made | whole | wanted)
    assert all(len(split.shards) > 1 for split in manifest.splits.values())
    assert repack(RepackConfig(data=str(tmp_path / "made"), out=str(tmp_path / "out"), workers=1, **wanted))
    assert difference(tmp_path / "out", tmp_path / "whole") == {"manifest.json"}
    assert not check(tmp_path / "out", workers=1).faults
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "out", "whole"]


def test_documents_without_a_token_are_told(texts, tmp_path):
    made = prepared(texts, tmp_path / "made", **unguarded())
    lines: list[str] = []
    repack(RepackConfig(data=str(tmp_path / "made"), out=str(tmp_path / "out"), packing="wrap"), lines.append)
    assert f"{made.skipped['empty']} documents without a token are not in" in lines[-2]


def test_there_and_back_again(texts, tmp_path):
    """Through rows so long that all of a split is nearly their tail."""
    prepared(texts, tmp_path / "made")
    for data, out, length in (("made", "long", 500), ("long", "back", 32)):
        repack(RepackConfig(data=str(tmp_path / data), out=str(tmp_path / out), length=length))
    split = load_manifest(tmp_path / "long").splits["validation"]
    assert split.dropped_tokens == len(split.tail.tokens) > 100
    assert difference(tmp_path / "back", tmp_path / "made") == {"manifest.json"}
    lines: list[str] = []
    repack(RepackConfig(data=str(tmp_path / "long"), out=str(tmp_path / "back"), length=32), lines.append)
    assert "nothing to do" in lines[0]
    with pytest.raises(DataError, match="other sources; choose another --out or pass --overwrite"):
        repack(RepackConfig(data=str(tmp_path / "made"), out=str(tmp_path / "back")))


def without_tail(folder: Path) -> None:
    """Make of a data set one as version 2 had it."""
    manifest = json.loads((folder / "manifest.json").read_text()) | {"version": 2}
    for split in manifest["splits"].values():
        del split["tail"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("wanted", [{"length": 16}, {"packing": "stream", "length": 16}], ids=str)
def test_the_loss_of_older_data_sets_is_told(texts, tmp_path, wanted):
    made = prepared(texts, tmp_path / "made", length=63)
    prepared(texts, tmp_path / "whole", **wanted)
    without_tail(tmp_path / "made")
    lines: list[str] = []
    manifest = repack(RepackConfig(data=str(tmp_path / "made"), out=str(tmp_path / "out"), **wanted), lines.append)
    told = {name: lines[n - 3] for n, name in enumerate(made.splits)}
    whole = load_manifest(tmp_path / "whole")
    for name, split in manifest.splits.items():
        lost = made.splits[name].dropped_tokens
        assert split.tail.lost == lost > 0
        assert told[name].startswith(f"{name}: the last {lost} tokens of the text filled no row of")
        assert whole.splits[name].shards[: len(split.shards) - 1] == split.shards[:-1]
        known = split.rows * 16 + split.dropped_tokens, whole.splits[name].rows * 16 + whole.splits[name].dropped_tokens
        assert 0 < known[1] - known[0] < 2 * lost + 32
    assert not check(tmp_path / "out", workers=1).faults
    assert not check(tmp_path / "made", workers=1).faults


def test_repack_goes_on_after_kills(texts, tmp_path, monkeypatch):
    prepared(texts, tmp_path / "made")
    prepared(texts, tmp_path / "whole", length=64)
    places = [("data_prep.repack.repack", "rejoin", 3), ("data_prep.build.assemble", "write_shard", 2)]
    command = ["prep", "repack", tmp_path / "made", "--length", 64, "--out", tmp_path / "out", "--workers", 1]
    for place in places:
        assert bd3(*command, log=tmp_path / "log", before=partial(die_at, *place)).code == -9
    done = bd3(*command, log=tmp_path / "log")
    assert done.code == 0, done.err
    assert "continuing: " in done.err
    assert done.out.startswith(f"{tmp_path}/out: 64 tokens per row, vocabulary 29\n")
    assert difference(tmp_path / "out", tmp_path / "whole") == {"manifest.json"}
    monkeypatch.setattr(pool, "LITTLE", 0)
    repack(RepackConfig(data=str(tmp_path / "made"), out=str(tmp_path / "two"), length=64, workers=2))
    assert contents(tmp_path / "two") == contents(tmp_path / "out")


def test_what_cannot_be_repacked_is_one_line(texts, tmp_path):
    prepared(texts, tmp_path / "made", documents=False)
    data = str(tmp_path / "made")
    for options, message in (
        ({"documents": True}, "documents=true: the rows of .* do not tell where documents start"),
        ({"packing": "stream"}, "packing=stream: other BOS and EOS around documents: the rows"),
        ({"add_bos": False}, "add_bos=false: rows of packing=wrap begin with BOS"),
        ({"rows_per_shard": 6}, "rows_per_shard=6: not a multiple of rows_per_member=4; use 8"),
        ({"length": 50_000}, r"length=50000: the \d+ tokens of the train split fill no row; use a shorter --length"),
        ({"out": f"{data}/inside"}, "is the data set to repack, in it or around it"),
        ({"data": str(tmp_path / "none")}, "no such data set"),
    ):
        with pytest.raises(DataError, match=message):
            repack(RepackConfig(**{"data": data, "out": str(tmp_path / "out")} | options))
        assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_bad_records_are_copied_from_a_file_of_the_data_set_only(texts, tmp_path):
    prepared(texts, tmp_path / "made")
    path, rejects = tmp_path / "made" / "manifest.json", tmp_path / "made" / "rejects.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rejects": 1}))
    config = RepackConfig(data=str(tmp_path / "made"), out=str(tmp_path / "out"), length=16, workers=1)
    (tmp_path / "private").write_text("private\n")
    for make, message in (
        (lambda: rejects.symlink_to(tmp_path / "private"), "rejects.jsonl: is a link, whose file would be copied"),
        (lambda: os.mkfifo(rejects), "rejects.jsonl: is not a regular file"),
        (lambda: rejects.write_text("{}\n{}\n"), "rejects.jsonl: 2 lines, the manifest says 1"),
        (lambda: None, "rejects.jsonl: missing"),
    ):
        rejects.unlink(missing_ok=True)
        make()
        with pytest.raises(DataError, match=message):
            repack(config)
        assert not (tmp_path / "out").exists()
    rejects.write_text("{}\n")
    repack(config)
    assert (tmp_path / "out" / "rejects.jsonl").read_text() == "{}\n"


def test_members_without_their_rows_are_refused(texts, tmp_path):
    manifest = prepared(texts, tmp_path / "made")
    path = tmp_path / "made" / "manifest.json"
    edited = json.loads(path.read_text())
    assert edited["splits"]["train"]["shards"][0]["members"].pop()
    path.write_text(json.dumps(edited))
    rows = manifest.splits["train"].shards[0].rows
    with pytest.raises(DataError, match=rf"splits.train.shards\.0\.rows={rows}: its members have \d+"):
        repack(RepackConfig(data=str(tmp_path / "made"), out=str(tmp_path / "out"), length=16, workers=1))


def test_damaged_and_lying_data_sets(texts, tmp_path):
    prepared(texts, tmp_path / "made", packing="stream")
    data, shard = tmp_path / "made", "train/train-000001.tar"
    whole = (data / shard).read_bytes()
    config = RepackConfig(data=str(data), out=str(tmp_path / "out"), packing="wrap", workers=1)
    (data / shard).write_bytes(whole[:-1] + b"!")
    with pytest.raises(DataError, match=r"train-000001\.tar: sha256 is"):
        repack(config)
    os.truncate(data / "manifest.json", 100)
    with pytest.raises(DataError, match=r"manifest.json: "):
        repack(config)
    shutil.rmtree(data)
    manifest = prepared(texts, data, packing="stream")
    tokens, docs, rows, starts = manifest.splits["train"].shards[1].members[0]
    for offset, value, message in (
        (tokens, b"\xff\xff", "an id that is the mask or not in the vocabulary"),
        (docs, b"\xff\xff\xff\x7f", "document starts that are no ascending places in its rows"),
        (docs + 4, b"\x01\0\0\0", "a document does not begin with BOS"),
    ):
        (data / shard).write_bytes(whole[:offset] + value + whole[offset + len(value) :])
        text = (data / "manifest.json").read_text()
        old = json.loads(text)["splits"]["train"]["shards"][1]["sha256"]
        (data / "manifest.json").write_text(text.replace(old, sha256_file(data / shard)))
        with pytest.raises(DataError, match=message):
            repack(config)
    edited = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(edited | {"dtype": "<u4"}))
    with pytest.raises(DataError, match="dtype=<u4: not that of its vocab_size"):
        repack(config)
    edited["splits"]["train"]["shards"][1]["members"][0] = [1 << 50, docs, rows, starts]
    (data / "manifest.json").write_text(json.dumps(edited))
    with pytest.raises(DataError, match="its rows lie outside it in the manifest"):
        repack(config)
