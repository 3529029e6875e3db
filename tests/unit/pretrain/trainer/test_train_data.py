"""Runs on mixes, lanes and data sets elsewhere: the same rows, losses and refusals as the stream promises."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from bd3_common.errors import ConfigError
from data_prep.build.prep import PrepConfig, prep
from data_prep.errors import DataError
from data_prep.format.manifest import load_manifest, save_manifest
from data_prep.read.reader import RowReader
from pretrain.checkpoint.reader import find_checkpoint
from pretrain.config.resolve import load_run_config, load_saved, save_config
from pretrain.config.schema import RunConfig
from pretrain.run_folder.data import data_identity, same_data
from pretrain.tracking.metrics import read_metrics
from tests.unit.commands import Done, bd3
from tests.unit.pretrain.trainer.test_loop import RECIPE


@pytest.fixture(scope="module")
def second(data_set, tmp_path_factory) -> Path:
    """Another data set with the tokenizer of the first."""
    folder = tmp_path_factory.mktemp("second")
    texts = [json.dumps({"id": str(n), "text": f"word{n} of another book " * 30}) for n in range(20)]
    (folder / "other.jsonl").write_text("\n".join(texts))
    manifest = load_manifest(data_set)
    options = {"length": manifest.length, "tokenizer": str(data_set / manifest.tokenizer), "validation_fraction": 0.3}
    prep(PrepConfig(inputs=(str(folder / "other.jsonl"),), out=str(folder / "data"), **options))
    return folder / "data"


class Runs:
    """Short runs of one recipe below a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "recipe.yaml").write_text(RECIPE)

    def __call__(self, name: str, *args: object) -> Done:
        config = self.folder / "recipe.yaml"
        log = self.folder / f"{name}-log"
        return bd3("pretrain", "--config", config, "--run", self.folder / name, *args, log=log)

    def metrics(self, name: str) -> list:
        return read_metrics(self.folder / name)


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path)


def refused(done: Done, text: str) -> None:
    assert done.code == 2, done.err
    assert text in done.err.splitlines()[-1]


def test_a_mix_goes_on_exactly_and_refuses_other_mixes(runs, data_set, second, tmp_path):
    mix = ("--data.mix", data_set, 3, second, 1, "--data.order", "lanes", "--data.lanes", 2)
    assert runs("whole", *mix).code == 0
    assert runs("parts", *mix, "--train.steps", 4).code == 0
    moved = Path(shutil.copytree(second, tmp_path / "moved"))
    there = ("--data.mix", data_set, 3, moved, 1, "--data.order", "lanes", "--data.lanes", 2)
    refused(runs("parts", *mix, "--data.lanes", 3), "data.lanes=3: the run in ")
    refused(runs("parts", *mix, "--data.order", "global"), "data.order=global: the run in ")
    refused(runs("parts", "--data.mix", data_set, 1, second, 1, *mix[5:]), "data.mix")
    refused(
        runs("parts", "--data.mix", second, 3, data_set, 1, *mix[5:]), f"data.mix={second} {data_set}: not the data "
    )
    done = runs("parts", *there)
    assert done.code == 0, done.err
    ends = [[record for record in runs.metrics(name) if record["step"] > 4] for name in ("whole", "parts")]
    assert ends[0] == ends[1]
    meta = find_checkpoint(runs.folder / "whole").meta
    assert meta["order"] == "lanes 2"
    assert sum(meta["data_positions"]) == meta["rows"] == 36
    assert meta["data_positions"][0] > meta["data_positions"][1] > 0
    # Its validation splits one after another, as in training.
    done = bd3("eval", runs.folder / "whole", "--rows", 8, "--json", log=tmp_path / "eval")
    assert done.code == 0, done.err
    printed = json.loads(done.out.splitlines()[-1])
    assert printed["nelbo"] == runs.metrics("whole")[-1]["nelbo"]


def test_a_url_trains_as_the_folder_does(runs, data_set, tmp_path):
    assert runs("here", "--data.path", data_set).code == 0
    cache = ("--data.cache", tmp_path / "cache")
    done = runs("there", "--data.path", f"file://{data_set}", *cache)
    assert done.code == 0, done.err
    assert runs.metrics("here") == runs.metrics("there")
    assert load_saved(runs.folder / "there" / "config.yaml").data.path == f"file://{data_set}"
    assert list((tmp_path / "cache" / "bd3-shards").glob("*.tar"))
    assert (runs.folder / "there" / "tokenizer.json").read_bytes() == (data_set / "tokenizer.json").read_bytes()
    # Where the data lie, and where they are cached, may change.
    done = runs("there", "--data.path", data_set, "--train.steps", 7)
    assert done.code == 0, done.err
    refused(runs("new", "--data.path", f"file://{data_set}", *cache, "--data.cache-gb", 1e-6), "more than the cache")
    refused(runs("new", "--data.path", "file:///nowhere", *cache), "file:///nowhere/manifest.json: no such file")


