"""Finding, cutting and reading text files: documents read, and the error of each kind of damage."""

import bz2
import datetime
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.format import remote
from data_prep.format.remote import fetch
from data_prep.sources import Fields, Part, expand, find, read_part, records, split
from data_prep.sources.tar import TarMembers

zstandard = pytest.importorskip("zstandard")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PACKERS = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
UNPACKERS = {"": lambda data: data, ".gz": gzip.decompress, ".zst": zstandard.decompress}
UNPACKERS |= {".bz2": bz2.decompress, ".xz": lzma.decompress}
GOOD = b'{"id": "a", "text": "first"}\n\n  \n{"text": "second"}\r\n{"id": 7, "text": "third"}'
TEXTS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=8)


class Read:
    """Result of reading: documents, rejects (offset to reason) and skips."""

    def __init__(self, *paths, parts=None, fields=None, **options):
        self.documents, self.rejects, self.skips, self.removed = [], {}, [], []
        for source in expand([str(path) for path in paths]):
            for part in parts or split(source):
                self.documents += read_part(
                    part,
                    Path(source.path),
                    fields or Fields(**options),
                    self._reject,
                    self.skips.append,
                    self.removed.append,
                )

    def _reject(self, offset, reason):
        assert "\n" not in reason
        assert offset not in self.rejects
        self.rejects[offset] = reason

    @property
    def texts(self):
        return [document.text for document in self.documents]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(PACKERS[path.suffix if path.suffix in PACKERS else ""](data))
    return path


def unpacked(path: Path) -> bytes:
    return UNPACKERS[path.suffix if path.suffix in UNPACKERS else ""](path.read_bytes())


def jsonl(texts, ascii_only=False) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts).encode()


