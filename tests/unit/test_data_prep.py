"""From text to a data set and back: contents, determinism, reuse, and that failures leave nothing."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data_prep import prep as prep_module
from data_prep import shards
from data_prep.errors import DataError
from data_prep.manifest import Manifest, load_manifest
from data_prep.prep import PrepConfig, in_validation, prep
from data_prep.reader import RowReader
from data_prep.tokenize import encode, load_tokenizer

WORDS = ["it", "is", "a", "truth", "universally", "acknowledged", "single", "man", "of", "good", "fortune"]


def corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """A small JSONL file of random sentences."""
    rng = np.random.default_rng(seed)
    path = folder / "text.jsonl"
    with path.open("w") as stream:
        for i in range(documents):
            text = " ".join(rng.choice(WORDS, size=int(rng.integers(20, 60))))
            stream.write(json.dumps({"id": f"doc-{i}", "text": text}) + "\n")
    return path


def asked(tmp_path: Path, **changes) -> PrepConfig:
    values = {
        "inputs": [str(tmp_path / "text.jsonl")],
        "out": str(tmp_path / "data"),
        "length": 16,
        "tokenizer": "bpe:300",
        "validation_fraction": 0.25,
        "rows_per_member": 8,
        "rows_per_shard": 24,
    }
    return PrepConfig(**values | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(tmp_path: Path, config: PrepConfig) -> str:
    """The error of a prep that must fail in one line and leave the folder as it was."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError) as caught:
        prep(config)
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory) -> tuple[PrepConfig, Manifest]:
    tmp_path = tmp_path_factory.mktemp("prep")
    corpus(tmp_path)
    config = asked(tmp_path)
    return config, prep(config)


def test_rows_are_the_documents_of_each_split_packed(data_set):
    config, manifest = data_set
    tokenizer = load_tokenizer(Path(config.out) / "tokenizer.json")
    records = [json.loads(line) for line in Path(config.inputs[0]).read_text().splitlines()]
    seen = 0
    for name, split in manifest.splits.items():
        texts = [r["text"] for r in records if in_validation(r["id"], 0, 0.25) == (name == "validation")]
        stream = [token for ids in encode(tokenizer, texts) for token in (*ids, manifest.eos_id)]
        rows = RowReader(config.out, name).rows(np.arange(split.rows))
        assert rows[:, 1:-1].ravel().tolist() == stream[: len(stream) - split.dropped_tokens]
        assert (split.documents, split.tokens) == (len(texts), rows.size)
        assert split.text_bytes == sum(len(text.encode()) for text in texts)
        assert split.documents > 0
        seen += split.documents
    assert seen == len(records)


def test_manifest_numbers(data_set):
    config, manifest = data_set
    train, held_out = (
        RowReader(config.out, name).rows(np.arange(manifest.splits[name].rows))[:, 1:] for name in manifest.splits
    )
    counts = np.bincount(train.ravel(), minlength=manifest.vocab_size)
    share = counts[counts > 0] / counts.sum()
    assert manifest.splits["train"].unigram_entropy == pytest.approx(-(share * np.log(share)).sum())
    smoothed = (counts + 1) / (counts + 1).sum()
    nats = -np.log(smoothed[held_out]).mean()
    assert manifest.validation_unigram_nats == pytest.approx(nats)
    assert manifest.validation_unigram_perplexity == pytest.approx(np.exp(nats))
    assert manifest == load_manifest(config.out)
    assert (manifest.dtype, manifest.mask_id, manifest.rejects) == ("<u2", 2, 0)
    for split in manifest.splits.values():
        assert [shard.rows for shard in split.shards[:-1]] == [24] * (len(split.shards) - 1)
        assert sum(shard.rows for shard in split.shards) == split.rows


def test_two_preps_give_equal_bytes(data_set, tmp_path):
    config, _ = data_set
    prep(config.model_copy(update={"out": str(tmp_path / "deep" / "again")}))
    assert contents(tmp_path / "deep" / "again") == contents(Path(config.out))


