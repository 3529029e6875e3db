"""From text to a data set and back: contents, determinism, reuse, and that failures leave nothing."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from bd3_common import atomic
from bd3_common.atomic import atomic_file
from data_prep import sources as sources_module
from data_prep.build import encode as encode_module
from data_prep.build import plan, pool, work_folder
from data_prep.build import prep as prep_module
from data_prep.build.estimate import estimate
from data_prep.build.prep import PrepConfig, in_validation, prep
from data_prep.build.progress import Progress, duration
from data_prep.build.work_folder import Work
from data_prep.errors import DataError
from data_prep.format import remote
from data_prep.format.manifest import Manifest, load_manifest
from data_prep.format.text_encoder import TextEncoder
from data_prep.format.tokenizer import load_tokenizer, train_bpe
from data_prep.read.reader import RowReader
from data_prep.sources import Fields, expand, read_part
from data_prep.verify.check import check
from tests.unit.commands import bd3, start

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


def prep_config(tmp_path: Path, **changes) -> PrepConfig:
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


def trained(folder: Path) -> str:
    """A tokenizer of the corpus."""
    path = folder / "bpe.json"
    if not path.exists():
        train_bpe([" ".join(WORDS)] * 3, 300).save(str(path))
    return str(path)


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
    config = prep_config(tmp_path)
    return config, prep(config)


def test_rows_are_the_documents_of_each_split_packed(data_set):
    config, manifest = data_set
    tokenizer = load_tokenizer(Path(config.out) / "tokenizer.json")
    records = [json.loads(line) for line in Path(config.inputs[0]).read_text().splitlines()]
    seen = 0
    for name, split in manifest.splits.items():
        texts = [r["text"] for r in records if in_validation(r["id"], 0, 0.25) == (name == "validation")]
        stream = [token for ids in TextEncoder(tokenizer).encode(texts) for token in (*ids, manifest.eos_id)]
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
    manifest = prep(prep_config(tmp_path, tokenizer=str(tmp_path / "words.json"), packing="stream"))
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
    for change, message in (({"length": 32}, "length=16, not 32"), ({"seed": 1}, "split_seed=0, not 1")):
        with pytest.raises(DataError, match=f"{message}; choose another --out or pass --overwrite"):
            prep(config.model_copy(update=change))
    other = corpus(tmp_path, documents=10)
    with pytest.raises(DataError, match="other sources"):
        prep(config.model_copy(update={"inputs": (str(other),)}))


def test_overwrite_replaces_data_sets_only(tmp_path):
    corpus(tmp_path)
    prep(prep_config(tmp_path))
    assert prep(prep_config(tmp_path, length=8, overwrite=True)).length == 8
    assert load_manifest(tmp_path / "data").length == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "text.jsonl"]
    refused(tmp_path, prep_config(tmp_path, length=9999, overwrite=True))  # the old one stays
    assert load_manifest(tmp_path / "data").length == 8
    (tmp_path / "data" / "notes.txt").write_text("mine")
    assert "it also holds notes.txt" in refused(tmp_path, prep_config(tmp_path, overwrite=True))
    (tmp_path / "other").mkdir()
    for overwrite in (False, True):
        config = prep_config(tmp_path, out=str(tmp_path / "other"), overwrite=overwrite)
        assert "choose another --out" in refused(tmp_path, config)


def test_a_data_set_with_a_cut_shard_is_not_reused(tmp_path):
    corpus(tmp_path)
    manifest = prep(prep_config(tmp_path))
    shard = tmp_path / "data/train" / manifest.splits["train"].shards[0].name
    os.truncate(shard, shard.stat().st_size - 512)
    assert "the manifest says" in refused(tmp_path, prep_config(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
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
        ({"inputs": ["missing.jsonl"]}, "missing.jsonl: no such"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, changes, message):
    corpus(tmp_path)
    assert message in refused(tmp_path, prep_config(tmp_path, out=str(tmp_path / "new" / "data"), **changes))


def test_an_output_folder_needs_a_name(tmp_path):
    corpus(tmp_path)
    with pytest.raises(DataError, match=r"^--out /: has no name of its own; give a new folder below it$"):
        prep(prep_config(tmp_path, out="/"))


def test_without_a_document_no_tokenizer_is_trained(tmp_path):
    path = tmp_path / "text.jsonl"
    for text, reason in (("\n", "; give files with text"), ('{"txt": "a"}\n', ": text.jsonl at 0: no field 'text'")):
        path.write_text(text)
        config = prep_config(tmp_path, tokenizer="bpe:300", out=str(tmp_path / "data"))
        said: list[str] = []
        with pytest.raises(DataError, match=f"no documents in the input{reason}") as error:
            prep(config, said.append)
        assert str(error.value).count("text.jsonl") == 1
        assert not any("trained" in line for line in said)


def test_a_smaller_vocabulary_than_asked_for_is_said(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "ab"}\n' * 100)
    said: list[str] = []
    prep(prep_config(tmp_path, tokenizer="bpe:1000", length=8), said.append)
    assert any(re.search(r"BPE of 2\d\d entries instead of 1000: the text has no more$", line) for line in said)


def test_a_broken_source_fails_alone(tmp_path):
    text = corpus(tmp_path).read_bytes()
    whole = tmp_path / "whole.jsonl"
    whole.write_bytes(text.replace(b"doc-", b"more-"))
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(text, mtime=0)[:-9])
    tokenizer = trained(tmp_path)
    config = prep_config(tmp_path, inputs=[str(packed), str(whole)], tokenizer=tokenizer)
    lines: list[str] = []
    with pytest.raises(DataError, match=r"packed.jsonl.gz: .*; 1 of 2 parts are done and kept; fix this and run again"):
        prep(config, lines.append)
    assert not (tmp_path / "data").exists()
    packed.write_bytes(gzip.compress(text, mtime=0))
    assert prep(config, lines.append)
    assert any("continuing: 1 of 2 parts are done already" in line for line in lines)
    at_once = prep_config(tmp_path, inputs=[str(packed), str(whole)], tokenizer=tokenizer, out=str(tmp_path / "again"))
    prep(at_once)
    assert contents(tmp_path / "data") == contents(tmp_path / "again")


def test_a_source_without_rights_fails_alone(tmp_path, monkeypatch):
    corpus(tmp_path)
    closed = tmp_path / "closed.jsonl"
    closed.write_bytes((tmp_path / "text.jsonl").read_bytes())
    inputs = [str(closed), str(tmp_path / "text.jsonl")]
    config = prep_config(tmp_path, inputs=inputs, tokenizer=trained(tmp_path), workers=1)
    opened = Path.open

    def refuse(path, *args, **options):
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(
            DataError, match=r"closed\.jsonl: cannot be read \(Permission denied\).*1 of 2 parts are done"
        ):
            prep(config)
    assert prep(config)


def test_bad_records_are_listed_and_left_out(tmp_path):
    path = corpus(tmp_path)
    clean = prep(prep_config(tmp_path, out=str(tmp_path / "clean"), tokenizer=trained(tmp_path)))
    lines = path.read_bytes().splitlines(keepends=True)
    bad = {3: b"\xff\n", 20: b'{"id": "x"}\n', 41: b"nonsense\n"}
    with path.open("wb") as stream:
        offsets = []
        for number, line in enumerate(lines):
            if number in bad:
                offsets.append(stream.tell())
                stream.write(bad[number])
            stream.write(line)
    config = prep_config(tmp_path, tokenizer=trained(tmp_path))
    said: list[str] = []
    manifest = prep(config, said.append)
    assert manifest.rejects == 3
    assert said[-2] == "rejected: 3 bad records, listed in rejects.jsonl"
    records = [json.loads(line) for line in (tmp_path / "data/rejects.jsonl").read_text().splitlines()]
    assert [record["offset"] for record in records] == offsets
    assert {record["source"] for record in records} == {"text.jsonl"}
    for record, message in zip(records, ("UTF-8", "no field 'text'", "not JSON")):
        assert message in record["reason"]
    assert manifest.splits == clean.splits  # the rest is as if they had never been there

    for most, message in ((2, "that is the first of 3 bad records, and max_rejects=2"), (0, "at ")):
        config = prep_config(tmp_path, tokenizer=trained(tmp_path), max_rejects=most, out=str(tmp_path / "strict"))
        assert message in refused(tmp_path, config)
    config = prep_config(tmp_path, validation_fraction=1e-9, out=str(tmp_path / "strict"))
    assert "; 3 bad records, the first: text.jsonl at " in refused(tmp_path, config)
    config = prep_config(tmp_path, inputs=[str(path), *more_bad(tmp_path)], tokenizer=trained(tmp_path), max_rejects=4)
    with pytest.raises(DataError, match="first of 6 bad records"):  # none of the files has too many by itself
        prep(config.model_copy(update={"out": str(tmp_path / "sum")}))


def more_bad(folder: Path) -> list[str]:
    (folder / "more.jsonl").write_bytes(b"[]\n[]\n[]\n")
    return [str(folder / "more.jsonl")]


def test_lengths_leave_documents_out_and_are_counted(tmp_path):
    path = corpus(tmp_path)
    with path.open("a") as stream:
        stream.write('{"id": "s", "text": "it"}\n{"id": "b", "text": "  "}\n')
    lengths = [len(json.loads(line)["text"]) for line in path.read_text().splitlines()]
    config = prep_config(tmp_path, min_chars=3, max_chars=250)
    manifest = prep(config)
    assert manifest.skipped == {"short": 2, "long": sum(n > 250 for n in lengths)}
    assert sum(split.documents for split in manifest.splits.values()) == sum(3 <= n <= 250 for n in lengths)


def test_without_documents_no_starts_are_stored(tmp_path):
    corpus(tmp_path)
    prep(prep_config(tmp_path, documents=False))
    manifest = load_manifest(tmp_path / "data")
    assert not manifest.recipe.documents
    assert all(member[3] == 0 for shard in manifest.splits["train"].shards for member in shard.members)


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_bos_and_eos_policy_of_a_stream(tmp_path, bos, eos):
    path = corpus(tmp_path)
    config = prep_config(tmp_path, packing="stream", add_bos=bos, add_eos=eos)
    manifest = prep(config)
    tokenizer = load_tokenizer(tmp_path / "data/tokenizer.json")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    texts = [r["text"] for r in records if not in_validation(r["id"], 0, 0.25)]
    head, tail = [manifest.bos_id] * bos, [manifest.eos_id] * eos
    stream = [token for ids in TextEncoder(tokenizer).encode(texts) for token in (*head, *ids, *tail)]
    reader = RowReader(config.out, "train")
    rows = reader.rows(np.arange(len(reader)))
    assert rows.ravel().tolist() == stream[: rows.size]
    documents = reader.documents(np.arange(len(reader))).ravel()
    lengths = [len(ids) + bos + eos for ids in TextEncoder(tokenizer).encode(texts)]
    assert documents.tolist() == np.repeat(np.arange(len(texts)), lengths)[: rows.size].tolist()


def test_neither_parts_nor_processes_nor_shares_change_a_byte(tmp_path, monkeypatch):
    path = corpus(tmp_path, documents=80)
    packed = tmp_path / "more.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes().replace(b"doc-", b"other-"), mtime=0))
    inputs = {"inputs": [str(path), str(packed)], "tokenizer": trained(tmp_path)}
    prep(prep_config(tmp_path, **inputs, workers=1))
    expected = contents(tmp_path / "data")
    monkeypatch.setattr(plan, "SMALLEST_PART", 700)
    prep(prep_config(tmp_path, **inputs, out=str(tmp_path / "two"), workers=2))
    assert contents(tmp_path / "two") == expected

    shares = [prep_config(tmp_path, **inputs, out=str(tmp_path / "shares"), part=f"{k}/3", workers=1) for k in range(3)]
    lines: list[str] = []
    assert [prep(share, lines.append) is None for share in shares] == [True, True, False]
    assert "parts are left to others" in lines[1]
    assert contents(tmp_path / "shares") == expected
    assert prep(shares[0], lines.append) == load_manifest(tmp_path / "shares")
    assert "nothing to do" in lines[-1]


def test_shares_of_a_slurm_array(monkeypatch):
    for name, value in (("ID", 7), ("MIN", 3), ("COUNT", 4), ("STEP", 2)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert plan.share_of("slurm") == (2, 4)
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "9")
    assert plan.share_of("slurm") == (2, 4)
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "19")  # --array=3,7,9,19, as failed tasks are submitted again
    with pytest.raises(DataError, match=r"an array of 4 tasks from 3 to 19 leaves some out.*use --part K/N"):
        plan.share_of("slurm")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    with pytest.raises(DataError, match="part=slurm: not in an array job"):
        plan.share_of("slurm")


def test_sharing_tasks_at_once(tmp_path):
    """All tasks of an array start at once: one trains the tokenizer, one publishes, and all succeed."""
    corpus(tmp_path)
    prep(prep_config(tmp_path))
    script = (
        "import sys; from data_prep.build.prep import PrepConfig, prep;"
        "prep(PrepConfig.model_validate_json(sys.argv[1]), print)"
    )
    configs = [prep_config(tmp_path, out=str(tmp_path / "array"), part=f"{k}/4", workers=1) for k in range(4)]
    children = [subprocess.Popen([sys.executable, "-c", script, c.model_dump_json()]) for c in configs]
    assert [child.wait() for child in children] == [0] * 4
    assert contents(tmp_path / "array") == contents(tmp_path / "data")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(("workers", "moments"), [(1, 16), (2, 4)])
def test_a_killed_prep_goes_on_to_the_same_bytes(tmp_path, workers, moments):
    """Kill -9 at moments spread over the whole run; the same command again ends it."""
    corpus(tmp_path, documents=80)
    options = ["--length", 16, "--tokenizer", trained(tmp_path), "--rows-per-member", 8, "--rows-per-shard", 64]
    command = ["prep", tmp_path / "text.jsonl", *options, "--workers", workers]
    how = {"log": tmp_path / "log", "before": small_parts, "parent": workers > 1}
    begun = time.monotonic()
    assert bd3(*command, "--out", tmp_path / "whole", **how).code == 0
    seconds = time.monotonic() - begun
    rng = np.random.default_rng(workers)
    for number in range(moments):
        out = tmp_path / f"killed-{number}"
        process = start(*command, "--out", out, **how)
        process.join(seconds * (number + rng.uniform()) / moments)
        process.kill()
        process.join()
        done = bd3(*command, "--out", out, **how)
        assert done.code == 0, done.err
        assert contents(out) == contents(tmp_path / "whole")
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def small_parts() -> None:
    plan.SMALLEST_PART, pool.LITTLE = 8000, 0
    atomic.sync = work_folder.sync = lambda path: None  # a killed process loses nothing that it has written


@pytest.mark.parametrize(
    "where", ["encode.read_part", "assemble.write_shard", "prep.save_manifest", "work_folder.Work.publish"]
)
def test_a_prep_that_fails_late_goes_on(tmp_path, monkeypatch, where):
    corpus(tmp_path)
    config = prep_config(tmp_path, tokenizer=trained(tmp_path))
    prep(config.model_copy(update={"out": str(tmp_path / "whole")}))
    module, _, name = where.partition(".")

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"data_prep.build.{module}.{name}", stop)
        with pytest.raises(KeyboardInterrupt):
            prep(config)
    assert not (tmp_path / "data").exists()
    prep(config)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_unfinished_work_of_other_options_is_not_mixed_in(tmp_path, monkeypatch):
    corpus(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(prep_module, "save_manifest", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prep(prep_config(tmp_path))
    with pytest.raises(DataError, match="unfinished work with length=16, not 32; finish it with the same options"):
        prep(prep_config(tmp_path, length=32))
    assert prep(prep_config(tmp_path, length=32, overwrite=True)).length == 32
    assert load_manifest(tmp_path / "data").length == 32


@pytest.mark.parametrize("tokenizer", ["bpe:300", "given"])
def test_a_prep_that_goes_on_with_other_inputs_mixes_nothing(tmp_path, monkeypatch, tokenizer):
    """Neither shards cut from the earlier inputs nor a tokenizer trained on them find their way into the data set."""
    one, other = corpus(tmp_path, seed=1).rename(tmp_path / "one.jsonl"), corpus(tmp_path)
    tokenizer = trained(tmp_path) if tokenizer == "given" else tokenizer
    config = prep_config(tmp_path, tokenizer=tokenizer, inputs=[str(other), str(one)])
    prep(config.model_copy(update={"out": str(tmp_path / "whole")}))
    with monkeypatch.context() as patch:
        patch.setattr(prep_module, "save_manifest", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prep(config.model_copy(update={"inputs": (str(one),)}))
    if tokenizer == "bpe:300":
        with pytest.raises(DataError, match="tokenizer trained on other inputs; give every share the same"):
            prep(config.model_copy(update={"part": "0/2"}))
    prep(config)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_streams_cut_after_they_were_finished_are_written_again(tmp_path):
    corpus(tmp_path)
    more = [str(tmp_path / "text.jsonl"), str(corpus(tmp_path, seed=1).rename(tmp_path / "more.jsonl"))]
    corpus(tmp_path)
    config = prep_config(tmp_path, tokenizer=trained(tmp_path), inputs=more)
    prep(config.model_copy(update={"out": str(tmp_path / "whole")}))
    assert prep(config.model_copy(update={"part": "0/2"})) is None
    (stream,) = (tmp_path / ".data.partial").glob("parts/*/train.tokens")
    os.truncate(stream, stream.stat().st_size // 2)
    prep(config)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_overwrite_after_a_kill_right_behind_the_move(tmp_path, monkeypatch):
    corpus(tmp_path)
    prep(prep_config(tmp_path))
    again = prep_config(tmp_path, overwrite=True, length=32)
    with monkeypatch.context() as patch:
        patch.setattr(Work, "remove", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prep(again)
    assert (tmp_path / ".data.partial" / "replaced").exists()
    assert prep(again).length == 32
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_one_file_written_by_processes_of_one_id(tmp_path):
    """As tasks of an array do on several hosts: the second to end must find its own temporary file."""
    path = tmp_path / "recipe.json"
    with atomic_file(path) as one, atomic_file(path) as other:
        one.write_text("1")
        other.write_text("1")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_two_preps_of_one_data_set(tmp_path):
    corpus(tmp_path)
    config = prep_config(tmp_path)
    busy = pytest.raises(DataError, match="another bd3 prep is writing it")
    with Work(tmp_path / "data").opened(config.recipe(), discard=False), busy:
        prep(config)
    assert prep(config)


def test_a_data_set_published_meanwhile_is_taken(tmp_path, monkeypatch):
    corpus(tmp_path)
    manifest = prep(prep_config(tmp_path, out=str(tmp_path / "whole")))

    @contextmanager
    def late(work, name):
        shutil.copytree(tmp_path / "whole", work.out)
        yield False

    monkeypatch.setattr(Work, "exclusively", late)
    assert prep(prep_config(tmp_path, part="0/2")) == manifest
    with pytest.raises(DataError, match="another task has written it meanwhile; run again to check it"):
        prep(prep_config(tmp_path, out=str(tmp_path / "other")))


def test_fetched_files_have_names_of_their_own(tmp_path, monkeypatch, fresh_fsspec):
    """Two processes may run the same share; neither removes what the other is reading."""
    text = corpus(tmp_path).read_bytes()
    for name in ("one", "two"):
        fsspec.filesystem("memory").pipe(f"/c/{name}.jsonl", text.replace(b"doc-", name.encode()))
    places = []

    def fetch(url, to, *rest):
        places.append(to)
        return remote.fetch(url, to, *rest)

    monkeypatch.setattr(encode_module, "fetch", fetch)
    monkeypatch.setattr(prep_module, "fetch", fetch)
    for _ in range(2):
        prep(prep_config(tmp_path, inputs=["memory://c"], workers=1, overwrite=True))
    assert len(set(places)) == 8  # twice each file for the tokenizer and for its tokens


def test_failed_work_is_removed_under_its_lock(tmp_path, monkeypatch):
    corpus(tmp_path)
    config = prep_config(tmp_path)
    busy = pytest.raises(DataError, match="another bd3 prep is writing it")
    removed = []

    def remove(work):
        with busy, Work(tmp_path / "data").opened(config.recipe(), discard=False):
            pass
        removed.append(work.folder)

    monkeypatch.setattr(Work, "remove", remove)
    with pytest.raises(ZeroDivisionError), Work(tmp_path / "data").opened(config.recipe(), discard=False):
        1 / 0  # noqa: B018
    assert removed == [tmp_path / ".data.partial"]


def test_a_source_that_grows_meanwhile_is_noticed(tmp_path, monkeypatch):
    path = corpus(tmp_path)
    read = encode_module.read_part

    def grow(*args):
        yield from read(*args)
        with path.open("a") as stream:
            stream.write('{"text": "late"}\n')

    monkeypatch.setattr(encode_module, "read_part", grow)
    assert "changed while it was read" in refused(tmp_path, prep_config(tmp_path))


def word_level(folder: Path, *added: AddedToken, words: str = "") -> str:
    """A tokenizer of the corpus' words and more words, with ``<s>``."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*WORDS, *words.split()])}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(folder / "t.json"))
    return str(folder / "t.json")


