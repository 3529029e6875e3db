"""Input kinds: the registry's entries, and a kind from a plugin file in all processes of a prep."""

import numpy as np
import pytest

from bd3_common.errors import ConfigError
from data_prep.read.reader import RowReader
from data_prep.sources.kinds import INPUT_KINDS, InputKind, kind_of, readable
from tests.unit.commands import bd3

PLUGIN = '''
from data_prep.sources.inputs import Part
from data_prep.sources.kinds import INPUT_KINDS, InputKind
from data_prep.sources.streams import open_stream


class Records(InputKind):
    """Texts of ten bytes, one after another."""

    suffixes = (".xyz",)

    def parts(self, source, target_bytes):
        half = source.bytes // 20 * 10
        return [Part(source, 0, half), Part(source, half, source.bytes)]

    def read(self, part, local, intake):
        with open_stream(part.source, local, part.begin) as stream:
            for offset in range(part.begin, part.end, 10):
                yield intake.document(offset, "", stream.read(10).decode())


INPUT_KINDS.add("records", Records)
'''


def test_names_tell_the_kind():
    for name, expected in {
        "a.jsonl": ("jsonl", None),
        "a.txt.gz": ("text", "gz"),
        "a.tar.zst": ("webdataset", "zst"),
        "a.TGZ": ("webdataset", "gz"),
        "c4-train.00000-of-00001.json.gz": ("jsonl", "gz"),
        "a.ndjson.zstd": ("jsonl", "zst"),
        "A.JSON.XZ": ("jsonl", "xz"),
        "a.txt.Bz2": ("text", "bz2"),
        "a.pq": ("parquet", None),
        "a.arrow": ("arrow", None),
        "a.parquet": ("parquet", None),
        "a.parquet.gz": None,
        "a.md": None,
        "jsonl": None,
    }.items():
        assert kind_of(name) == expected, name
    for name in INPUT_KINDS.names():
        kind = INPUT_KINDS.instance(name)
        assert isinstance(kind, InputKind)
        assert all(suffix in readable() for suffix in kind.suffixes)
    with pytest.raises(ConfigError, match="unknown input kind"):
        INPUT_KINDS.instance("csv")


def test_a_kind_from_a_plugin_works_in_all_processes(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    texts = [f"text {number:04d}\n" for number in range(200)]
    (tmp_path / "file.xyz").write_text("".join(texts))
    args = ("--length", 16, "--tokenizer", "bpe:260", "--packing", "stream", "--workers", 2)
    plugin = ("--plugin", tmp_path / "mine.py")
    options = {"log": tmp_path / "log", "parent": True}
    done = bd3("prep", *plugin, tmp_path / "file.xyz", "--out", tmp_path / "data", *args, **options)
    assert done.code == 0, done.err
    manifest = RowReader(tmp_path / "data", "train").manifest
    assert sum(split.documents for split in manifest.splits.values()) == 200
    rows = [RowReader(tmp_path / "data", name) for name in ("train", "validation")]
    assert all(np.isfinite(reader.rows(np.arange(len(reader)))).all() for reader in rows)
    done = bd3("prep", tmp_path / "file.xyz", "--out", tmp_path / "other", *args, **options)
    assert done.code == 2
    assert "file.xyz: not a file type that can be read; name files that end in" in done.err.replace("\n", " ")