def test_stock_webdataset_reads_the_same_rows(data_set):
    import webdataset

    config, manifest = data_set
    for name, split in manifest.splits.items():
        urls = [str(Path(config.out) / name / shard.name) for shard in split.shards]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        assert len({sample["__key__"] for sample in samples}) == len(samples)
        reader = RowReader(config.out, name)
        tokens = np.concatenate([sample["tokens.npy"] for sample in samples])
        assert (tokens == reader.rows(np.arange(split.rows))).all()
        documents = reader.documents(np.arange(split.rows))
        first = 0
        for sample in samples:
            rows, positions = sample["docs.npy"].T
            begin = documents[first + rows, positions]
            assert (np.diff(begin) == 1).all()
            first += len(sample["tokens.npy"])
        assert documents[0, 0] == 0
        assert (np.diff(documents.ravel()) >= 0).all()
        assert sum(len(sample["docs.npy"]) for sample in samples) == documents[-1, -1] + 1


def test_split_is_stable_and_follows_the_fraction():
    names = [f"doc-{i}" for i in range(4000)]
    small, large = ({n for n in names if in_validation(n, 0, f)} for f in (0.1, 0.2))
    assert small < large
    assert abs(len(small) - 400) < 60
    assert abs(len({n for n in names if in_validation(n, 1, 0.1)} & small) - 40) < 25
    assert [in_validation(n, 0, 0.1) for n in ("emma-00002", "doc-8", "日本")] == [False, True, False]


def test_stream_packing_and_a_tokenizer_without_a_mask(tmp_path):
    """The GPT-2 case in small: no mask token, one token for both ends; the mask becomes a new last id."""
    corpus(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "words.json"))
    manifest = prep(asked(tmp_path, tokenizer=str(tmp_path / "words.json"), packing="stream"))
    n = len(WORDS)
    assert (manifest.bos_id, manifest.eos_id, manifest.mask_id, manifest.vocab_size) == (n, n, n + 1, n + 2)
    assert (tmp_path / "data/tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()
    rows = RowReader(tmp_path / "data", "train").rows(np.arange(manifest.splits["train"].rows))
    assert rows.max() == n
    assert (rows == n).sum() >= 2 * manifest.splits["train"].documents - 2


def test_the_same_again_is_no_work_and_another_is_an_error(data_set, tmp_path):
    config, manifest = data_set
    lines: list[str] = []
    before = {p: p.stat().st_mtime_ns for p in Path(config.out).rglob("*")}
    assert prep(config, lines.append) == manifest
    assert len(lines) == 1
    assert "nothing to do" in lines[0]
    assert before == {p: p.stat().st_mtime_ns for p in Path(config.out).rglob("*")}
    for change, says in (({"length": 32}, "length=16, not 32"), ({"seed": 1}, "split_seed=0, not 1")):
        with pytest.raises(DataError, match=f"{says}; choose another --out or pass --overwrite"):
            prep(config.model_copy(update=change))
    other = corpus(tmp_path, documents=10)
    with pytest.raises(DataError, match="other sources"):
        prep(config.model_copy(update={"inputs": (str(other),)}))


def test_overwrite_replaces_data_sets_only(tmp_path):
    corpus(tmp_path)
    prep(asked(tmp_path))
    assert prep(asked(tmp_path, length=8, overwrite=True)).length == 8
    assert load_manifest(tmp_path / "data").length == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "text.jsonl"]
    refused(tmp_path, asked(tmp_path, length=9999, overwrite=True))  # the old one stays
    assert load_manifest(tmp_path / "data").length == 8
    (tmp_path / "data" / "notes.txt").write_text("mine")
    assert "it also holds notes.txt" in refused(tmp_path, asked(tmp_path, overwrite=True))
    (tmp_path / "other").mkdir()
    for overwrite in (False, True):
        config = asked(tmp_path, out=str(tmp_path / "other"), overwrite=overwrite)
        assert "choose another --out" in refused(tmp_path, config)


def test_a_data_set_with_a_cut_shard_is_not_reused(tmp_path):
    corpus(tmp_path)
    manifest = prep(asked(tmp_path))
    shard = tmp_path / "data/train" / manifest.splits["train"].shards[0].name
    os.truncate(shard, shard.stat().st_size - 512)
    assert "the manifest says" in refused(tmp_path, asked(tmp_path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"length": 100_000}, "fill no row"),
        ({"validation_fraction": 1e-9}, "none of 60 documents falls into the validation split"),
        ({"validation_fraction": 1 - 1e-9}, "none of 60 documents falls into the train split"),
        ({"tokenizer": "bpe:many"}, "tokenizer=bpe:many"),
        ({"tokenizer": "bpe:" + "9" * 5000}, "after bpe: goes a number of entries below 100000000"),
        ({"tokenizer": "bpe:100"}, "tokenizer=bpe:100"),
        ({"tokenizer": "missing.json"}, "missing.json: no such tokenizer file"),
        ({"bos": "<nope>"}, "--bos <nope>"),
        ({"text_field": "txt"}, "use --text-field text"),
        ({"inputs": ["missing.jsonl"]}, "missing.jsonl: no such file"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, changes, says):
    corpus(tmp_path)
    assert says in refused(tmp_path, asked(tmp_path, out=str(tmp_path / "new" / "data"), **changes))


