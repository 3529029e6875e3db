"""Data sets elsewhere: fetched whole and once into a bounded cache, and every failure is one line."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from data_prep.errors import DataError
from data_prep.read import cache as cache_module
from data_prep.read.cache import ShardCache, default_folder
from data_prep.read.reader import RowReader
from data_prep.read.stream import RowStream
from tests.unit.data_prep.read.test_reader import written


class Store(LocalFileSystem):
    """Local files as ``store://``, which counts what is read and can fail."""

    protocol = ("store",)
    cachable = False
    opened: list[str] = []  # noqa: RUF012
    failures: dict[str, int] = {}  # noqa: RUF012
    delay = 0.0

    def _open(self, path, mode="rb", **options):
        name = Path(path).name
        Store.opened.append(name)
        time.sleep(Store.delay)
        if Store.failures.get(name, 0):
            Store.failures[name] -= 1
            raise ConnectionError("the server hung up")
        return super()._open(path, mode, **options)


fsspec.register_implementation("store", Store, clobber=True)


@pytest.fixture(autouse=True)
def store(monkeypatch):
    monkeypatch.setattr("data_prep.format.remote.FIRST_WAIT", 0.001)
    Store.opened, Store.failures, Store.delay = [], {}, 0.0
    return Store


@pytest.fixture
def far(tmp_path) -> tuple[str, np.ndarray]:
    folder = tmp_path / "far"
    folder.mkdir()
    tokens, _ = written(folder, "<u2")
    return f"store://{folder}", tokens


def folder_of(url: str) -> Path:
    return Path(url.removeprefix("store://"))


