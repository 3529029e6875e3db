"""Formats of checkpoints: files of tensors, index, old checkpoints, upgrades, and hostile files of all kinds."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_megatron.shards import Chunk, ShardedTensor
from pretrain.checkpoint import index, upgrade
from pretrain.checkpoint.folder import COMPLETE, stamp
from pretrain.checkpoint.index import StoredChunk, StoredTensor
from pretrain.checkpoint.old_format import _Unpickler
from pretrain.checkpoint.reader import find_checkpoint, newest_checkpoint, read_tensors, read_weights
from pretrain.checkpoint.stored import StoredTensors
from pretrain.checkpoint.tensor_file import ChunkEntry, TensorFile, write_chunks
from pretrain.checkpoint.upgrade import upgrade_checkpoints
from pretrain.commands import convert
from tests.unit.pretrain.checkpoint.hostile_pickles import hostile

OLD = Path(__file__).parents[3] / "data" / "before_rooms" / "run"
STEP = "checkpoints/step-00000004"
PICKLES = hostile(Path("/"))


@pytest.fixture
def old(tmp_path) -> Path:
    """A run folder with a checkpoint of format 1."""
    return shutil.copytree(OLD, tmp_path / "old", copy_function=shutil.copyfile)


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory) -> Path:
    run = shutil.copytree(OLD, tmp_path_factory.mktemp("upgraded") / "run", copy_function=shutil.copyfile)
    assert [done.action for done in upgrade_checkpoints(run)] == ["upgraded"]
    return run


@pytest.fixture
def new(upgraded, tmp_path) -> Path:
    """A run folder with the same checkpoint in the present format."""
    return shutil.copytree(upgraded, tmp_path / "new")


def everything(run: Path) -> dict[str, Tensor]:
    return read_tensors(StoredTensors(find_checkpoint(run)), "")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def replace(run: Path, name: str, data: bytes) -> None:
    """Replace a file of the checkpoint, its checksum in the list too."""
    path = run / STEP
    (path / name).write_bytes(data)
    listing = json.loads((path / COMPLETE).read_text())
    listing["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / COMPLETE).write_text(json.dumps(listing))


def assert_refused(run: Path, match: str = ".") -> None:
    """Reading the weights is an error of one line that names the file."""
    with pytest.raises(ConfigError, match=match) as caught:
        read_weights(find_checkpoint(run), averaged=False)
    assert "\n" not in str(caught.value)
    assert str(run / STEP) in str(caught.value)


# ---- files of tensors ----


def test_a_file_has_the_tensors_that_were_written_and_any_region_is_read(tmp_path):
    chance, torch_chance = random.Random(0), torch.Generator().manual_seed(0)
    shapes = [(7,), (3, 5), (2, 4, 6), (2, 3, 2, 5), (1, 1), (1, 9)]
    entries = [ChunkEntry(f"t{n}", "F32", shape, (0,) * len(shape), shape) for n, shape in enumerate(shapes)]
    tensors = [torch.randn(shape, generator=torch_chance) for shape in shapes]
    part = write_chunks(tmp_path / "a.safetensors", entries, iter(tensors))
    data = (tmp_path / "a.safetensors").read_bytes()
    stamp = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert part["files"] == {"a.safetensors": stamp}
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(tensor, tensors[int(name[1:])])
    with TensorFile(tmp_path / "a.safetensors") as file:
        for _ in range(100):
            n = chance.randrange(len(shapes))
            low = [chance.randrange(size) for size in shapes[n]]
            sizes = [chance.randint(1, size - at) for size, at in zip(shapes[n], low)]
            target = torch.full([2 * size for size in sizes], 7.0)[tuple(slice(0, None, 2) for _ in sizes)]
            file.read(StoredChunk(offsets=(0,) * len(low), shape=shapes[n], file="a", key=f"t{n}"), "F32", low, target)
            assert torch.equal(target, tensors[n][tuple(slice(at, at + size) for at, size in zip(low, sizes))])


def test_regions_larger_than_the_buffer_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.checkpoint.tensor_file._BUFFER", 64)
    tensor = torch.arange(2 * 5 * 37.0).view(2, 5, 37)
    write_chunks(tmp_path / "a", [ChunkEntry("t", "F32", (2, 5, 37), (0, 0, 0), (2, 5, 37))], [tensor])
    target = torch.empty(2, 4, 35)
    with TensorFile(tmp_path / "a") as file:
        chunk = StoredChunk(offsets=(0, 0, 0), shape=(2, 5, 37), file="a", key="t")
        file.read(chunk, "F32", (0, 1, 2), target)
    assert torch.equal(target, tensor[:, 1:, 2:])


def test_chunks_cover_a_tensor_exactly_or_are_refused():
    """As counted element by element, for random boxes."""
    chance, shape, found = random.Random(1), (2, 3, 2), []
    for _ in range(400):
        boxes = []
        for low, high in [((0, 2), (0, 3)), ((0, 2), (0, 3))][: chance.randint(1, 2)]:
            rows, columns = sorted(chance.choices(range(3), k=2)), sorted(chance.choices(range(4), k=2))
            boxes.append([rows if rows[0] < rows[1] else low, columns if columns[0] < columns[1] else high, [0, 2]])
        if chance.random() < 0.5:  # two that fit
            cut = chance.randint(1, 2)
            boxes = [[[0, 2], [0, cut], [0, 2]], [[0, 2], [cut, 3], [0, 2]]]
        counts = torch.zeros(shape)
        for box in boxes:
            counts[tuple(slice(*ends) for ends in box)] += 1
        chunks = [
            StoredChunk(offsets=tuple(a for a, _ in box), shape=tuple(b - a for a, b in box), file="f", key=str(n))
            for n, box in enumerate(boxes)
        ]
        found.append(bool((counts == 1).all()))
        assert index._covers(StoredTensor(shape=shape, dtype="F32", chunks=chunks)) == found[-1]
    assert 50 < sum(found) < 350


def test_chunks_go_into_chunks_of_another_layout(tmp_path):
    """Written in columns by two, read in ranges of rows."""
    whole = torch.arange(6 * 8.0).view(6, 8)
    parts = []
    for rank, columns in enumerate(whole.split(4, 1)):
        entry = ChunkEntry("weights/a", "F32", (6, 8), (0, 4 * rank), (6, 4))
        parts.append(write_chunks(tmp_path / f"rank-0000{rank}.safetensors", [entry], [columns.contiguous()]))
    stamps = index.write_index(tmp_path, [*parts, parts[1]])  # the second as if two ranks had written it
    (tmp_path / COMPLETE).write_text(json.dumps({"format": 2, "step": 0, "meta": {}, "files": stamps}))
    path = tmp_path / "run" / "checkpoints" / "step-00000000"
    path.parent.mkdir(parents=True)
    tmp_path.joinpath("files").mkdir()
    for name in [*stamps, COMPLETE]:
        shutil.move(tmp_path / name, tmp_path / "files" / name)
    (tmp_path / "files").rename(path)
    stored = StoredTensors(find_checkpoint(tmp_path / "run"))
    target = torch.zeros(6, 8)
    chunks = (Chunk((1, 3), target[1:2, 3:]), Chunk((2, 0), target[2:5]), Chunk((5, 0), target[5:, :2]))
    stored.fill({"weights/a": ShardedTensor((6, 8), chunks)})
    expected = torch.zeros(6, 8)
    expected[1:2, 3:], expected[2:5], expected[5:, :2] = whole[1:2, 3:], whole[2:5], whole[5:, :2]
    assert torch.equal(target, expected)


# ---- hostile files of the present format ----


def _header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        text = json.dumps(change(header) or header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return changed


def _first(header: dict) -> dict:
    return [entry for name, entry in header.items() if name.startswith("weights")][1]


FILES = {
    "garbage": lambda data: bytes(range(256)) * 50,
    "empty": lambda data: b"",
    "long header": lambda data: (1 << 62).to_bytes(8, "little") + data[8:],
    "header of the file": lambda data: (len(data)).to_bytes(8, "little") + data[8:],
    "header is a list": _header(lambda header: [header]),
    "deep header": lambda data: (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "cut": lambda data: data[:-4],
    "longer": lambda data: data + b"\0\0\0\0",
    "overlap": _header(lambda header: _first(header)["data_offsets"].__setitem__(0, 0)),
    "negative": _header(lambda header: _first(header).update(data_offsets=[-4, 0])),
    "text as a number": _header(lambda header: _first(header).update(data_offsets=["0", "4"])),
    "other shape": _header(lambda header: _first(header).update(shape=[1 << 40])),
    "other dtype": _header(lambda header: _first(header).update(dtype="I64")),
    "NaN": _header(lambda header: _first(header).update(shape=[float("nan")])),
    "no tensors": lambda data: (2).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("damage", FILES)
def test_a_damaged_file_of_tensors_with_the_right_checksum_is_one_line(new, damage):
    name = "rank-00000.safetensors"
    replace(new, name, FILES[damage]((new / STEP / name).read_bytes()))
    assert_refused(new)


def _index(change: Callable[[dict], object]) -> Callable[[dict], bytes]:
    def changed(found: dict) -> bytes:
        change(next(iter(found["tensors"].values())))
        return json.dumps(found).encode()

    return changed


def _chunk(**values: object) -> Callable[[dict], bytes]:
    return _index(lambda tensor: tensor["chunks"][0].update(values))


INDEXES = {
    "garbage": lambda found: b"\xff\xfe\0",
    "list": lambda found: b"[]",
    "deep": lambda found: b"[" * 100_000,
    "later format": lambda found: json.dumps(found | {"format": 3}).encode(),
    "no chunks": _index(lambda tensor: tensor.update(chunks=[])),
    "chunk twice": _index(lambda tensor: tensor["chunks"].append(tensor["chunks"][0])),
    "chunk moved": _chunk(offsets=[1, 0]),
    "negative": _chunk(offsets=[-1, 0]),
    "huge shape": _index(lambda tensor: tensor.update(shape=[1 << 50, 1 << 50])),
    "huge chunk": _index(lambda t: (t.update(shape=[1 << 20] * 2), t["chunks"][0].update(shape=[1 << 20] * 2))),
    "no sizes": _index(lambda tensor: (tensor.update(shape=[]), tensor["chunks"][0].update(shape=[], offsets=[]))),
    "other dimensions": _chunk(offsets=[0], shape=[4]),
    "boolean": _chunk(offsets=[False, False]),
    "other key": _chunk(key="nothing"),
    "unlisted file": _chunk(file="rank-00009.safetensors"),
    "file elsewhere": _chunk(file="../../../tokenizer.json"),
    "absolute file": _chunk(file="/etc/passwd"),
    "listed file that is none": _chunk(file="index.json"),
    "unknown dtype": _index(lambda tensor: tensor.update(dtype="object")),
}


@pytest.mark.parametrize("damage", INDEXES)
def test_a_damaged_index_with_the_right_checksum_is_one_line(new, damage):
    replace(new, "index.json", INDEXES[damage](json.loads((new / STEP / "index.json").read_text())))
    assert_refused(new)


# ---- hostile files of format 1 ----


@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_runs_nothing_and_is_one_line(old, tmp_path, name):
    mark = tmp_path / "mark"
    replace(old, ".metadata", hostile(mark)[name])
    assert_refused(old, r"/\.metadata: ")
    assert not mark.exists()


def test_a_list_that_many_tensors_share_is_not_read_for_each(old):
    data = (old / STEP / ".metadata").read_bytes()
    found = pickle.loads(data)  # our own
    chunks = next(iter(found.state_dict_metadata.values())).chunks * 3000
    tensor = next(iter(found.state_dict_metadata.values()))
    tensor.chunks = chunks
    found.state_dict_metadata = {f"weights/{n}": tensor for n in range(3000)}
    replace(old, ".metadata", pickle.dumps(found, 4))
    assert_refused(old, "more chunks than are stored")


def test_the_names_that_are_admitted_are_those_of_our_files(old):
    """With torch's own unpickler the file means the same."""
    data = (old / STEP / ".metadata").read_bytes()
    found, loaded = pickle.loads(data), _Unpickler(io.BytesIO(data)).load()
    ours = StoredTensors(find_checkpoint(old)).tensors
    assert loaded.kind == "Metadata"
    assert {name: tuple(entry.size) for name, entry in found.state_dict_metadata.items()} == {
        name: tensor.shape for name, tensor in ours.items()
    }