def test_a_mask_spelled_out_is_text(tmp_path):
    corpus(tmp_path)
    with (tmp_path / "text.jsonl").open("a") as stream:
        stream.write('{"id": "odd", "text": "a <mask> <s> man"}\n')
    tokenizer, n = word_level(tmp_path, AddedToken("<mask>", special=False), AddedToken("<p>")), len(WORDS)
    manifest = prep(prep_config(tmp_path, tokenizer=tokenizer, pad="<p>"))
    assert (manifest.rejects, manifest.mask_id, manifest.pad_id, manifest.vocab_size) == (0, n + 1, n + 2, n + 3)
    for name, split in manifest.splits.items():
        rows = RowReader(tmp_path / "data", name).rows(np.arange(split.rows))
        assert rows.max() == n
        assert split.documents - 1 <= (rows[:, 1:-1] == n).sum() <= split.documents  # <s> ends documents too


def test_text_that_gives_a_control_id_is_refused(tmp_path):
    """An ordinary word is named as the mask."""
    corpus(tmp_path)
    with (tmp_path / "text.jsonl").open("a") as stream:
        stream.write('{"id": "odd", "text": "a zebra"}\n')
    config = prep_config(tmp_path, tokenizer=word_level(tmp_path, words="zebra"), mask="zebra")
    line = f"the text gives the id {len(WORDS)} of zebra, which no text may give; choose other tokens with --bos"
    assert prep(config).rejects == 1
    assert line in (tmp_path / "data/rejects.jsonl").read_text()
    assert line in refused(tmp_path, config.model_copy(update={"out": str(tmp_path / "x"), "max_rejects": 0}))