def shards_read() -> list[str]:
    return [name for name in Store.opened if name.endswith(".tar")]


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def refused(action, *parts: str) -> str:
    with pytest.raises(DataError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
    return text


def every_row(reader: RowReader) -> np.ndarray:
    return reader.rows(np.arange(len(reader)))


@pytest.mark.parametrize("protocol", ["store", "file", "memory"])
def test_rows_of_a_url_are_those_of_the_folder(far, tmp_path, protocol):
    url, tokens = far
    if protocol == "memory":
        fsspec.filesystem("memory").put(str(folder_of(url)), "/copy", recursive=True)
        url = "memory://copy"
    url = url.replace("store://", f"{protocol}://")
    reader = RowReader(url, "train", ShardCache(tmp_path / "cache", 10**8))
    indices = np.random.default_rng(0).integers(0, len(reader), 200)
    local = RowReader(folder_of(far[0]), "train")
    assert (reader.rows(indices) == tokens[indices]).all()
    assert (reader.documents(indices) == local.documents(indices)).all()
    reader.verify()
    reader.copy_tokenizer(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_each_shard_is_fetched_once_and_stays_for_the_next_process(far, tmp_path):
    for _ in range(2):
        reader = RowReader(far[0], "train", ShardCache(tmp_path / "cache", 10**8))
        for _ in range(3):
            assert (every_row(reader) == far[1]).all()
    assert sorted(shards_read()) == sorted(shard.name for shard in reader.shards)
    assert sorted(
        path.name for path in (tmp_path / "cache" / cache_module.FOLDER).iterdir() if path.suffix != ".tar"
    ) == [".lock"]


def test_the_limit_holds_and_the_shard_used_longest_ago_goes_first(far, tmp_path):
    cache = ShardCache(tmp_path / "cache", 10**8)
    reader = RowReader(far[0], "train", cache)
    size = reader.shards[0].bytes
    cache.limit = 3 * size + 100
    first = np.cumsum(reader.shard_rows()) - reader.shard_rows()
    for shard in (0, 1, 2, 0, 3, 0, 1):
        reader.rows(first[[shard]])
        assert used(tmp_path / "cache" / cache_module.FOLDER) <= cache.limit
    # 3 came for 1, which 0 had outlived; then 1 came for 2.
    assert shards_read() == [reader.shards[n].name for n in (0, 1, 2, 3, 1)]
    # More shards at once than fit: one after another.
    assert (every_row(reader) == far[1]).all()
    assert used(tmp_path / "cache" / cache_module.FOLDER) <= cache.limit


def test_rows_stay_readable_while_their_shard_is_evicted(far, tmp_path):
    cache = ShardCache(tmp_path / "cache", 10**8)
    reader = RowReader(far[0], "train", cache)
    shard = reader._remote_shard(0)
    expected = (folder_of(far[0]) / "train" / reader.shards[0].name).read_bytes()
    raw = np.empty(shard.bytes, np.uint8)
    with cache.opened(shard) as file:
        (tmp_path / "cache" / cache_module.FOLDER / f"{shard.sha256}.tar").unlink()
        file.read_into(memoryview(raw), 0)
    assert raw.tobytes() == expected
    with cache.opened(shard) as file:
        file.read_into(memoryview(raw), 0)
    assert raw.tobytes() == expected


def test_processes_of_a_machine_fetch_each_shard_once_and_keep_the_limit(far, tmp_path, store):
    code = (
        "import sys, numpy as np; from tests.unit.data_prep.read import test_cache as t; t.Store.delay = 0.02\n"
        "from data_prep.read.reader import RowReader; from data_prep.read.cache import ShardCache\n"
        "r = RowReader(sys.argv[1], 'train', ShardCache(sys.argv[2], int(sys.argv[3])))\n"
        "[r.rows(np.arange(len(r))) for _ in range(2)]; print(len(t.shards_read()), int(r.rows(np.arange(9)).sum()))"
    )

    def run(folder: str, limit: int) -> list[list[int]]:
        line = [sys.executable, "-c", code, far[0], str(tmp_path / folder), str(limit)]
        started = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        most = 0
        while any(process.poll() is None for process in started):
            sizes = []
            for path in (tmp_path / folder / cache_module.FOLDER).glob("*.tar"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            most = max(most, sum(sizes))
            time.sleep(0.002)
        assert most <= limit
        return [[int(number) for number in process.communicate()[0].split()] for process in started]

    shards = len(RowReader(folder_of(far[0]), "train").shards)
    found = run("roomy", 10**8)
    assert sum(fetched for fetched, _ in found) == shards
    found += run("narrow", 2 * 10240 + 100)
    assert {total for _, total in found} == {int(far[1][:9].sum())}


def test_a_server_that_fails_now_and_then_is_asked_again(far, tmp_path, store):
    store.failures = {"manifest.json": 2, "train-000001.tar": 4}
    reader = RowReader(far[0], "train", ShardCache(tmp_path / "cache", 10**8))
    assert (every_row(reader) == far[1]).all()
    assert store.opened.count("train-000001.tar") == 5


def test_a_dead_server_is_one_line(far, tmp_path, store):
    reader = RowReader(far[0], "train", ShardCache(tmp_path / "cache", 10**8))
    store.failures = {"train-000001.tar": 99, "manifest.json": 99}
    refused(lambda: every_row(reader), "train-000001.tar: cannot be fetched after 5 tries", "hung up); try later")
    refused(lambda: RowReader(far[0], "train", reader.cache), "manifest.json: cannot be fetched after 5 tries")
    assert not list((tmp_path / "cache" / cache_module.FOLDER).glob("*.partial"))
    assert not list((tmp_path / "cache" / cache_module.FOLDER).glob("*.claim"))


def test_damage_elsewhere_names_the_shard(far, tmp_path):
    reader = RowReader(far[0], "train", ShardCache(tmp_path / "cache", 10**8, tries=2))
    folder = folder_of(far[0]) / "train"
    flipped = bytearray((folder / "train-000000.tar").read_bytes())
    flipped[3000] ^= 1
    (folder / "train-000000.tar").write_bytes(flipped)
    os.truncate(folder / "train-000001.tar", 5000)
    (folder / "train-000002.tar").unlink()
    first = np.cumsum(reader.shard_rows()) - reader.shard_rows()
    says = ("its sha256 is", "are expected); it was changed or damaged there: copy it again", "no such file")
    for shard, text in enumerate(says):
        for read in (reader.rows, reader.documents):
            refused(lambda read=read, shard=shard: read(first[[shard]]), f"train-00000{shard}.tar: ", text)
        reader.prefetch(first[[shard]])
        refused(lambda shard=shard: reader.rows(first[[shard]]), f"train-00000{shard}.tar: ", text)
    assert [path.name for path in (tmp_path / "cache" / cache_module.FOLDER).iterdir()] == [".lock"]
    refused(reader.verify, "train-000000.tar")


@pytest.mark.parametrize("damage", ["flip", "cut", "cut after it was checked"])
def test_a_damaged_shard_of_the_cache_is_fetched_again(far, tmp_path, damage):
    cache = ShardCache(tmp_path / "cache", 10**8)
    reader = RowReader(far[0], "train", cache)
    every_row(reader)
    path = tmp_path / "cache" / cache_module.FOLDER / f"{reader.shards[1].sha256}.tar"
    if damage == "flip":
        raw = bytearray(path.read_bytes())
        raw[2000] ^= 4
        path.write_bytes(raw)
    else:
        os.truncate(path, 5000)
    again = reader if "checked" in damage else RowReader(far[0], "train", ShardCache(tmp_path / "cache", 10**8))
    assert (every_row(again) == far[1]).all()
    assert shards_read().count("train-000001.tar") == 2


def test_what_killed_processes_left_is_removed(far, tmp_path):
    folder = tmp_path / "cache" / cache_module.FOLDER
    cache = ShardCache(tmp_path / "cache", 3 * 10240)
    name = "ab" * 32
    (folder / f"{name}.claim").touch()
    os.truncate(folder / f"{name}.claim", 2 * 10240)
    (folder / f".{name}.tar.77-0123abcd.partial").write_bytes(b"x" * 10240)
    reader = RowReader(far[0], "train", cache)
    cache.limit = 2 * reader.shards[0].bytes
    reader.rows(np.array([0]))
    assert not list(folder.glob("*.claim"))
    assert not list(folder.glob(".*.partial"))


def test_prefetched_shards_are_not_fetched_again(far, tmp_path):
    reader = RowReader(far[0], "train", ShardCache(tmp_path / "cache", 10**8))
    for _ in range(2):
        reader.prefetch(np.arange(len(reader)))
    assert (every_row(reader) == far[1]).all()
    assert sorted(shards_read()) == sorted(shard.name for shard in reader.shards)


def test_rows_wait_for_a_fetch_that_is_under_way(far, tmp_path, store):
    store.delay = 0.2
    reader = RowReader(far[0], "train", ShardCache(tmp_path / "cache", 10**8))
    reader.prefetch(np.array([0]))
    time.sleep(0.05)
    assert (reader.rows(np.array([0])) == far[1][:1]).all()
    assert shards_read() == ["train-000000.tar"]
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "shard fetcher")


def test_caches_that_cannot_be(far, tmp_path):
    refused(lambda: RowReader(far[0], "train"), "needs a cache")
    (tmp_path / "file").touch()
    refused(lambda: ShardCache(tmp_path / "file", 10**8), "file: the shard cache cannot be written", "data.cache")
    refused(lambda: ShardCache("/proc/none", 10**8), "/proc/none: the shard cache cannot be written")
    cache = ShardCache(tmp_path / "cache", 1000)
    refused(lambda: RowReader(far[0], "train", cache), "its largest shard has 10240 bytes", "(1000)", "data.cache_gb")
    cache.limit = 10240
    reader = RowReader(far[0], "train", cache)
    cache.limit = 1000
    refused(lambda: every_row(reader), "train-000000.tar", "more than the cache", "1000", "data.cache_gb")
    with pytest.raises(DataError, match="no such file"):
        RowReader(f"{far[0]}-elsewhere", "train", reader.cache)


def test_a_full_disk_is_one_line(far, tmp_path, monkeypatch):
    reader = RowReader(far[0], "train", ShardCache(tmp_path / "cache", 10**8))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "fetch", full)
    refused(lambda: every_row(reader), "cache: the shard cache cannot be written (No space left on device)")


def test_files_of_others_in_the_cache_stay(far, tmp_path):
    mine = {tmp_path / "cache" / name: name.encode() * 9000 for name in ("thesis.tar", f"{'ab' * 32}.tar", "a.claim")}
    inside = {tmp_path / "cache" / cache_module.FOLDER / name: b"x" * 20000 for name in ("notes.tar", ".a.partial")}
    cache = ShardCache(tmp_path / "cache", 10**8)
    for path, content in (mine | inside).items():
        path.write_bytes(content)
    link = tmp_path / "cache" / cache_module.FOLDER / f"{'cd' * 32}.tar"
    link.symlink_to(tmp_path / "cache" / "thesis.tar")
    reader = RowReader(far[0], "train", cache)
    cache.limit = max(shard.bytes for shard in reader.shards)
    assert (every_row(reader) == far[1]).all()  # more than the limit: each shard evicts the one before
    assert all(path.read_bytes() == content for path, content in (mine | inside).items())
    assert link.is_symlink()


def test_a_shard_name_of_ours_that_is_a_link_is_replaced(far, tmp_path):
    reader = RowReader(far[0], "train", ShardCache(tmp_path / "cache", 10**8))
    other = tmp_path / "thesis.tar"
    other.write_bytes(b"mine")
    path = tmp_path / "cache" / cache_module.FOLDER / f"{reader.shards[0].sha256}.tar"
    path.symlink_to(other)
    assert (every_row(reader) == far[1]).all()
    assert other.read_bytes() == b"mine"
    assert not path.is_symlink()


def test_a_linked_cache_is_refused(tmp_path):
    (tmp_path / "real" / cache_module.FOLDER).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / cache_module.FOLDER).symlink_to(tmp_path / "real" / cache_module.FOLDER)
    refused(lambda: ShardCache(tmp_path / "link", 10**8), "link: is a link to")
    refused(lambda: ShardCache(tmp_path / "other", 10**8), f"{cache_module.FOLDER}: is a link to")
    refused(lambda: ShardCache("~nobody-of-this-name/x", 10**8), "there is no such user")