def test_damaged_sources_leave_nothing_behind(tmp_path):
    text = corpus(tmp_path).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(text)[:-9])
    (tmp_path / "bad.jsonl").write_bytes(text + b"\xff\n")
    (tmp_path / "none.jsonl").write_bytes(b"\n")
    for name, says in (
        ("cut.jsonl.gz", "ends early"),
        ("bad.jsonl", ":61: not UTF-8"),
        ("none.jsonl", "no documents"),
    ):
        assert says in refused(tmp_path, asked(tmp_path, inputs=[str(tmp_path / name)]))


def test_a_source_that_grows_meanwhile_is_noticed(tmp_path, monkeypatch):
    path = corpus(tmp_path)
    fill = prep_module._fill

    def grow(*args):
        with path.open("a") as stream:
            stream.write('{"text": "late"}\n')
        return fill(*args)

    monkeypatch.setattr(prep_module, "_fill", grow)
    assert "changed while it was read" in refused(tmp_path, asked(tmp_path))


def test_text_that_encodes_to_the_mask_is_refused(tmp_path):
    corpus(tmp_path)
    with (tmp_path / "text.jsonl").open("a") as stream:
        stream.write('{"id": "odd", "text": "a <mask> man"}\n')
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens([AddedToken("<mask>", special=False)])
    tokenizer.save(str(tmp_path / "t.json"))
    says = refused(tmp_path, asked(tmp_path, tokenizer=str(tmp_path / "t.json")))
    assert "document odd: its text holds the mask '<mask>'" in says


def test_output_that_cannot_be_written(tmp_path, monkeypatch):
    corpus(tmp_path)
    inside_a_file = tmp_path / "text.jsonl" / "data"
    reads = []
    monkeypatch.setattr(prep_module, "read_documents", lambda *args: reads.append(args))
    assert str(inside_a_file) in refused(tmp_path, asked(tmp_path, out=str(inside_a_file)))
    assert not reads  # found out before any work


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    corpus(tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    says = refused(tmp_path, asked(tmp_path))
    assert says.startswith(f"{tmp_path / 'data'}: cannot be written (No space left on device); make room")


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    corpus(tmp_path)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prep_module, "save_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        prep(asked(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["text.jsonl"]


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    corpus(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    dead = int(child.stdout)
    gone = [f".data.partial-{dead}", f".data.replaced-{dead}"]
    kept = [f".data.partial-{os.getppid()}", f".data.partial-{dead}@another-host", f".other.partial-{dead}"]
    for name in gone + kept:
        (tmp_path / name).mkdir()
    prep(asked(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "data", "text.jsonl"])


def test_progress_is_reported(tmp_path):
    corpus(tmp_path)
    lines: list[str] = []
    prep(asked(tmp_path), lines.append)
    assert any("packed: 60 documents" in line and "MB/s" in line for line in lines)
    assert "validation unigram perplexity" in lines[-1]


def test_config_refuses_what_cannot_be():
    with pytest.raises(ValidationError, match="not a multiple of rows_per_member=512; use 1024"):
        PrepConfig(inputs=["x"], out="y", rows_per_shard=600)
    with pytest.raises(ValidationError):
        PrepConfig(inputs=["x"], out="y", lenght=5)


def test_the_room_does_not_import_torch():
    code = "import sys, data_prep.prep, data_prep.reader, data_prep.order; print('torch' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "False"


def test_the_demo_corpus_is_readable():
    from data_prep.sources import read_documents

    path = Path(__file__).parents[2] / "corpora" / "austen.jsonl.gz"
    documents = list(read_documents([path]))
    assert len({d.id for d in documents}) == len(documents) == 271
