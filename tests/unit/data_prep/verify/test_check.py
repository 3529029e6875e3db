"""`bd3 check`: every kind of damage is named, and what a data set holds is counted right."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.build.prep import PrepConfig, in_validation, prep
from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.format.manifest import SPLITS, load_manifest
from data_prep.verify.check import check
from data_prep.verify.duplicates import find_duplicates, row_hashes
from pretrain import cli
from pretrain.commands.check import main, sample_text
from pretrain.tracking.histograms import bar_lines, length_bins, quantile

LENGTH = 8
WORDS = 30


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """One token a word: w0, w1, ..."""
    return word_level(tmp_path_factory.mktemp("tokenizer") / "words.json", WORDS)


def word_level(path: Path, words: int) -> Path:
    names = ["[BOS]", "[EOS]", "[MASK]", *(f"w{i}" for i in range(words))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(names[:3])
    tokenizer.save(str(path))
    return path


def made(folder: Path, texts: list[list[int]], tokenizer: Path, **changes) -> Path:
    """A data set of documents of words."""
    lines = [json.dumps({"id": str(n), "text": " ".join(f"w{i}" for i in ids)}) for n, ids in enumerate(texts)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    values = {
        "inputs": (str(folder / "text.jsonl"),),
        "out": str(folder / "data"),
        "length": LENGTH,
        "tokenizer": str(tokenizer),
        "validation_fraction": 0.4,
        "rows_per_member": 4,
        "rows_per_shard": 8,
        "workers": 1,
    }
    prep(PrepConfig(**values | changes))
    return folder / "data"


def random_texts(count: int = 100) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, WORDS, size=int(n)).tolist() for n in rng.integers(1, 12, size=count)]


@pytest.fixture(scope="module", params=["wrap", "stream"])
def data_set(request, tmp_path_factory, tokenizer) -> Path:
    return made(tmp_path_factory.mktemp("check"), random_texts(), tokenizer, packing=request.param)


@pytest.fixture
def copy(data_set, tmp_path) -> Path:
    return Path(shutil.copytree(data_set, tmp_path / "copy"))


def faults(folder: Path) -> dict[str, str]:
    found = check(folder, workers=1).faults
    return {Path(path).relative_to(folder).as_posix(): str(why) for path, why in found.items()}


def test_a_data_set_as_it_was_written_has_no_faults(data_set, capsys):
    before = sorted((p, p.stat().st_mtime_ns) for p in data_set.rglob("*"))
    assert main([str(data_set), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["faults"] == []
    manifest = load_manifest(data_set)
    for name, split in manifest.splits.items():
        row = found["splits"][name]
        assert (row["rows"], row["tokens"], row["shards"]) == (split.rows, split.tokens, len(split.shards))
        assert row["entropy_nats"] == pytest.approx(split.unigram_entropy)
    assert len(found["samples"]) == 6
    assert sorted((p, p.stat().st_mtime_ns) for p in data_set.rglob("*")) == before


def test_exit_codes_of_the_command(copy, capsys):
    (copy / "extra").write_text("")
    assert cli.main(["check", str(copy)]) == 1
    (copy / "extra").unlink()
    assert cli.main(["check", str(copy)]) == 0
    capsys.readouterr()
    assert cli.main(["check", str(copy / "none")]) == 2
    assert capsys.readouterr().err == f"{copy}/none: no such data set; write it with bd3 prep --out {copy}/none\n"


@pytest.mark.parametrize("packing", ["wrap", "stream"])
@pytest.mark.parametrize("ends", [True, False])
def test_lengths_and_tokens_are_those_of_the_text(tmp_path, tokenizer, packing, ends):
    if packing == "wrap" and not ends:
        pytest.skip("wrap needs its ends")
    texts = random_texts()
    folder = made(tmp_path, texts, tokenizer, packing=packing, add_bos=ends, add_eos=ends)
    found = check(folder, workers=1)
    assert not found.faults
    for name, content in found.splits.items():
        wanted = [ids for n, ids in enumerate(texts) if in_validation(str(n), 0, 0.4) == (name == "validation")]
        dropped = found.manifest.splits[name].dropped_tokens
        if content.cut_tokens is not None:
            assert dropped > 0
            assert 0 <= content.cut_tokens <= len(wanted[content.starts - 1]) + 1
        whole = wanted[: content.starts - (content.cut_tokens is not None)]
        assert content.lengths == Counter(map(len, whole))
        words = Counter(i for ids in whole for i in ids)
        for word, count in words.items():
            assert content.counts[3 + word] >= count - (
                0 if packing == "wrap" else content.rows
            )  # position 0 is left out


def test_lengths_join_across_shards_whatever_the_members(tmp_path, tokenizer):
    texts = [*random_texts(30), list(range(30)) * 20, *random_texts(5)]
    lengths = []
    for place, sizes in enumerate([(1, 1), (2, 4), (512, 1024)]):
        folder = tmp_path / str(place)
        folder.mkdir()
        data = made(folder, texts, tokenizer, rows_per_member=sizes[0], rows_per_shard=sizes[1])
        found = check(data, workers=1)
        assert not found.faults
        lengths.append({name: content.lengths for name, content in found.splits.items()})
    assert lengths[0] == lengths[1] == lengths[2]
    assert sum(found[600] for found in lengths[0].values()) == 1


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_any_flipped_bit_is_found(copy):
    shard = load_manifest(copy).splits["train"].shards[1]
    path = copy / "train" / shard.name
    places = {
        "token": shard.members[0][0] + 3,
        "docs": shard.members[0][1],
        "header": 5,
        "npy": 520,
        "end": shard.bytes - 1,
    }
    for place in places.values():
        flip(path, place)
        found = faults(copy)
        assert set(found) == {f"train/{shard.name}"}
        assert "sha256 is" in found[f"train/{shard.name}"]
        flip(path, place)
    assert faults(copy) == {}


def test_cuts_missing_and_extra_files_are_all_listed(copy, capsys):
    shards = load_manifest(copy).splits["train"].shards
    with tarfile.open(copy / "train" / shards[0].name) as tar:
        border = tar.getmembers()[2].offset
    os.truncate(copy / "train" / shards[0].name, border)
    os.truncate(copy / "train" / shards[1].name, border + 700)
    (copy / "train" / shards[2].name).unlink()
    (copy / "train" / "notes.txt").write_text("")
    (copy / "cache").mkdir()
    (copy / "rejects.jsonl").write_text("{}\n")
    flip(copy / "tokenizer.json", -5)
    found = faults(copy)
    assert set(found) == {
        *(f"train/{shard.name}" for shard in shards[:3]),
        *("train/notes.txt", "cache", "rejects.jsonl", "tokenizer.json"),
    }
    first, second, third = (found[f"train/{shard.name}"] for shard in shards[:3])
    assert f"{border} bytes, the manifest says {shards[0].bytes}" in first
    assert "train-000000-000001.tokens.npy is missing, and 1 more" in first
    assert "not a tar" in second
    assert third == "this shard is missing"
    assert main([str(copy)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines[:7]] == sorted(str(copy / name) for name in found)
    assert lines[7].startswith(f"{copy}: 7 faulty files")
    assert "duplicate rows: not looked for, because shards are damaged" in lines


def test_a_tokenizer_of_another_data_set(copy, tmp_path):
    other = word_level(tmp_path / "other.json", WORDS + 1)
    shutil.copy(other, copy / "tokenizer.json")
    found = faults(copy)
    assert set(found) == {"tokenizer.json"}
    assert "sha256 is" in found["tokenizer.json"]
    assert f"its vocab_size is {WORDS + 4}, the manifest says {WORDS + 3}" in found["tokenizer.json"]
    changed(copy, tokenizer_sha256=sha256_file(other), vocab_size=WORDS + 4)
    assert "the recipe says" in faults(copy)["tokenizer.json"]
    (copy / "tokenizer.json").write_text("{}")
    assert "not a tokenizer" in faults(copy)["tokenizer.json"]
    (copy / "tokenizer.json").unlink()
    assert "cannot be read" in faults(copy)["tokenizer.json"]


def test_a_manifest_from_another_tokenizer(tmp_path, tokenizer):
    folders = []
    for name, file in (("a", tokenizer), ("b", word_level(tmp_path / "other.json", WORDS - 5))):
        (tmp_path / name).mkdir()
        folders.append(made(tmp_path / name, random_texts(), file))
    shutil.copy(folders[1] / "manifest.json", folders[0] / "manifest.json")
    found = faults(folders[0])
    assert "tokenizer.json" in found
    assert "train/train-000000.tar" in found
    assert "an id that is not below vocab_size=28" in " ".join(found.values())


def changed(folder: Path, **values) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewritten(folder: Path, change) -> None:
    """Rewrite train-000000.tar with ``change(name, array) -> array``, with a manifest that believes its bytes."""
    path = folder / "train" / "train-000000.tar"
    with tarfile.open(path) as tar:
        members = [(info.name, np.load(io.BytesIO(tar.extractfile(info).read()))) for info in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, array in members:
            buffer = io.BytesIO()
            np.save(buffer, change(name, array.copy()))
            info = tarfile.TarInfo(name)
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)
    content = json.loads((folder / "manifest.json").read_text())
    shard = content["splits"]["train"]["shards"][0]
    shard["sha256"], shard["bytes"] = sha256_file(path), path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(content))


def put(kind: str, where, value):
    def change(name: str, array: np.ndarray) -> np.ndarray:
        if name.endswith(f"000000.{kind}.npy"):
            array[where] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (put("tokens", (1, 3), 60_000), "row 1 has an id that is not below vocab_size=33"),
        (put("tokens", (2, 3), 2), "row 2 has the mask (id 2)"),
        (put("docs", (0, 1), 2), "the first document does not start at row 0, position 0"),
        (put("docs", (1, 0), 400), "is not a place in its rows"),
        (put("docs", (1, 1), -1), "is not a place in its rows"),
        (put("docs", 1, 0), "document starts do not ascend at entry 1"),
        (lambda name, array: array[:-1] if "tokens" in name else array, "the manifest says uint16[4, 8]"),
        (lambda name, array: array[:, :-1] if "tokens" in name else array, "the manifest says uint16[4, 8]"),
        (
            lambda name, array: array.astype("<i8") if "tokens" in name else array,
            "int64[4, 8], the manifest says uint16",
        ),
        (lambda name, array: array.astype(str), "not an npy file|the manifest says"),
    ],
)
def test_wrong_rows_are_named_though_the_hash_is_right(copy, change, text):
    rewritten(copy, change)
    found = faults(copy)["train/train-000000.tar"]
    assert any(part in found for part in text.split("|")), found
    assert "sha256" not in found


def test_rows_that_are_not_wrapped(tmp_path, tokenizer):
    folder = made(tmp_path, random_texts(), tokenizer)
    rewritten(folder, put("tokens", (slice(None), [0, -1]), 5))
    found = faults(folder)["train/train-000000.tar"]
    assert "row 0 has no BOS (id 0) at its beginning (and 3 more)" in found
    assert "row 0 has no EOS (id 1) at its end (and 3 more)" in found


def test_documents_that_no_end_precedes(copy):
    content = json.loads((copy / "manifest.json").read_text())
    wrap = content["recipe"]["packing"] == "wrap"

    def change(name: str, array: np.ndarray) -> np.ndarray:
        if name.endswith("000000.docs.npy"):
            row, position = array[1]
            array[1] = [row, position + 1] if wrap or position + 1 < LENGTH else [row + 1, 0]
        return array

    rewritten(copy, change)
    found = faults(copy)["train/train-000000.tar"]
    assert "does not follow EOS" in found or "is not a place in its rows" in found


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (("rows",), 3, "splits.train.rows=3: its shards have"),
        (("tokens",), 3, "splits.train.tokens=3: its shards have"),
        (("documents",), 3, "splits.train.documents=3:"),
        (("dropped_tokens",), 99, "would fill a row"),
        (("unigram_entropy",), 1.0, "splits.train.unigram_entropy=1.000000: the rows give"),
        (("shards", 0, "name"), "train-000001.tar", "not train-000000.tar"),
        (("shards", 0, "name"), "../train-000000.tar", "must be a path inside the folder"),
        (("shards", 0, "rows"), 3, "splits.train.shards.0.rows=3"),
    ],
)
def test_a_manifest_that_does_not_fit_its_rows(copy, path, value, text):
    content = json.loads((copy / "manifest.json").read_text())
    part = content["splits"]["train"]
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (copy / "manifest.json").write_text(json.dumps(content))
    assert text in faults(copy)["manifest.json"]


@pytest.mark.parametrize(("key", "value"), [("validation_fraction", 2.0), ("split_seed", -1)])
def test_a_recipe_that_prep_would_refuse(copy, key, value):
    content = json.loads((copy / "manifest.json").read_text())
    content["recipe"][key] = value
    (copy / "manifest.json").write_text(json.dumps(content))
    assert f"recipe.Recipe.{key}: value {value}: " in faults(copy)["manifest.json"]


def test_offsets_are_compared_with_the_tar(copy):
    content = json.loads((copy / "manifest.json").read_text())
    content["splits"]["train"]["shards"][0]["members"][1][0] += 64
    (copy / "manifest.json").write_text(json.dumps(content))
    assert "its array is at byte" in faults(copy)["train/train-000000.tar"]


def test_rejects_are_counted(tmp_path, tokenizer):
    texts = random_texts()
    folder = made(tmp_path, texts, tokenizer)
    shutil.rmtree(folder)
    with (tmp_path / "text.jsonl").open("a") as stream:
        stream.write("\nnot json\n{}\n")
    prep(PrepConfig(**_asked(tmp_path, tokenizer)))
    assert faults(folder) == {}
    (folder / "rejects.jsonl").write_text("{}\n")
    assert faults(folder) == {"rejects.jsonl": "1 lines, the manifest says 2"}
    (folder / "rejects.jsonl").unlink()
    assert set(faults(folder)) == {"rejects.jsonl"}


def _asked(folder: Path, tokenizer: Path) -> dict:
    return {
        "inputs": (str(folder / "text.jsonl"),),
        "out": str(folder / "data"),
        "length": LENGTH,
        "tokenizer": str(tokenizer),
        "validation_fraction": 0.4,
        "workers": 1,
    }


def test_mistakes_and_a_damaged_manifest(copy, tmp_path, capsys):
    with pytest.raises(DataError, match="no such data set"):
        check(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not a data set"):
        check(tmp_path / "empty")
    (copy / "manifest.json").write_text("{")
    for args in ([], ["--json"]):
        assert main([str(copy), *args]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{copy / 'manifest.json'}: is no JSON")


ROWS = arrays(np.uint16, st.tuples(st.integers(0, 40), st.integers(1, 9)), elements=st.integers(0, 1))


@given(rows=ROWS, weak=st.sampled_from([1, 3, 2**64 - 1]))
def test_duplicates_are_rows_with_equal_tokens_and_no_others(rows, weak):
    groups = defaultdict(list)
    for number, row in enumerate(rows.tolist()):
        groups[tuple(row)].append(number)
    wanted = [(same[0], number) for same in groups.values() if len(same) > 1 for number in same]
    found = find_duplicates(row_hashes(rows) % np.uint64(weak), lambda numbers: rows[numbers])
    assert list(zip(found.groups.tolist(), found.rows.tolist())) == sorted(wanted)


def test_hashes_of_many_like_rows_differ():
    for dtype in ("<u2", "<u4"):
        rows = np.zeros((100_000, 9), dtype)
        rows[:, 3], rows[:, 7] = np.arange(100_000) % 317, np.arange(100_000) // 317  # the upper ends of words
        assert len(np.unique(row_hashes(rows))) == len(rows)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(kinds=st.lists(st.integers(0, 8), min_size=12, max_size=30))
def test_planted_rows_are_found_within_and_across_splits(tokenizer, tmp_path_factory, capsys, kinds):
    # Documents of LENGTH - 3 words and their EOS: each fills one row.
    texts = [[kind, *range(LENGTH - 4)] for kind in kinds]
    folder = made(tmp_path_factory.mktemp("planted"), texts, tokenizer)
    rows = {name: [] for name in SPLITS}
    for number, kind in enumerate(kinds):
        rows["validation" if in_validation(str(number), 0, 0.4) else "train"].append(kind)
    assert main([str(folder), "--json"]) == 0
    capsys_out = json.loads(capsys.readouterr().out)
    found = capsys_out["duplicates"]
    train, validation = (Counter(rows[name]) for name in SPLITS)
    both = train.keys() & validation.keys()
    repeated = {kind: n for kind, n in (train + validation).items() if n > 1}
    assert (found["groups"], found["rows"]) == (len(repeated), sum(repeated.values()))
    assert found["train_copies"] == len(rows["train"]) - len(train)
    assert found["validation_copies"] == len(rows["validation"]) - len(validation)
    assert found["groups_in_both"] == len(both)
    assert found["train_in_validation"] == sum(train[kind] for kind in both)
    assert found["validation_in_train"] == sum(validation[kind] for kind in both)
    assert bool(found["pairs"]) == bool(repeated)
    for (split, row), (other, again) in found["pairs"]:
        assert rows[split][row] == rows[other][again]
        assert (split, row) != (other, again)


def test_workers_find_what_one_process_finds(copy, monkeypatch):
    flip(copy / "train" / "train-000001.tar", 5000)
    one = check(copy, workers=1)
    monkeypatch.setattr("data_prep.build.pool.LITTLE", 0)
    two = check(copy, workers=2)
    assert two.faults == one.faults
    assert [c.lengths for c in two.splits.values()] == [c.lengths for c in one.splits.values()]


def test_samples_show_documents_and_follow_the_seed(tmp_path, tokenizer):
    texts = [[i, i, i] for i in range(30)]
    folder = made(tmp_path, texts, tokenizer)
    samples = check(folder, samples=100).samples
    text = {name: " ".join(" ".join(s.documents) for s in samples if s.split == name).split() for name in SPLITS}
    for name, words in text.items():
        wanted = [f"w{i}" for i in range(30) if in_validation(str(i), 0, 0.4) == (name == "validation") for _ in "123"]
        assert words == wanted[: len(words)]
    assert not samples[0].goes_on
    assert any(sample.goes_on for sample in samples)
    assert sample_text(samples[0]).startswith("‖ w")
    assert all(" ‖ " in sample_text(s) for s in samples if len(s.documents) > 1)
    chosen = [[s.row for s in check(folder, samples=2, seed=seed).samples] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_picture_is_written_outside_the_data_set_only(data_set, tmp_path, capsys):
    assert main([str(data_set), "--plot", str(tmp_path / "check.png"), "--samples", "0"]) == 0
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["check.png"]
    out = capsys.readouterr().out
    assert "unigram entropy" in out
    assert "█" in out
    with pytest.raises(ValueError, match="lies in the data set"):
        main([str(data_set), "--plot", str(data_set / "check.png")])


def test_bins_and_quantiles():
    assert length_bins({}) == []
    assert length_bins({0: 1, 1: 2, 5: 3, 7: 1}) == [(0, 0, 1), (1, 1, 2), (2, 3, 0), (4, 7, 4)]
    assert bar_lines([(1, 1, 2), (2, 3, 0), (4, 7, 1000)])[:2] == ["  1      2  █", "2-3      0"]
    assert [quantile({1: 5, 2: 4, 9: 1}, share) for share in (0.5, 0.9, 0.95)] == [1, 2, 9]