def test_where_the_cache_is_unless_told():
    assert default_folder({"BD3_CACHE": "/big/disk"}.get) == Path("/big/disk")
    assert default_folder({}.get) == Path.home() / ".cache" / "bd3-megatron"


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_lanes_fetch_each_byte_about_once_per_epoch(tmp_path, nodes):
    """Nodes with caches of the shards of their lanes, and 2 to spare."""
    folder = tmp_path / "far"
    folder.mkdir()
    written(folder, "<u2", documents=900)
    lanes, batch = 8, 16
    made = []
    for node in range(nodes):
        cache = ShardCache(tmp_path / f"cache{node}", 10**8)
        reader = RowReader(f"store://{folder}", "train", cache)
        cache.limit = (lanes // nodes + 2) * max(shard.bytes for shard in reader.shards)
        made.append(RowStream([reader], seed=2, order="lanes", lanes=lanes))
    assert len(reader.shards) > 40
    steps = 2 * len(reader) // batch
    for step in range(steps):
        for node, stream in enumerate(made):
            _, rows = stream.at(step * batch + stream.slots(step, batch, node, nodes))
            stream.rows(rows)
    assert len(shards_read()) <= 1.5 * 2 * len(reader.shards)


def test_a_remote_data_set_is_prefetched_by_batches(far, tmp_path):
    from bd3_megatron.config import DiffusionConfig, ModelConfig
    from pretrain.trainer.batches import Batches

    def made(reader: RowReader) -> Batches:
        model = ModelConfig(length=10, vocab_size=60_001, mask_id=60_000, bos_id=1, eos_id=2)
        stream = RowStream([reader], order="lanes", lanes=2)
        return Batches(stream, model, DiffusionConfig(block_size=2), global_batch=4, micro_batch=4)

    here = made(RowReader(folder_of(far[0]), "train"))
    there = made(RowReader(far[0], "train", ShardCache(tmp_path / "cache", 10**8)))
    for step in range(30):
        assert (here.at(step)[0].input_ids == there.at(step)[0].input_ids).all()
    assert len(set(shards_read())) == len(shards_read())
