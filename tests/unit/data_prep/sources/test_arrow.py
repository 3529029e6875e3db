"""Arrow files of both formats, and folders as `datasets` writes them."""

import json
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.sources import Fields, find, read_part, split

pa = pytest.importorskip("pyarrow")
TEXTS = [f"text {number} é" for number in range(50)]


def stream(path: Path, columns, rows: int = 7) -> Path:
    """A file as ``datasets`` writes it: the stream format, in batches."""
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, rows)
    return path


def file(path: Path, columns, rows: int = 7, **options) -> Path:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, table.schema, **options) as writer:
        writer.write_table(table, rows)
    return path


def read(*inputs, **fields):
    documents, rejects = [], {}
    for source in find([str(given) for given in inputs]).sources:
        for part in split(source):
            documents += read_part(
                part, Path(source.path), Fields(**fields), rejects.__setitem__, lambda why: None, lambda count: None
            )
    return documents, rejects


def failure(*inputs, **fields) -> str:
    with pytest.raises(DataError) as caught:
        read(*inputs, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_both_formats(tmp_path):
    ids = list(range(50))
    compressed = pa.ipc.IpcWriteOptions(compression="zstd")
    for path in (
        stream(tmp_path / "x.arrow", {"text": TEXTS, "id": ids}),
        file(tmp_path / "y.arrow", {"id": ids, "other": [[1]] * 50, "text": TEXTS}),
        file(tmp_path / "z.feather", {"text": pa.array(TEXTS).dictionary_encode(), "id": ids}, rows=50),
        file(tmp_path / "without_a_name", {"text": pa.array(TEXTS, pa.large_string()), "id": ids}, options=compressed),
    ):
        documents, rejects = read(path)
        assert [(d.id, d.text, d.offset) for d in documents] == [(str(n), TEXTS[n], n) for n in ids], path
        assert not rejects


def test_fields_of_structs_and_ids_of_any_scalar_type(tmp_path):
    struct = pa.array([{"text": "a", "n": 1}, {"text": "b", "n": 2}, None])
    path = stream(tmp_path / "x.arrow", {"content": struct, "id": [0.5, None, 2.0]})
    documents, rejects = read(path, text_field="content.text")
    assert [(d.id, d.text) for d in documents] == [("0.5", "a"), ("x.arrow:1", "b")]
    assert "null in column 'content.text'" in rejects[2]
    assert "no column 'text' among 'content', 'id'; use --text-field content.text" in failure(path)
    flags = stream(tmp_path / "y.arrow", {"text": ["a", "b"], "id": [True, False]})
    assert [d.id for d in read(flags)[0]] == ["true", "false"]
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(
        pa.table({"content": struct, "meta": pa.array([{"id": 7}, {"id": 8}, {"id": 9}])}), tmp_path / "x.pq"
    )
    documents, rejects = read(tmp_path / "x.pq", text_field="content.text", id_field="meta.id")
    assert [(d.id, d.text) for d in documents] == [("7", "a"), ("8", "b")]
    assert list(rejects) == [2]


@pytest.mark.parametrize(
    ("kind", "values", "ids"),
    [
        (pa.timestamp("ms"), [10**15, 0], ["1000000000000000", "0"]),
        (pa.timestamp("ns"), [1001, None], ["1001", "x.arrow:1"]),
        (pa.timestamp("ms", "Nowhere/Never"), [1, 2], ["1", "2"]),
        (pa.date32(), [2**30, 2], ["1073741824", "2"]),
        (pa.duration("ms"), [2**62, 2], [str(2**62), "2"]),
        (pa.time64("ns"), [1001, 2], ["1001", "2"]),
        (pa.date32(), [0, 1], ["1970-01-01", "1970-01-02"]),
    ],
    ids=str,
)
def test_times_that_python_has_no_place_for_are_ids_too(tmp_path, kind, values, ids):
    path = stream(tmp_path / "x.arrow", {"text": ["a", "b"], "id": pa.array(values, kind)})
    documents, rejects = read(path)
    assert [document.id for document in documents] == ids
    assert not rejects


def test_names_of_fields_may_have_dots(tmp_path):
    struct = pa.array([{"x.y": "a", "x": {"z": "c"}}, {"x.y": "b", "x": {"z": "d"}}])
    path = stream(tmp_path / "x.arrow", {"t": struct})
    assert [document.text for document in read(path, text_field="t.x.y")[0]] == ["a", "b"]
    assert [document.text for document in read(path, text_field="t.x.z")[0]] == ["c", "d"]


def test_damage_is_one_line_and_never_a_crash(tmp_path):
    for make, name in ((stream, "x.arrow"), (file, "y.arrow")):
        whole = make(tmp_path / name, {"text": TEXTS, "id": TEXTS}).read_bytes()
        path = tmp_path / name
        for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            assert "cut or corrupt Arrow" in failure(path), (name, size)
        rng = random.Random(0)
        for _ in range(150):
            broken = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                broken[rng.randrange(len(whole))] = rng.choice((0, 0x7F, 0xFF, rng.randrange(256)))
            path.write_bytes(broken)
            with suppress(DataError):
                read(path)
    (tmp_path / "x.arrow").write_bytes(b"FEA1" + bytes(100))
    assert "Feather of version 1" in failure(tmp_path / "x.arrow")


def save_to_disk(folder: Path, texts, shards: int = 2) -> Path:
    """The layout of ``datasets.Dataset.save_to_disk``."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{shards:05d}.arrow" for n in range(shards)]
    for number, name in enumerate(names):
        stream(folder / name, {"text": texts[number::shards]})
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0f",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}, indent=2))
    return folder


def test_folders_of_datasets(tmp_path):
    folder = save_to_disk(tmp_path / "hf", TEXTS)
    (folder / "cache-0f.arrow").write_bytes(b"")
    assert sorted(d.text for d in read(folder)[0]) == sorted(TEXTS)
    (over,) = find([str(folder)]).passed_over
    assert (over.reason, over.count) == ("not part of the data set in its folder", 1)
    splits = tmp_path / "dict"
    for name in ("train", "test"):
        save_to_disk(splits / name, [f"{name} {text}" for text in TEXTS], shards=1)
    (splits / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    listing = find([str(tmp_path)])
    assert [Path(source.path).parent.name for source in listing.sources] == ["train", "test", "hf", "hf"]
    assert any("a DatasetDict; all its splits (train, test) are read; to read one" in line for line in listing.lines())
    assert len(read(splits)[0]) == 100
    assert len(read(splits / "test")[0]) == 50


def test_folders_of_datasets_that_are_not_right(tmp_path):
    folder = save_to_disk(tmp_path / "hf", TEXTS)
    state = json.loads((folder / "state.json").read_text())
    for change, message in (
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "an indices file"),
        ({"_data_files": [{"filename": "../outside.arrow"}]}, "must be a path inside the folder"),
        ({"_data_files": [{"filename": "missing.arrow"}]}, "missing.arrow: cannot be read (No such file"),
        ({"_data_files": 3}, "_data_files: value 3"),
    ):
        (folder / "state.json").write_text(json.dumps(state | change))
        assert message in failure(folder)
    (folder / "state.json").write_text("{")
    assert "is no JSON" in failure(folder)
    os.remove(folder / "state.json")  # the cache of datasets has none
    stream(folder / "cache-1.arrow", {"text": TEXTS})
    assert len(read(folder)[0]) == 50