def test_data_sets_of_a_mix_must_agree(runs, data_set, tmp_path):
    other = Path(shutil.copytree(data_set, tmp_path / "other"))
    save_manifest(load_manifest(other).model_copy(update={"tokenizer_sha256": "0" * 64}), other)
    refused(runs("new", "--data.mix", data_set, 1, other, 1), "tokenizer_sha256: ")


def test_paths_are_saved_absolute_and_urls_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_run_config(["--data.mix", "a", "2", "s3://b/c", "1", "--data.cache", "d"])
    save_config(config, tmp_path / "config.yaml")
    data = load_saved(tmp_path / "config.yaml").data
    assert list(data.mix.items()) == [(str(tmp_path / "a"), 2.0), ("s3://b/c", 1.0)]
    assert (data.path, data.cache) == (None, str(tmp_path / "d"))
    save_config(RunConfig(), tmp_path / "config.yaml")
    assert load_saved(tmp_path / "config.yaml") == RunConfig()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--data.path", "p", "--data.mix", "a", "1"], "data.mix: data.path=p is given too; set one of them to null"),
        (["--data.mix"], "data.mix: empty; give paths with their weights, or null"),
        (["--data.mix", "a"], "data.mix=a: keys and values come in pairs"),
        (["--data.mix", "a", "-1"], "use a value above 0"),
        (["--data.order", "lane"], "data.order=lane: use global or lanes"),
        (["--data.lanes", "0"], "data.lanes=0: use 1 or more"),
    ],
)
def test_mistakes_are_one_line(args, line):
    with pytest.raises(ConfigError) as caught:
        load_run_config(args)
    assert str(caught.value).endswith(line)


def test_the_identity_of_a_mix_is_of_all_its_data_sets_in_order(data_set, second):
    one, two = load_manifest(data_set), load_manifest(second)
    assert len({data_identity(one), data_identity(two), data_identity(one, two), data_identity(two, one)}) == 4


def test_what_decides_the_rows_is_in_the_identity_and_digests_of_version_1_are_known(data_set, second):
    one, two = load_manifest(data_set), load_manifest(second)
    train = one.splits["train"]
    shard = train.shards[0]
    first, *others = shard.members
    moved = shard.model_copy(update={"members": [(first[0] + 2, *first[1:]), *others]})
    renamed = shard.model_copy(update={"name": "train-000009.tar"})
    changed = [
        one.model_copy(update={"splits": one.splits | {"train": train.model_copy(update={"shards": [other]})}})
        for other in (moved, renamed)
    ]
    changed += [one.model_copy(update={name: 5}) for name in ("vocab_size", "mask_id", "length")]
    assert len({data_identity(manifest) for manifest in (one, *changed)}) == 6
    digest = hashlib.sha256(one.tokenizer_sha256.encode())
    for number, manifest in enumerate((one, two)):
        digest.update(b"next data set" * number)
        for split in manifest.splits.values():
            digest.update("".join(found.sha256 for found in split.shards).encode())
    assert same_data(digest.hexdigest(), one, two)
    assert not same_data(digest.hexdigest(), one)
    assert same_data(data_identity(one, two), one, two)
    assert not same_data(data_identity(changed[0]), one)
    assert not same_data("2:", one)


@pytest.mark.parametrize("name", ["train/train-000000.tar", "validation/validation-000000.tar", "tokenizer.json"])
def test_a_flipped_bit_is_found_before_the_first_step(runs, data_set, tmp_path, name):
    copy = Path(shutil.copytree(data_set, tmp_path / "copy"))
    damaged = bytearray((copy / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (copy / name).write_bytes(damaged)
    done = runs("damaged", "--data.path", copy)
    refused(done, f"{copy / name}: sha256 is ")
    assert "copy the data set again" in done.err
    assert not (tmp_path / "damaged").exists()


def test_what_is_too_large_to_verify_is_said(runs, data_set):
    done = runs("large", "--data.path", data_set, "--data.verify-gb", 0, "--train.steps", 1)
    assert done.code == 0, done.err
    assert "the train split has 0.0 GB and is not verified (data.verify_gb=0 for each of 1 ranks)" in done.err


def test_ranks_share_the_verifying(data_set, tmp_path):
    folder = tmp_path / "many"
    manifest = load_manifest(data_set)
    options = {"length": manifest.length, "tokenizer": str(data_set / manifest.tokenizer), "rows_per_member": 64}
    source = str(Path(__file__).parents[4] / "corpora" / "austen.jsonl.gz")
    prep(PrepConfig(inputs=(source,), out=str(folder), **options, rows_per_shard=64, max_chars=9000))
    reader = RowReader(folder, "train")
    assert len(reader.shards) > 2
    path = folder / "train" / reader.shards[1].name
    path.write_bytes(path.read_bytes().replace(b"\x00\x01", b"\x00\x02", 1))
    RowReader(folder, "train").verify(0, 2)
    with pytest.raises(DataError, match=reader.shards[1].name):
        RowReader(folder, "train").verify(1, 2)
