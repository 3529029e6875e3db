"""JSON that is not one object a line: arrays and objects that span lines, streamed."""

import io
import json
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.sources import Fields, Part, expand, json_values, read_part, records, split
from data_prep.sources.json_values import JsonValues, layout_of

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.sampled_from(['\\"', "}{][,", "\\"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=4), VALUES, min_size=1, max_size=4), max_size=6)


def values(data: bytes, array: bool, limit: int = 1 << 20) -> list[tuple[int, bytes | None]]:
    return list(JsonValues(io.BytesIO(data), "x.json", array, limit))


@settings(max_examples=25)
@given(objects=OBJECTS, indent=st.sampled_from([None, 1]), chunk=st.integers(1, 9), ascii_only=st.booleans())
@example(objects=[{"a": "\\"}, {"b": '\\"'}], indent=None, chunk=1, ascii_only=True)
def test_elements_are_those_that_json_finds(objects, indent, chunk, ascii_only):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "CHUNK", chunk)
        data = json.dumps(objects, indent=indent, ensure_ascii=ascii_only).encode()
        if objects:
            assert layout_of(data) == "array"
        found = values(b"\xef\xbb\xbf " + data + b"\n", array=True)
        assert [json.loads(element) for _, element in found] == objects
        assert all((b"\xef\xbb\xbf " + data)[offset:].startswith(element) for offset, element in found)
        joined = b"\n".join(json.dumps(found, indent=1).encode() for found in objects)
        assert [json.loads(element) for _, element in values(joined, array=False)] == objects
        if objects:
            assert layout_of(joined) == "objects"


@settings(max_examples=20)
@given(objects=OBJECTS.filter(bool), cut=st.floats(0, 0.999))
def test_a_cut_anywhere_is_an_error(objects, cut):
    data = json.dumps(objects).encode()
    part = data[: max(1, int(cut * len(data)))]
    with pytest.raises(DataError, match="the JSON is cut"):
        values(part, array=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"a": 1},]', "an element is missing"),
        (b'[{"a": 1},, {}]', "an element is missing"),
        (b'[{"a": 1} {"b": 2}]', "a comma is missing"),
        (b"[1 {}]", "a comma is missing"),
        (b'[{"a": [1}]', "the JSON is cut"),
        (b'[{"a": 1]}]', "damaged JSON at byte 9"),
        (b'[{"a": 1}] [2]', "there is more after the end of the array"),
    ],
)
def test_damage_to_the_structure(data, message):
    with pytest.raises(DataError, match=message) as caught:
        values(data, array=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("head", "layout"),
    [
        (b"", "lines"),
        (b'{"text": "a"}\n{"text": "b"}\n', "lines"),
        (b'{"text": "a"}', "lines"),
        (b'{"text": "cut\n{"text": "b"}', "lines"),
        (b'{"meta": {"n": 1, "text": [\n{"text": "b"}\n', "lines"),
        (b'{\n  "text": "a"\n}', "objects"),
        (b'\xef\xbb\xbf{"meta": {\n"n": 1}, "text": "a"}', "objects"),
        (b'\n [ {"text": "a"}, {"te', "array"),
        (b"[]\n", "array"),
        (b"[\n  {\n", "array"),
        (b'["a", "b"]', "array"),
        (b'["a"]\n["b"]\n', "lines"),
    ],
)
def test_the_beginning_tells_the_layout(head, layout):
    assert layout_of(head) == layout


def read(path, parts=None, **fields):
    documents, rejects = [], {}
    for source in expand([str(path)]):
        for part in parts or split(source, 100):
            documents += read_part(part, path, Fields(**fields), rejects.__setitem__, lambda why: None)
    return documents, rejects


def test_each_object_of_an_array_is_a_document(tmp_path):
    objects = [{"id": 1.5, "text": "a"}, None, {"text": None}, {"id": False, "text": "b" * 300}, "text", {"text": "c"}]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(objects))
    assert len(split(expand([str(path)])[0], 100)) == 1
    documents, rejects = read(path)
    assert [(d.id, d.text) for d in documents] == [("1.5", "a"), ("false", "b" * 300), (documents[2].id, "c")]
    assert [reason.partition(",")[0] for reason in rejects.values()] == [
        "a JSON null",
        "field 'text' holds a JSON null",
        "a JSON string",
    ]
    whole = path.read_bytes()
    assert all(json.loads(whole[d.offset : whole.index(b"}", d.offset) + 1])["text"] == d.text for d in documents)
    assert documents[2].id == f"x.json:{documents[2].offset}"
    with pytest.raises(DataError, match="changed since it was listed"):
        read(path, [Part(expand([str(path)])[0], 0, 10)])


def test_fields_of_nested_objects(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [{"content": {"text": "a", "n": 1}, "meta": {"id": 7}}, {"content.text": "b", "content": 3}, {"content": 1}]
    path.write_text("\n".join(map(json.dumps, lines)))
    documents, rejects = read(path, text_field="content.text", id_field="meta.id")
    assert [(d.id, d.text) for d in documents][:1] == [("7", "a")]
    assert [d.text for d in documents] == ["a", "b"]
    assert "no field 'content.text' among 'content'" in next(iter(rejects.values()))
    assert "use --text-field content.text" in read(path)[1][0]


def test_an_array_is_never_in_memory_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 1 << 20)
    path = tmp_path / "x.json"
    with path.open("w") as out:
        out.write('[{"text": "' + "x" * (40 << 20) + '"}')  # an element beyond the limit is dropped as it is read
        for _ in range(40):
            out.write(', {"text": "' + "word " * 100_000 + '"}')
        out.write("]")
    (source,) = expand([str(path)])
    rejects: list[int] = []
    tracemalloc.start()
    parts = split(source)
    found = sum(1 for _ in read_part(parts[0], path, Fields(), lambda *at: rejects.append(at[0]), print))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert (found, rejects) == (40, [1])