def _saved(value: object, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch archive whose pickle is that of ``value``."""
    saved = io.BytesIO()
    with zipfile.ZipFile(saved, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, 2))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return saved.getvalue()


@pytest.mark.parametrize("kind", ["garbage", "code", "legacy", "compressed", "no tensor", "empty"])
def test_hostile_tensors_run_nothing_and_are_one_line(old, tmp_path, kind):
    name, mark = "__0_0.distcp", tmp_path / "mark"

    class Call:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    size = (old / STEP / name).stat().st_size
    data = {
        "garbage": bytes(range(256)),
        "code": _saved(Call()),
        "legacy": pickle.dumps(Call(), 2),
        "compressed": _saved([0] * 5000, zipfile.ZIP_DEFLATED),
        "no tensor": _saved([1, 2]),
        "empty": b"",
    }[kind]
    # At every place where .metadata says that an archive is.
    whole = bytearray(size)
    for lengths in StoredTensors(find_checkpoint(old)).archives.values():
        for place, length in lengths.items():
            at = int(place)
            whole[at : at + length] = data[:length].rjust(length, b"\0") if data[:2] != b"PK" else _padded(data, length)
    replace(old, name, bytes(whole))
    assert_refused(old, name)
    assert not mark.exists()


def _padded(data: bytes, length: int) -> bytes:
    """An archive of this length: the comment at its end fills it up."""
    missing = length - len(data)
    return data[:-2] + missing.to_bytes(2, "little") + b"x" * missing if 0 <= missing < 1 << 16 else data[:length]


# ---- upgrades ----


def test_an_upgraded_checkpoint_has_the_same_values_and_no_old_files(old, new):
    before, after = everything(old), everything(new)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(contents(new / STEP)) == ["complete.json", "index.json", "rank-00000.safetensors"]
    assert find_checkpoint(new).meta == find_checkpoint(old).meta
    done = contents(new / STEP)
    assert [found.action for found in upgrade_checkpoints(new)] == ["in the present format"]
    assert contents(new / STEP) == done


class Killed(BaseException):
    """Stands for a kill."""


@pytest.fixture
def small(tmp_path) -> Path:
    """A run folder with a checkpoint of format 1 of two files and few tensors."""
    path = tmp_path / "small" / STEP
    state = {
        "weights/a": torch.arange(6.0).view(2, 3),
        "ema/a": torch.full((2, 3), torch.nan),
        "weights/b": torch.ones(5),
    }
    writer = dcp.FileSystemWriter(path, thread_count=2)
    with warnings.catch_warnings(action="ignore"):
        dcp.save(state, storage_writer=writer, no_dist=True)
    listing = {"step": 4, "meta": {"tokens": 1}, "files": {file.name: stamp(file) for file in path.iterdir()}}
    (path / COMPLETE).write_text(json.dumps(listing))
    return tmp_path / "small"


def bits(run: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in everything(run).items()}


def test_an_upgrade_that_is_killed_anywhere_leaves_a_checkpoint_and_goes_on(small, monkeypatch):
    expected = bits(small)
    assert len(expected) == 3
    steps = itertools.count()
    limit = 0

    def dies(function):
        def call(*args, **options):
            if next(steps) == limit:
                raise Killed
            return function(*args, **options)

        return call

    monkeypatch.setattr(upgrade.os, "replace", dies(os.replace))
    monkeypatch.setattr(upgrade.shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing
    for name in ("write_chunks", "write_index", "sync", "write_text"):
        monkeypatch.setattr(upgrade, name, dies(getattr(upgrade, name)))
    monkeypatch.setattr(Path, "unlink", dies(Path.unlink))
    kills = 0
    while True:
        run = shutil.copytree(small, small.with_name(f"killed {limit}"))
        steps = itertools.count()
        try:
            list(upgrade_checkpoints(run))
        except Killed:
            kills += 1
            assert newest_checkpoint(run) is not None
            assert bits(run) == expected
            steps = itertools.count(limit + 1)
            list(upgrade_checkpoints(run))
        else:
            break
        names = ["complete.json", "index.json", "rank-00000.safetensors", "rank-00001.safetensors"]
        assert sorted(contents(run / STEP)) == names
        assert bits(run) == expected
        limit += 1
    assert kills >= 9


def test_the_command_prints_what_it_does_and_names_what_is_damaged(small, capsys):
    before, later = contents(small / STEP), small / "checkpoints" / "step-00000005"
    assert convert.main(["upgrade", str(small), "--dry-run"]) == 0
    assert capsys.readouterr().out == f"{small / STEP}: to upgrade\n"
    assert contents(small / STEP) == before
    shutil.copytree(small / STEP, later)
    replace(small, ".metadata", b"garbage")
    listing = json.loads((later / COMPLETE).read_text())
    (later / COMPLETE).write_text(json.dumps(listing | {"step": 5}))
    with pytest.raises(ConfigError, match=r"step-00000004: \.metadata: .*a damaged checkpoint stays as it is"):
        convert.main(["upgrade", str(small)])
    assert capsys.readouterr().out == f"{later}: upgraded\n"
    with pytest.raises(ConfigError, match="has no checkpoints"):
        convert.main(["upgrade", str(small.parent)])