def test_a_tokenizer_with_dropout_is_used_without_it(tmp_path):
    corpus(tmp_path)
    content = json.loads(Path(trained(tmp_path)).read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "d.json").write_text(json.dumps(content))
    told, manifests = [], []
    for out in ("one", "two"):
        config = prep_config(tmp_path, tokenizer=str(tmp_path / "d.json"), out=str(tmp_path / out))
        manifests.append(prep(config, told.append))
    plain = prep(prep_config(tmp_path, tokenizer=trained(tmp_path)))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert [manifest.splits for manifest in manifests] == [plain.splits] * 2
    assert sum("model.dropout=0.5 is not used" in line for line in told) == 2
    assert json.loads((tmp_path / "one/tokenizer.json").read_text())["model"]["dropout"] is None
    assert check(tmp_path / "one").faults == {}
    prep(config, told.append)
    assert "already there" in told[-1]


def test_lost_characters_are_told_whatever_the_parts(tmp_path, monkeypatch):
    path = corpus(tmp_path, documents=300)
    path.write_text(path.read_text().replace("truth", "tr\u00fcth"))
    tokenizer = word_level(tmp_path)
    told, found = [], []
    for out, size in (("one", plan.SMALLEST_PART), ("two", 4000)):
        monkeypatch.setattr(plan, "SMALLEST_PART", size)
        monkeypatch.setattr(plan, "LARGEST_PART", size)
        config = prep_config(tmp_path, tokenizer=tokenizer, out=str(tmp_path / out), workers=1)
        found.append(prep(config, told.append).lost_characters)
    assert found[0] == found[1] == load_manifest(tmp_path / "one").lost_characters
    # The word is one of eleven, and "a", which stands for unknown words too, is another.
    assert found[0] == pytest.approx(6 / len("".join(WORDS)), rel=0.3)
    assert sum(f"the tokenizer loses {found[0]:.2%} of the characters" in line for line in told) == 2
    assert any("the tokenizer loses" in line for line in estimate(config).lines())


