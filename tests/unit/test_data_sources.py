"""Reading JSONL: what is read, and what each kind of damage says."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.sources import expand, read_documents

GOOD = b'{"id": "a", "text": "first"}\n\n  \n{"text": "second"}\n{"id": 7, "text": "third"}'


def write(path, data: bytes):
    path.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)
    return path


def failure(paths, **fields) -> str:
    with pytest.raises(DataError) as caught:
        list(read_documents(paths, **fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_reads_documents_with_ids_and_offsets(tmp_path, name):
    path = write(tmp_path / name, GOOD)
    documents = list(read_documents([path]))
    assert [d.id for d in documents] == ["a", f"{name}:4", "7"]
    assert [d.text for d in documents] == ["first", "second", "third"]
    assert {d.source for d in documents} == {name}
    for document in documents:
        assert json.loads(GOOD[document.offset :].splitlines()[0])["text"] == document.text


@given(st.lists(st.text(st.characters(codec="utf-8")).filter(str.strip)))
def test_any_text_comes_back(tmp_path_factory, texts):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8", newline="")
    assert [d.text for d in read_documents([path])] == texts


def test_a_folder_means_its_jsonl_files_sorted(tmp_path):
    for name in ("b.jsonl.gz", "a.jsonl", "notes.txt", "._a.jsonl"):
        write(tmp_path / name, b"")
    single = write(tmp_path / "z.jsonl", b"")
    assert [p.name for p in expand([tmp_path])] == ["a.jsonl", "b.jsonl.gz", "z.jsonl"]
    assert expand([single, tmp_path / "a.jsonl"]) == [single, tmp_path / "a.jsonl"]
    assert "given twice" in failure([tmp_path, single])


def test_paths_that_cannot_be_read(tmp_path):
    assert "no such file" in failure([tmp_path / "none.jsonl"])
    assert "not a file type" in failure([write(tmp_path / "x.txt", GOOD)])
    (tmp_path / "empty").mkdir()
    assert "no *.jsonl" in failure([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "caf\xe9"}', "x.jsonl:2: not UTF-8 at byte 31 of the text (0xe9)"),
        (b'{"text": "cut', "x.jsonl:2: not JSON (Unterminated string"),
        (b'["text"]', "x.jsonl:2: a JSON list, not an object"),
        (b"[" * 200_000, "x.jsonl:2: not JSON"),
        (b'{"text": ""}', "x.jsonl:2: field 'text' is empty"),
        (b'{"text": " \\n"}', "x.jsonl:2: field 'text' is empty"),
        (
            b'{"text": 3, "body": "words"}',
            "x.jsonl:2: field 'text' holds a JSON int, not a string; use --text-field body",
        ),
        (
            b'{"id": "n", "Text": "words"}',
            "x.jsonl:2: no field 'text' among 'id', 'Text'; use --text-field Text",
        ),
        (b'{"id": "n"}', "x.jsonl:2: no field 'text' among 'id'; give every document a text"),
        (b"{}", "x.jsonl:2: no field 'text' among none at all"),
        (b'{"text": "a\\ud800b"}', "lone surrogate \\ud800 at character 1"),
        (b'{"id": ["n"], "text": "words"}', "x.jsonl:2: field 'id' holds a JSON list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    assert says in failure([write(tmp_path / "x.jsonl", b'{"text": "fine"}\r\n' + line + b"\n")])


def test_other_fields_can_hold_text_and_id(tmp_path):
    path = write(tmp_path / "x.jsonl", b'{"body": "words", "name": "n"}')
    (document,) = read_documents([path], text_field="body", id_field="name")
    assert (document.id, document.text) == ("n", "words")


def test_damaged_gzip(tmp_path):
    lines = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(5000))
    whole = gzip.compress(lines, mtime=0)
    path = tmp_path / "x.jsonl.gz"
    for size in (0, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:size])
        assert "ends early" in failure([path])
    path.write_bytes(GOOD)
    assert "corrupt gzip" in failure([path])
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :])
    failure([path])