def tar_of(members, form=tarfile.PAX_FORMAT) -> bytes:
    """A tar of (name, bytes) pairs or TarInfos without payload."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def table(path: Path, columns, group: int | None = None, **options) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group, **options)
    return path


def failure(*paths, **options) -> str:
    with pytest.raises(DataError) as caught:
        Read(*paths, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is read.


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.jsonl.bz2", "x.jsonl.xz"])
def test_jsonl_with_ids_and_offsets(tmp_path, name):
    read = Read(write(tmp_path / name, GOOD))
    assert read.texts == ["first", "second", "third"]
    assert [d.id for d in read.documents] == ["a", f"{name}:33", "7"]
    assert {d.source for d in read.documents} == {name}
    for document in read.documents:
        assert json.loads(GOOD[document.offset :].splitlines()[0])["text"] == document.text
    assert not read.rejects
    assert not read.skips


@settings(max_examples=15, deadline=None)
@given(texts=TEXTS, ascii_only=st.booleans())
def test_every_format_reads_the_same_documents(tmp_path_factory, texts, ascii_only):
    folder = tmp_path_factory.mktemp("formats")
    tar = tar_of([(f"{i}.txt", text.encode()) for i, text in enumerate(texts)])
    tar_json = tar_of([(f"{i}.json", json.dumps({"text": t}).encode()) for i, t in enumerate(texts)])
    paths = [table(folder / "x.parquet", {"text": pa.array(texts, pa.string())}, group=3)]
    for packed in PACKERS:
        paths.append(write(folder / f"x.jsonl{packed}", jsonl(texts, ascii_only)))
        paths.append(write(folder / f"x.tar{packed}", tar))
        paths.append(write(folder / f"y.tar{packed}", tar_json))
    kept = [text for text in texts if text.strip()]
    for path in paths:
        read = Read(path)
        # A BOM that begins a file is dropped, and each text member of a tar is a file.
        begins = path.name.startswith("x.tar")
        expected = [t.removeprefix("\ufeff") for t in texts] if begins else texts
        assert read.texts == [t for t in expected if t.strip()], path
        assert len(read.skips) == len(texts) - len(read.texts)
        assert not read.rejects
    lines = [text.replace("\n", " ").rstrip("\r") for text in kept]
    for packed in PACKERS:
        path = write(folder / f"x.txt{packed}", b"\n\xc2\xa0\r\n" + "\r\n".join(lines).encode())
        read = Read(path)
        assert read.texts == [line for line in lines if line.strip()]
        assert not read.skips
        assert all(unpacked(path)[d.offset :].startswith(d.text.encode()) for d in read.documents)


@pytest.mark.parametrize("packed", PACKERS)
def test_a_text_file_can_be_one_document(tmp_path, packed):
    path = write(tmp_path / f"x.txt{packed}", b"\xef\xbb\xbfone\n\ntwo\n")
    read = Read(path, text_documents="file")
    assert read.documents == [(f"x.txt{packed}:0", "one\n\ntwo\n", path.name, 0)]
    assert Read(write(path, b" \n"), text_documents="file").skips == ["short"]


def test_a_text_file_in_parts_is_still_one_document(tmp_path):
    path = write(tmp_path / "x.txt", b"one\ntwo\nthree\n")
    parts = split(expand([str(path)])[0], 3)
    assert len(parts) > 2
    assert Read(path, parts=parts, text_documents="file").texts == ["one\ntwo\nthree\n"]


def test_fields_of_other_names_and_lengths(tmp_path):
    path = write(
        tmp_path / "x.jsonl", b'{"body": " abc ", "name": "n"}\n{"body": "ab"}\n{"body": "abcd"}\n{"body": " "}'
    )
    read = Read(path, text_field="body", id_field="name", min_chars=3, max_chars=3)
    assert read.documents == [("n", " abc ", "x.jsonl", 0)]
    assert read.skips == ["short", "long", "short"]
    with pytest.raises(ValueError, match="below min_chars=5"):
        Fields(min_chars=5, max_chars=4)


def test_a_bom_is_dropped_once(tmp_path):
    path = write(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')
    read = Read(path)
    assert read.texts == ["a"]
    assert list(read.rejects) == [17]
    path = write(tmp_path / "y.jsonl", b'\xef\xbb\xbf{"text": "\xff"}')
    assert f"byte {path.read_bytes().index(0xFF)} " in Read(path).rejects[0]


def test_sources_and_parts_can_be_sent_to_another_process(tmp_path):
    (source,) = expand([str(write(tmp_path / "x.jsonl", GOOD))])
    (part,) = pickle.loads(pickle.dumps(split(source)))
    assert part == Part(source, 0, len(GOOD))
    assert (source.kind, source.compression, source.bytes, source.remote) == ("jsonl", None, len(GOOD), False)
    os.utime(source.path, ns=(1, 1))
    assert expand([source.path])[0].stamp != source.stamp


def test_several_frames_and_members_are_read_to_the_end(tmp_path):
    first, second = jsonl(["one"]), jsonl(["two"])
    for packed in (".gz", ".bz2", ".xz", ".zst"):
        path = tmp_path / f"x.jsonl{packed}"
        path.write_bytes(PACKERS[packed](first) + PACKERS[packed](b"") + PACKERS[packed](second))
        assert Read(path).texts == ["one", "two"]
    padded = tmp_path / "y.jsonl.xz"
    padded.write_bytes(lzma.compress(first) + bytes(8) + lzma.compress(second) + bytes(4))
    assert Read(padded).texts == ["one", "two"]
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"any"
    path.write_bytes(skippable + PACKERS[".zst"](first) + skippable + PACKERS[".zst"](second))
    assert Read(path).texts == ["one", "two"]


def test_zst_of_the_long_mode(tmp_path):
    options = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=options).compressobj()  # the frame does not tell its size
    (tmp_path / "x.jsonl.zst").write_bytes(packer.compress(jsonl(["far"] * 100)) + packer.flush())
    assert len(Read(tmp_path / "x.jsonl.zst").texts) == 100


# Parts.


LINES = st.lists(
    st.one_of(
        st.sampled_from(["", " ", "\r", "é" * 20, "🙂🙃", "x" * 300]),
        st.text(st.characters(codec="utf-8", exclude_characters="\n\0"), max_size=12),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(lines=LINES, line_end=st.sampled_from(["\n", "\r\n"]), last=st.booleans(), target=st.integers(1, 200))
def test_parts_in_order_are_the_whole(tmp_path_factory, lines, line_end, last, target):
    folder = tmp_path_factory.mktemp("parts")
    body = line_end.join(lines) + (line_end if last else "")
    objects = line_end.join(json.dumps({"text": line}, ensure_ascii=False) if line.strip() else line for line in lines)
    for path in (
        write(folder / "x.txt", body.encode()),
        write(folder / "x.jsonl", objects.encode() + (line_end.encode() if last else b"")),
    ):
        (source,) = expand([str(path)])
        parts = split(source, target)
        assert [p.begin for p in parts] == [0, *(p.end for p in parts[:-1])]
        assert sum(part.weight for part in parts) == source.bytes == parts[-1].end
        assert Read(path, parts=parts).documents == Read(path, parts=[Part(source, 0, source.bytes)]).documents


@settings(max_examples=25, deadline=None)
@given(lines=st.lists(st.sampled_from([3, 9, 10, 11, 40]), max_size=8), target=st.integers(1, 60))
def test_parts_reject_long_lines_once(tmp_path_factory, lines, target):
    path = write(tmp_path_factory.mktemp("long") / "x.txt", b"".join(b"y" * n + b"\n" for n in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "MAX_LINE", 10)
        read = Read(path, parts=split(expand([str(path)])[0], target))
    assert [len(text) for text in read.texts] == [n for n in lines if n < 10]
    assert len(read.rejects) == len([n for n in lines if n >= 10])
    for offset, reason in read.rejects.items():
        assert "line of over 10 bytes" in reason
        assert path.read_bytes()[offset - 1 : offset] in (b"\n", b"")


def test_row_groups_are_the_parts_of_parquet(tmp_path):
    texts = [f"text {i}" * (i % 7 + 1) for i in range(100)]
    path = table(tmp_path / "x.parquet", {"text": texts, "id": list(range(100))}, group=9)
    (source,) = expand([str(path)])
    for target in (1, source.bytes // 3, source.bytes * 2):
        parts = split(source, target)
        assert sum(part.weight for part in parts) == source.bytes
        read = Read(path, parts=parts)
        assert read.texts == texts
        assert [(d.id, d.offset) for d in read.documents] == [(str(i), i) for i in range(100)]
    assert len(split(source, 1)) == 12
    assert len(parts) == 1
    empty = table(tmp_path / "empty.parquet", {"text": pa.array([], pa.string())})
    assert Read(empty).documents == []


def test_what_cannot_be_split_is_one_part(tmp_path):
    for name in ("x.jsonl.gz", "x.txt.zst", "x.tar", "x.tar.gz"):
        (source,) = expand([str(write(tmp_path / name, b"some bytes"))])
        assert split(source, 1) == [Part(source, 0, source.bytes)]


# Bad records.


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}', "not UTF-8 at byte 30 (0xe9)"),
        (b'{"text": "cut', "not JSON (Unterminated string"),
        (b'["text"]', "a JSON array, not an object"),
        (b"null", "a JSON null, not an object"),
        (b"[" * 200_000, "not JSON that can be read"),
        (b'{"n": ' + b"7" * 5000 + b"}", "not JSON that can be read"),
        (b'{"text": null}', "field 'text' holds a JSON null, not a string; give every document a text"),
        (b'{"text": 3, "body": "words"}', "field 'text' holds a JSON number, not a string; use --text-field body"),
        (b'{"id": "n", "Text": "words"}', "no field 'text' among 'id', 'Text'; use --text-field Text"),
        (b'{"id": "n"}', "no field 'text' among 'id'; give every document a text"),
        (b'{"a\\nb": "n"}', "no field 'text' among 'a\\nb'; use --text-field 'a\\nb'"),
        (b"{}", "no field 'text' among none at all"),
        (b'{"text": "a\\ud800b"}', "lone surrogate \\ud800 at character 1"),
        (b'{"id": ["n"], "text": "words"}', "field 'id' holds a JSON array"),
        (b'{"id": {}, "text": "words"}', "field 'id' holds a JSON object"),
        (b'{"id": "\\udc00", "text": "words"}', "field 'id' holds the lone surrogate \\udc00"),
        (b"\xff\xfe{\x00", "not UTF-8 at byte 17 (0xff)"),
    ],
)
def test_a_bad_line_is_handed_over(tmp_path, line, message, packed):
    before = b'{"text": "fine"}\n'
    path = write(tmp_path / f"x.jsonl{packed}", before + line + b'\n{"text": "also"}')
    read = Read(path)
    assert read.texts == ["fine", "also"]
    assert list(read.rejects) == [len(before)]
    assert message in read.rejects[len(before)]
    assert unpacked(path)[len(before) :].startswith(line)


def test_text_that_is_not_utf8(tmp_path):
    path = write(tmp_path / "x.txt", b"one\nna\xefve\n\xed\xa0\x80\ntwo")
    read = Read(path)
    assert read.texts == ["one", "two"]
    assert {o: r[: r.index(";")] for o, r in read.rejects.items()} == {
        4: "not UTF-8 at byte 6 (0xef)",
        10: "not UTF-8 at byte 10 (0xed)",
    }
    assert list(Read(path, text_documents="file").rejects.values()) == [
        "not UTF-8 at byte 6 (0xef); convert the text to UTF-8"
    ]


def test_nul_characters_are_removed_and_counted(tmp_path):
    texts = ["\0first", "a\0b\0", "c", "\0"]
    for path in (
        write(tmp_path / "x.jsonl", jsonl(texts)),
        write(
            tmp_path / "raw.jsonl", "".join(f'\0{{"text": "{text}"}}\n' for text in ["first", "ab", "c", " "]).encode()
        ),
        write(tmp_path / "x.json", json.dumps([{"text": text} for text in texts]).encode()),
        write(tmp_path / "x.tar", tar_of([(f"{n}.txt", text.encode()) for n, text in enumerate(texts)])),
        write(tmp_path / "x.txt.gz", "\n".join(texts).encode()),
        table(tmp_path / "x.parquet", {"text": texts}),
    ):
        read = Read(path)
        assert (read.texts, read.skips, read.rejects) == (["first", "ab", "c"], ["short"], {}), path
        assert sum(read.removed) == 4
    (tmp_path / "gap.jsonl").write_bytes(jsonl(["one"]) + bytes(5000) + b"\n" + jsonl(["two"]))  # of a crashed writer
    read = Read(tmp_path / "gap.jsonl")
    assert (read.texts, read.removed) == (["one", "two"], [5000])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_wide_encodings_are_told_apart(tmp_path, encoding):
    for text in ("one word and\nanother\n", "日本語のテキスト\n" * 3):
        objects = [{"text": text}, {"text": "more"}]
        for name, body in {
            "x.jsonl": "".join(json.dumps(found, ensure_ascii=False) + "\n" for found in objects),
            "x.json.gz": json.dumps(objects, ensure_ascii=False),
            "x.txt": text,
        }.items():
            if name == "x.txt" and not text.isascii() and encoding not in ("utf-16", "utf-32"):
                continue  # nothing tells it from damaged UTF-8, which is no better
            path = write(tmp_path / name, body.encode(encoding))
            assert f"is UTF-{encoding[4:6]}, not UTF-8; convert it: iconv -f" in failure(path)
    member = write(tmp_path / "x.tar", tar_of([("a.txt", "words".encode(encoding)), ("b.txt", b"fine")]))
    assert Read(member).texts == ["fine"]
    assert f"is UTF-{encoding[4:6]}" in next(iter(Read(member).rejects.values()))
    whole = write(tmp_path / "x.txt", "words".encode(encoding))
    assert "is UTF-" in Read(whole, text_documents="file").rejects[0]


@settings(max_examples=60)
@given(text=st.text(st.characters(codec="utf-8")), place=st.integers(0, 40))
def test_a_stray_nul_is_no_wide_encoding(text, place):
    text = text.replace("\0", "") + "plain words after it, as documents have"
    assert records.wide_encoding((text[:place] + "\0" + text[place:]).encode()) is None


@pytest.mark.parametrize("packed", PACKERS)
def test_what_is_too_big_is_handed_over(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(records, "MAX_DOCUMENT", 100)
    monkeypatch.setattr(records, "MAX_LINE", 150)
    bodies = ["fine", "é" * 51, "x" * 500, "also"]
    read = Read(write(tmp_path / f"x.jsonl{packed}", jsonl(bodies)))
    assert read.texts == ["fine", "also"]
    assert [r.split(";")[0] for r in read.rejects.values()] == ["a document of 102 bytes", "a line of over 150 bytes"]
    read = Read(write(tmp_path / f"x.txt{packed}", "\n".join(bodies).encode()))
    assert read.texts == ["fine", "also"]
    assert list(read.rejects) == [5, 108]
    whole = Read(tmp_path / f"x.txt{packed}", text_documents="file")
    assert "use --text-documents line" in whole.rejects[0]
    assert Read(write(tmp_path / f"y.txt{packed}", b"x" * 100), text_documents="file").texts == ["x" * 100]
    read = Read(write(tmp_path / f"x.tar{packed}", tar_of([(f"{i}.txt", b.encode()) for i, b in enumerate(bodies)])))
    assert read.texts == ["fine", "also"]
    assert [r.split(";")[0] for r in read.rejects.values()] == ["a document of 102 bytes", "a member of 500 bytes"]
    read = Read(table(tmp_path / "x.parquet", {"text": bodies}))
    assert list(read.rejects) == [1, 2]


def test_a_long_line_is_never_in_memory_whole(tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(records, "MAX_LINE", 1 << 20)
    path = tmp_path / "x.jsonl.zst"
    packer = zstandard.ZstdCompressor().compressobj()
    path.write_bytes(b"".join(packer.compress(b" " * (1 << 20)) for _ in range(200)) + packer.flush())
    tracemalloc.start()
    read = Read(path)
    assert list(read.rejects) == [0]
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()


def test_bad_rows(tmp_path):
    bad = pa.array([b"fine", b"caf\xe9", None, b"also", b" "], pa.binary())
    path = table(tmp_path / "x.parquet", {"text": bad, "id": pa.array([b"a", b"b", b"c", b"\xff", None])}, group=2)
    read = Read(path)
    assert [d.id for d in read.documents] == ["a"]
    assert read.skips == ["short"]
    assert list(read.rejects) == [1, 2, 3]
    assert read.rejects[1].startswith("not UTF-8 at byte of the text 3 (0xe9)")
    assert "null in column 'text'" in read.rejects[2]
    assert "byte of the id 0 (0xff)" in read.rejects[3]


def test_types_of_columns(tmp_path):
    strings = ["one", "two", "one"]
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()):
        array = pa.array(strings).cast(kind)
        path = table(tmp_path / "x.parquet", {"text": array, "id": array})
        assert [(d.id, d.text) for d in Read(path).documents] == [(s, s) for s in strings], kind
    nulls = table(tmp_path / "x.parquet", {"text": strings, "id": pa.nulls(3)})
    assert Read(nulls).documents[2].id == "x.parquet:2"
    assert Read(nulls, id_field="text").documents[2].id == "one"
    for ids, expected in (
        ([0.5, 1e30, 2.0], ["0.5", "1e+30", "2.0"]),
        ([True, False, None], ["true", "false", "x.parquet:2"]),
        ([datetime.date(2020, 1, 2)] * 3, ["2020-01-02"] * 3),
    ):
        assert [d.id for d in Read(table(nulls, {"text": strings, "id": ids})).documents] == expected
    assert "column 'id' holds list<" in failure(table(nulls, {"text": strings, "id": [["a"]] * 3}))
    assert "column 'text' holds int64, not text; use --text-field body" in failure(
        table(nulls, {"text": [1] * 3, "body": strings})
    )


# Tars.


def test_samples_of_a_tar(tmp_path):
    link = tarfile.TarInfo("g.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
    folder = tarfile.TarInfo("d.txt")
    folder.type = tarfile.DIRTYPE
    members = [
        folder,
        ("README", b"no key"),
        ("v1.0/a.json", b'{"id": "named", "text": "not used"}'),
        ("v1.0/a.txt", b"\xef\xbb\xbftext a"),
        ("b.cls", b"3"),
        ("b.JSON", b'\xef\xbb\xbf{"text": "text b"}'),
        ("c.jpg", b"image"),
        ("c.en.txt", b"other extension"),
        ("._d.txt", b"hidden"),
        ("d.txt", b"caf\xe9"),
        ("e.json", b'{"id": "e"}'),
        ("v1.0/a.txt", b"again"),
        ("f.txt", b"one"),
        ("f.txt", b"two"),
        link,
        ("h.txt", b""),
        ("i" * 150 + "/é.txt", b"long name"),
    ]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = write(tmp_path / "x.tar.gz", tar_of(members, form))
        read = Read(path)
        assert [(d.id, d.text) for d in read.documents] == [
            ("named", "text a"),
            ("b", "text b"),
            ("i" * 150 + "/é", "long name"),
        ]
        assert read.skips == ["unnamed", "hidden", "short"]
        data = unpacked(path)
        assert data[read.documents[0].offset :].startswith(b"\xef\xbb\xbftext a")
        assert data[read.documents[1].offset :].startswith(b"\xef\xbb\xbf{")
        reasons = [(data[o : o + 3], reason) for o, reason in read.rejects.items()]
        for (head, reason), (expected, message) in zip(
            reasons,
            [
                (
                    b"ima",
                    "member 'c.en.txt' is .en.txt of the sample 'c': by WebDataset's rule the key",
                ),
                (b"caf", "(0xe9)"),
                (b'{"i', "no field 'text' among 'id'"),
                (b"aga", "a second sample with the key 'v1.0/a'"),
                (b"one", "a second .txt member of the key 'f'"),
                (b"two", "a second .txt member of the key 'f'"),
                (None, "'g.txt' is a link"),
            ],
            strict=True,
        ):
            assert message in reason
            assert expected in (None, head)
        wrong = next(reason for reason in read.rejects.values() if "0xe9" in reason)
        assert data[int(wrong.split("byte ")[1].split()[0])] == 0xE9


def test_a_tar_name_that_is_no_text(tmp_path):
    data = tar_of([("caf\udce9.txt", b"x")], tarfile.GNU_FORMAT)
    assert b"caf\xe9.txt" in data
    assert "the name of the member holds the lone surrogate" in Read(write(tmp_path / "x.tar", data)).rejects[512]


def test_sizes_in_pax_headers_count(tmp_path):
    info = tarfile.TarInfo("a.txt")
    info.size, info.pax_headers = 0, {"size": "3"}
    data = info.tobuf(tarfile.PAX_FORMAT) + b"abc".ljust(512, b"\0") + tar_of([("b.txt", b"next")])
    assert Read(write(tmp_path / "x.tar", data)).texts == ["abc", "next"]


@pytest.mark.parametrize("packed", PACKERS)
def test_a_tar_cut_anywhere_or_damaged_is_an_error(tmp_path, packed):
    members = [(f"{i}.txt", b"words " * 200) for i in range(3)]
    data = tar_of(members)
    one = 512 + 1536  # header and payload of a member
    path = tmp_path / f"x.tar{packed}"
    for size in (0, 100, 512, 700, one, one + 512, 2 * one, 3 * one, 3 * one + 512, 3 * one + 700):
        assert "cut" in failure(write(path, data[:size])), size
    assert len(Read(write(path, data[: 3 * one + 1024])).texts) == 3  # the padding may be missing
    for at in (0, one + 3, 2 * one + 150):
        broken = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        message = failure(write(path, broken))
        assert f"damaged tar at the header before byte {at // one * one + 512} (unpacked)" in message
    assert "a block of zeros" in failure(write(path, data[:one] + bytes(512) + data[one:]))
    assert "after the end of the archive" in failure(write(path, data + data))
    assert "damaged" in failure(write(path, b"not a tar at all" * 100))


def test_a_pax_header_of_many_entries_takes_time_by_its_size():
    """Cutting the rest off after each entry would take minutes for this megabyte."""
    members = TarMembers.__new__(TarMembers)
    assert members._pairs(b"6 a=b\n" * 170_000 + b"7 b=cd\n\0\0") == {"a": "b", "b": "cd"}


def test_a_folder_that_is_nested_too_deep_is_one_line(tmp_path):
    deep = tmp_path.joinpath(*["a"] * 500)
    deep.mkdir(parents=True)
    (deep / "a.txt").write_text("text\n")
    with pytest.raises(DataError, match=r"/a: more than 100 folders deep; name it as an input of its own$"):
        find([str(tmp_path)])
    assert find([str(deep)]).sources


def test_a_pipe_instead_of_a_manifest_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    (tmp_path / "a.txt").write_text("text\n")
    with pytest.raises(DataError, match=r"manifest.json: a pipe or device, not a file; write it to a file first$"):
        find([str(tmp_path)])


def test_tar_headers_that_cannot_be_read(tmp_path):
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("a.txt")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    assert "an extended header of 1099511627776 bytes" in failure(write(path, info.tobuf(tarfile.GNU_FORMAT)))
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
    assert "sparse" in failure(write(path, info.tobuf(tarfile.GNU_FORMAT)))
    for body in (b"99 path=x\n", b"x path=x\n", b"8 path=x\n", b"10 path=xy", b"0 path=x\n", b"12 size=abc\n"):
        info.type, info.size = tarfile.XHDTYPE, len(body)
        assert "pax" in failure(write(path, info.tobuf(tarfile.GNU_FORMAT) + body.ljust(512, b"\0"))), body
    info.size = 0
    assert "pax" not in failure(write(path, info.tobuf(tarfile.GNU_FORMAT)))


# Broken files.


def test_damaged_gzip(tmp_path):
    lines = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(5000))
    whole = gzip.compress(lines, mtime=0)
    path = tmp_path / "x.jsonl.gz"
    for data in (whole[:5], whole[: len(whole) // 2], whole[:-4], whole + whole[:7]):
        path.write_bytes(data)
        assert "the gz stream ends early" in failure(path)
    path.write_bytes(b"")
    assert "0 bytes, so the gz file is cut" in failure(path)
    for data in (GOOD, whole + b"garbage", whole[:-6] + bytes(6), whole + b"\x1f"):
        path.write_bytes(data)
        assert "corrupt gz after" in failure(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :])
    assert "fetch the file again" in failure(path)


@pytest.mark.parametrize("packed", [".bz2", ".xz"])
def test_damaged_bz2_and_xz(tmp_path, packed):
    lines = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(5000))
    whole = PACKERS[packed](lines)
    path = tmp_path / f"x.jsonl{packed}"
    for data in (whole[:3], whole[: len(whole) // 2], whole[:-1], whole + whole[:5]):
        path.write_bytes(data)
        assert f"the {packed[1:]} stream ends early" in failure(path)
    path.write_bytes(b"")
    assert f"0 bytes, so the {packed[1:]} file is cut" in failure(path)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    for data in (GOOD, whole + b"garbage and more", flipped):
        path.write_bytes(data)
        assert f"corrupt {packed[1:]} after" in failure(path)


def test_damaged_zst(tmp_path):
    lines = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(15000))
    whole = PACKERS[".zst"](lines)
    path = tmp_path / "x.jsonl.zst"
    for data in (whole[:3], whole[:9], whole[: len(whole) // 2], whole[:-1], whole + whole[:5]):
        path.write_bytes(data)
        assert "the zst stream ends early" in failure(path)
    path.write_bytes(b"")
    assert "0 bytes, so the zst file is cut" in failure(path)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    for data in (GOOD, whole + b"garbage", whole[:-4] + bytes(4), flipped):
        path.write_bytes(data)
        assert "corrupt zst after" in failure(path)


def test_documents_before_the_damage_come_first(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(["one"])) + b"garbage")
    (source,) = expand([str(path)])
    documents = read_part(split(source)[0], path, Fields(), print, print)
    with pytest.raises(DataError, match="corrupt gz"):
        list(documents)


def test_damaged_parquet(tmp_path):
    path = table(tmp_path / "x.parquet", {"text": [f"text {i}" for i in range(1000)]}, write_page_checksum=True)
    whole = path.read_bytes()
    for data in (b"", whole[:3], whole[: len(whole) // 2], whole[:-1], b"PAR1" * 20):
        path.write_bytes(data)
        assert "cut or corrupt Parquet" in failure(path)
    path.write_bytes(whole[:2000] + bytes([whole[2000] ^ 0xFF]) + whole[2001:])
    assert "cut or corrupt Parquet" in failure(path)


def test_parquet_without_the_column(tmp_path):
    path = table(tmp_path / "x.parquet", {"n": [1], "content": ["words"], "url": ["u"]})
    assert "no column 'text' among 'n', 'content', 'url'; use --text-field content" in failure(path)
    assert "no column 'txt' among" in failure(path, text_field="txt")
    twice = pa.table([["a"], ["b"]], names=["text", "text"])
    pq.write_table(twice, path)
    assert "2 columns are called 'text'" in failure(path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.jsonl.gz", "x.tar", "x.parquet"])
def test_a_file_that_changes_its_size(tmp_path, name):
    path = tmp_path / name
    body = {"x.tar": tar_of([("a.txt", b"x")]), "x.txt": b"line\n" * 10}.get(name, jsonl(["text"] * 10))
    write(path, body) if name != "x.parquet" else table(path, {"text": ["x"] * 10})
    (source,) = expand([str(path)])
    parts = split(source)
    path.write_bytes(path.read_bytes()[:-5])
    for part in parts:
        with pytest.raises(DataError, match="bytes now and had"):
            list(read_part(part, path, Fields(), print, print))


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, packed):
    path = write(tmp_path / f"x.jsonl{packed}", b"".join(jsonl([os.urandom(40000).hex()]) for _ in range(80)))
    (source,) = expand([str(path)])
    documents = read_part(Part(source, 0, source.bytes), path, Fields(), print, print)
    next(documents)
    os.truncate(path, source.bytes // 2)
    with pytest.raises(DataError, match="bytes now and had"):
        list(documents)


def test_files_that_cannot_be_opened(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", GOOD)
    (source,) = expand([str(path)])

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # the tests may run as root, who may read everything
        patch.setattr(Path, "open", refuse)
        with pytest.raises(DataError, match=r"x\.jsonl: cannot be read \(Permission denied\)"):
            list(read_part(split(source)[0], path, Fields(), print, print))
    path.unlink()
    with pytest.raises(DataError, match=r"x\.jsonl: cannot be read \(No such file"):
        list(read_part(split(source)[0], path, Fields(), print, print))
    path.mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        list(read_part(split(source)[0], path, Fields(), print, print))


@pytest.mark.parametrize(("name", "module"), [("x.jsonl.zst", "zstandard"), ("x.parquet", "pyarrow.parquet")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, module):
    path = tmp_path / name
    path.write_bytes(b"anything")
    monkeypatch.setitem(__import__("sys").modules, module, None)
    assert "is not installed; pip install 'bd3-megatron[data]'" in failure(path)


def test_errors_of_the_callbacks_stay_what_they_are(tmp_path):
    def full(offset, reason):
        raise OSError(28, "No space left on device")

    paths = [write(tmp_path / "x.jsonl", b"bad"), table(tmp_path / "x.parquet", {"text": [None, "x"]})]
    paths.append(write(tmp_path / "x.tar", tar_of([("a.cls", b"")])))
    for source in expand([str(path) for path in paths]):
        with pytest.raises(OSError, match="No space left"):
            list(read_part(split(source)[0], Path(source.path), Fields(), full, print))


# Finding files.


def names(*inputs) -> list[str]:
    return [source.name for source in expand([str(given) for given in inputs])]


def passed_over(*inputs) -> dict[str, tuple[int, str]]:
    found = find([str(given) for given in inputs]).passed_over
    return {known.reason: (known.count, Path(known.example).name) for known in found}


def test_folders_and_globs(tmp_path):
    for name in ("b.jsonl.gz", "a.jsonl", "notes.md", "._a.jsonl", "c.txt.zst", "d.parquet", "e.tar"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "deep" / "f.txt").write_bytes(b"")
    (tmp_path / "deep" / "deeper" / "g.JSON").write_bytes(b"")
    (tmp_path / "deep" / "deeper" / "h.csv").write_bytes(b"")
    everything = ["a.jsonl", "b.jsonl.gz", "c.txt.zst", "d.parquet", "g.JSON", "f.txt", "e.tar"]
    assert names(tmp_path) == names(tmp_path / "*") == everything
    assert passed_over(tmp_path) == {"hidden": (1, "._a.jsonl"), "of no known kind": (2, "h.csv")}
    assert passed_over(tmp_path / "*") == {"of no known kind": (2, "h.csv")}
    assert sorted(names(tmp_path / "**")) == sorted(everything)
    assert names(tmp_path / "[ab].jsonl*") == everything[:2]
    assert names(tmp_path / "e.tar", tmp_path / "a.jsonl") == ["e.tar", "a.jsonl"]
    assert names(f"file://{tmp_path}/a.jsonl") == ["a.jsonl"]
    (tmp_path / "odd[1].txt").write_bytes(b"")
    assert names(tmp_path / "odd[1].txt") == ["odd[1].txt"]
    (tmp_path / "odd[1].txt").unlink()
    assert "given twice" in failure(tmp_path, tmp_path / "a.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    (tmp_path / "same").symlink_to(tmp_path / "deep")
    assert names(tmp_path) == everything
    assert passed_over(tmp_path)["already read under another name"] == (3, "loop")


def test_what_is_ours_is_passed_over(tmp_path):
    write(tmp_path / "a.jsonl", GOOD)
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    (data / "manifest.json").write_text('{\n "format": "bd3-rows",\n "version": 2}')
    write(data / "train" / "train-000000.tar", tar_of([("k.tokens.npy", b"")]))
    (tmp_path / ".data.partial").mkdir()
    write(tmp_path / ".data.partial" / "b.jsonl", GOOD)
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "versions.txt", "metrics.jsonl"):
        write(tmp_path / "run" / name, b"")
    assert names(tmp_path) == ["a.jsonl"]
    expected = {"hidden": (1, ".data.partial"), "data set of bd3 prep": (1, "data"), "run folder": (1, "run")}
    assert passed_over(tmp_path) == expected
    message = failure(data)
    assert "nothing here that can be read; passed over: 1 data set of bd3 prep" in message


def test_names_in_any_case_and_first_bytes_tell_the_kind(tmp_path):
    lines = jsonl(["one", "two"])
    tar = tar_of([("a.txt", b"one"), ("b.txt", b"two")])
    rows = table(tmp_path / "x.parquet", {"text": ["one", "two"]}).read_bytes()
    for name, body in {
        "c4-train.00000-of-00001.json.gz": gzip.compress(lines),
        "v1_5r2_sample-0000.JSON.GZ": gzip.compress(lines),
        "a.ndjson.zstd": zstandard.compress(lines),
        "a.JSONL.Bz2": bz2.compress(lines),
        "a.txt.XZ": lzma.compress(b"one\ntwo\n"),
        "packed.jsonl": gzip.compress(lines),  # as some servers hand files out
        "a.tgz": gzip.compress(tar),
        "a.TAR.XZ": lzma.compress(tar),
        "a.tar.bz2": bz2.compress(tar),
        "a.txz": lzma.compress(tar),
        "part-00000": rows,
        "x.pq": rows,
        "x.PARQ": rows,
        "x.jsonl": rows,
        "x.parquet.gz": rows,
    }.items():
        (tmp_path / name).write_bytes(body)
        assert Read(tmp_path / name).texts == ["one", "two"], name
    (tmp_path / "part-00001").write_bytes(rows[:-9])
    assert "cut or corrupt Parquet" in failure(tmp_path / "part-00001")
    (tmp_path / "x.txt").write_bytes(b"PAR1 is a magic number\n")
    assert Read(tmp_path / "x.txt").texts == ["PAR1 is a magic number"]


def test_paths_that_cannot_be_read(tmp_path):
    assert "none.jsonl: no such file" in failure(tmp_path / "none.jsonl")
    assert "nothing matches" in failure(tmp_path / "*.jsonl")
    for name in ("x.csv", "x.parquet.gz", "x.jsonl.lz4", ".txt.old"):
        (tmp_path / name).write_bytes(b"")
        assert "not a file type that can be read" in failure(tmp_path / name)
    assert "nothing here that can be read; passed over: 1 hidden" in failure(tmp_path)
    assert "nothing here that can be read" in failure(tmp_path / "*.csv")
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "none")
    assert "dangling.jsonl: cannot be read (No such file" in failure(tmp_path / "dangling.jsonl")
    assert "dangling.jsonl: cannot be read (No such file" in failure(tmp_path)
    (tmp_path / "dangling.jsonl").unlink()
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(b"")
    assert "the file's name is not UTF-8; rename it" in failure(tmp_path)
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).unlink()
    os.mkfifo(tmp_path / "pipe.txt")
    assert "a pipe or device" in failure(tmp_path / "pipe.txt")
    assert "a pipe or device" in failure(tmp_path)
    (tmp_path / "pipe.txt").unlink()
    (tmp_path / "x.jsonl").mkdir()  # as Spark writes them
    write(tmp_path / "x.jsonl" / "part-0.jsonl", GOOD)
    assert names(tmp_path) == names(tmp_path / "x.jsonl") == ["part-0.jsonl"]
    assert Read(write(tmp_path / "empty.jsonl", b"")).documents == []


# Files elsewhere.


def fetched(url: str, folder: Path) -> list[str]:
    """Texts behind a URL, each file fetched first."""
    texts: list[str] = []
    for source in expand([url]):
        assert source.remote
        fetch(source.path, folder / source.name, source.bytes)
        for part in split(source):
            texts += [d.text for d in read_part(part, folder / source.name, Fields(), print, print)]
    return texts


def test_files_in_memory(tmp_path, fresh_fsspec):
    memory = fsspec.filesystem("memory")
    memory.pipe("/c/b.jsonl.gz", PACKERS[".gz"](jsonl(["two"])))
    memory.pipe("/c/a.jsonl", jsonl(["one"]))
    memory.pipe("/c/.hidden.jsonl", b"")
    memory.pipe("/c/notes.md", b"")
    table(tmp_path / "local.parquet", {"text": ["three", "four"]}, group=1)
    memory.pipe("/c/d/x.parquet", (tmp_path / "local.parquet").read_bytes())
    assert fetched("memory://c", tmp_path) == ["one", "two", "three", "four"]
    assert fetched("memory://c/*", tmp_path) == ["one", "two"]
    assert passed_over("memory://c") == {"hidden": (1, ".hidden.jsonl"), "of no known kind": (1, "notes.md")}
    assert fetched("memory://c/a.jsonl", tmp_path) == ["one"]
    assert fetched("memory://c/d/x.parquet", tmp_path) == ["three", "four"]
    assert split(expand(["memory://c/d/x.parquet"])[0], 1)[0].weight == memory.size("/c/d/x.parquet")
    before = expand(["memory://c"])[0]
    memory.pipe("/c/a.jsonl", jsonl(["two"]))
    assert expand(["memory://c"])[0].stamp != before.stamp
    for url, message in [
        ("memory://c/none.jsonl", "no such file"),
        ("memory://c/*.txt", "nothing matches"),
        ("memory://c/notes.md", "not a file type"),
        ("memory://c/*.md", "nothing here that can be read"),
        ("nothing://c/x.jsonl", "Protocol not known"),
        ("simplecache::memory://c", "chained"),
    ]:
        assert message in failure(url)
    with pytest.raises(DataError, match="given twice"):
        expand(["memory://c", "memory://c/a.jsonl"])


def test_files_in_s3(tmp_path, s3):
    def put(key, data):
        s3.put_object(Bucket="texts", Key=key, Body=data)

    put("corpus/", b"")  # the mark that some tools leave for a folder
    put("corpus/b.jsonl.zst", PACKERS[".zst"](jsonl(["two"])))
    put("corpus/a.jsonl", jsonl(["one"]))
    put("corpus/_SUCCESS", b"")
    put("corpus/deep/c.txt", b"three\nfour")
    put("corpus/deep/d.tar.gz", PACKERS[".gz"](tar_of([("k.txt", b"five")])))
    assert fetched("s3://texts/corpus/a.jsonl", tmp_path) == ["one"]
    everything = ["one", "two", "three", "four", "five"]
    assert fetched("s3://texts/corpus", tmp_path) == fetched("s3://texts/corpus/", tmp_path) == everything
    assert fetched("s3://texts/corpus/*.zst", tmp_path) == ["two"]
    assert fetched("s3://texts/corpus/**", tmp_path) == everything
    assert [source.path for source in expand(["s3://texts/corpus"])][:2] == [
        "s3://texts/corpus/a.jsonl",
        "s3://texts/corpus/b.jsonl.zst",
    ]
    (alone,) = expand(["s3://texts/corpus/a.jsonl"])
    assert alone == expand(["s3://texts/corpus"])[0]
    put("corpus/a.jsonl", jsonl(["ONE"]))
    (changed,) = expand(["s3://texts/corpus/a.jsonl"])
    assert (changed.bytes, changed.stamp != alone.stamp) == (alone.bytes, True)
    for url, message in [
        ("s3://texts/corpus/none.jsonl", "no such file"),
        ("s3://nowhere/none.jsonl", "no such file"),
        ("s3://texts/corpus/*.parquet", "nothing matches"),
        ("s3://texts/corpus/_SUCCESS", "not a file type"),
    ]:
        assert message in failure(url)


def test_a_remote_file_longer_than_it_may_be_is_not_copied_to_its_end(tmp_path, monkeypatch):
    memory, read = fsspec.filesystem("memory"), []
    memory.pipe("/long.jsonl", bytes(10_000))
    chunks = remote._chunks
    monkeypatch.setattr(remote, "CHUNK", 1000)
    monkeypatch.setattr(remote, "_chunks", lambda url: (read.append(len(chunk)) or chunk for chunk in chunks(url)))
    for limits, problem in (({"most": 1500}, "more than 1500 bytes"), ({"size": 1500}, "2000 bytes or more, 1500")):
        read.clear()
        with pytest.raises(DataError, match=problem):
            fetch("memory://long.jsonl", tmp_path / "copy", tries=1, **limits)
        assert sum(read) == 2000
        assert not list(tmp_path.iterdir())