def test_a_manifest_has_no_keys_that_say_nothing(data_set):
    content = json.loads((Path(data_set[0].out) / "manifest.json").read_text())
    assert not {"pad_id", "lost_characters"} & content.keys()
    assert not {"mask", "pad"} & content["recipe"].keys()


def test_output_that_cannot_be_written(tmp_path, monkeypatch):
    corpus(tmp_path)
    inside_a_file = tmp_path / "text.jsonl" / "data"
    reads = []
    monkeypatch.setattr(encode_module, "read_part", lambda *args: reads.append(args))
    assert str(inside_a_file) in refused(tmp_path, prep_config(tmp_path, out=str(inside_a_file)))
    assert not reads  # found out before any work


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    corpus(tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bd3_common.atomic.os.fsync", full)
    message = refused(tmp_path, prep_config(tmp_path))
    assert message.startswith(f"{tmp_path / 'data'}: cannot be written (No space left on device); make room")


def test_a_dry_run_comes_near_and_writes_nothing(tmp_path):
    corpus(tmp_path, documents=300)
    config = prep_config(tmp_path, tokenizer=trained(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    found = estimate(config)
    assert sorted(tmp_path.rglob("*")) == before
    manifest = prep(config)
    assert found.documents == 300
    for name, split in manifest.splits.items():
        assert abs(found.rows[name] - split.rows) <= 1
        assert found.shards[name] == len(split.shards)
    assert found.rejects == 0


def test_a_dry_run_tells_what_prep_will_refuse(tmp_path):
    corpus(tmp_path)
    config = prep_config(tmp_path, tokenizer=trained(tmp_path))
    assert not any("refuse" in line for line in estimate(config).lines())
    lines = estimate(config.model_copy(update={"length": 100_000})).lines()
    assert [line.partition(";")[0] for line in lines if "refuse" in line] == [
        f"prep will refuse this: the {name} split would get no row" for name in ("train", "validation")
    ]
    message = r"no documents at the beginning of the input: text.jsonl at 0: no field 'txt'.*--text-field text$"
    with pytest.raises(DataError, match=message):
        estimate(prep_config(tmp_path, text_field="txt"))


def test_progress_is_reported(tmp_path):
    corpus(tmp_path)
    lines: list[str] = []
    prep(prep_config(tmp_path), lines.append)
    assert any("tokenized: " in line and "MB/s" in line for line in lines)
    assert "validation unigram perplexity" in lines[-1]


def test_time_left():
    progress = Progress(lambda line: None, "read", weight=1000)
    assert progress.seconds_left(1) is None
    progress.tick(100)
    assert progress.seconds_left(2) == pytest.approx(18)
    progress.done(100, 200)  # two bytes of text per stored byte
    progress.tick(400)
    assert progress.seconds_left(4) == pytest.approx(16)
    progress.done(900, 2000)
    assert progress.seconds_left(9) is None
    assert [duration(s) for s in (5, 600, 12000)] == ["5 s", "10 min", "3 h 20 min"]


def test_config_refuses_what_cannot_be():
    with pytest.raises(ValidationError, match="not a multiple of rows_per_member=512; use 1024"):
        PrepConfig(inputs=["x"], out="y", rows_per_shard=600)
    with pytest.raises(ValidationError):
        PrepConfig(inputs=["x"], out="y", lenght=5)


def test_the_room_does_not_import_torch():
    code = (
        "import sys, data_prep.build.prep, data_prep.read.reader, data_prep.read.order; print('torch' in sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "False"


def test_the_demo_corpus_is_readable():
    (source,) = expand([str(Path(__file__).parents[4] / "corpora" / "austen.jsonl.gz")])
    (part,) = sources_module.split(source)
    rejects = []
    documents = list(read_part(part, Path(source.path), Fields(), lambda *at: rejects.append(at), rejects.append))
    assert len({d.id for d in documents}) == len(documents) == 271
    assert not rejects
