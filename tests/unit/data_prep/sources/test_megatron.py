"""Token files that Megatron-core's builder writes: rows hold exactly their tokens."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from data_prep.build.estimate import estimate
from data_prep.build.prep import PrepConfig, in_validation, prep
from data_prep.errors import DataError
from data_prep.read.reader import RowReader
from data_prep.sources import Fields, expand, find, read_part, split
from data_prep.verify.check import check

indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
EOD = 10


def build(prefix: Path, documents, dtype=np.uint16, sequences: int = 1) -> Path:
    """A pair written by the builder; each document in up to ``sequences`` sequences."""
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        lengths = [len(part) for part in np.array_split(document, min(sequences, max(1, len(document))))]
        builder.add_document(np.array(document), lengths)
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.bin")


@pytest.fixture
def tokenizer(tmp_path) -> str:
    """Ten words and one token for both ends; the mask becomes the id 11."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{n}": n for n in range(EOD)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "words.json"))
    return str(tmp_path / "words.json")


def documents(count: int = 60, ends: bool = True) -> list[list[int]]:
    rng = np.random.default_rng(0)
    found = [rng.integers(0, EOD, int(rng.integers(1, 40))).tolist() for _ in range(count)]
    return [[*document, EOD] if ends else document for document in found]


def config(tmp_path: Path, tokenizer: str, **changes) -> PrepConfig:
    values = {"inputs": (str(tmp_path / "x.bin"),), "out": str(tmp_path / "data"), "length": 16, "workers": 1}
    return PrepConfig(**values | {"tokenizer": tokenizer, "validation_fraction": 0.3} | changes)


def streams(tmp_path: Path, manifest) -> dict[str, list[int]]:
    return {
        name: RowReader(tmp_path / "data", name).rows(np.arange(split.rows)).tolist()
        for name, split in manifest.splits.items()
    }


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize(("packing", "dtype", "sequences"), [("wrap", np.uint16, 1), ("stream", np.int32, 3)])
def test_rows_hold_exactly_the_tokens(tmp_path, tokenizer, ends, packing, dtype, sequences):
    given = documents(ends=ends)
    build(tmp_path / "x", given, dtype, sequences)
    add = {"add_bos": False} if packing == "stream" else {}
    manifest = prep(config(tmp_path, tokenizer, packing=packing, **add))
    rows = streams(tmp_path, manifest)
    for name, split_ in manifest.splits.items():
        mine = [d for n, d in enumerate(given) if in_validation(f"x.bin:{n}", 0, 0.3) == (name == "validation")]
        expected = [token for d in mine for token in (d if ends else [*d, EOD])]  # not doubled
        inner = slice(1, -1) if packing == "wrap" else slice(None)
        found = [token for row in rows[name] for token in row[inner]]
        assert found == expected[: len(found)]
        assert (split_.documents, len(expected) - len(found)) == (len(mine), split_.dropped_tokens)
    assert check(tmp_path / "data", workers=1).faults == {}
    lines = estimate(config(tmp_path, tokenizer, packing=packing, **add))
    assert lines.documents == pytest.approx(60, rel=0.1)


def test_the_pair_is_named_in_any_way_and_read_in_parts(tmp_path, tokenizer):
    given = documents()
    path = build(tmp_path / "x", given)
    for name in (path, tmp_path / "x.idx", tmp_path / "x", tmp_path / "*.bin"):
        (source,) = expand([str(name)])
        assert (source.path, source.kind) == (str(path), "megatron")
        assert source.bytes == path.stat().st_size + (tmp_path / "x.idx").stat().st_size
    for target in (1, 300, 1 << 20):
        parts = split(source, target)
        assert sum(part.weight for part in parts) == source.bytes
        found = [d for part in parts for d in read_part(part, path, Fields(), print, print)]
        assert [d.ids.tolist() for d in found] == given
        assert [(d.id, d.offset) for d in found] == [(f"x.bin:{n}", n) for n in range(len(given))]
    assert len(split(source, 1)) > 20
    (tmp_path / "alone.bin").write_bytes(b"")
    listing = find([str(tmp_path)])
    assert [source.name for source in listing.sources] == ["words.json", "x.bin"]
    assert [(known.reason, Path(known.example).name) for known in listing.passed_over] == [
        ("without a .idx beside it", "alone.bin")
    ]
    with pytest.raises(DataError, match=r"alone\.idx: cannot be read"):
        expand([str(tmp_path / "alone.bin")])


def test_a_part_that_is_done_is_kept_and_a_changed_index_noticed(tmp_path, tokenizer):
    build(tmp_path / "x", documents())
    made = prep(config(tmp_path, tokenizer))
    lines: list[str] = []
    assert prep(config(tmp_path, tokenizer), lines.append) == made
    assert "nothing to do" in lines[-1]
    build(tmp_path / "x", documents(), sequences=2)  # the same .bin, another .idx
    with pytest.raises(DataError, match="other sources"):
        prep(config(tmp_path, tokenizer))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, 2, 300]], "document 0 has the id 300, and the tokenizer's ids are 0 to 10"),
        ([[1], [2, -4]], "document 1 has the id -4"),
    ],
)
def test_ids_of_another_tokenizer(tmp_path, tokenizer, given, message):
    build(tmp_path / "x", given, np.int32)
    with pytest.raises(DataError, match=message):
        prep(config(tmp_path, tokenizer))


def test_a_tokenizer_must_be_given_and_the_mask_is_no_text(tmp_path, tokenizer):
    build(tmp_path / "x", documents())
    with pytest.raises(DataError, match=r"bpe:300: .*x\.bin holds token ids; give the tokenizer\.json"):
        prep(config(tmp_path, "bpe:300"))
    text = json.loads(Path(tokenizer).read_text())
    text["added_tokens"].append({**text["added_tokens"][0], "id": 11, "content": "<mask>"})
    (tmp_path / "mask.json").write_text(json.dumps(text))
    build(tmp_path / "x", [*documents(), [1, 11, 2], []])
    manifest = prep(config(tmp_path, str(tmp_path / "mask.json")))
    assert (manifest.rejects, manifest.skipped) == (1, {"short": 1})
    assert "has the mask (id 11)" in (tmp_path / "data" / "rejects.jsonl").read_text()


def test_a_damaged_index_is_one_line(tmp_path):
    path = build(tmp_path / "x", documents())
    index, tokens = (tmp_path / "x.idx").read_bytes(), path.read_bytes()
    count = struct.unpack_from("<Q", index, 18)[0]
    lengths, ends = 34, 34 + count * 12
    for broken in (
        b"",
        index[:20],
        index[:-1],
        b"X" + index[1:],
        index[:17] + b"\x06" + index[18:],  # float64
        index[:18] + struct.pack("<Q", 1 << 60) + index[26:],
        index[:lengths] + struct.pack("<i", -5) + index[lengths + 4 :],
        index[:lengths] + struct.pack("<i", 1 << 30) + index[lengths + 4 :],
        index[:ends] + struct.pack("<q", 7) + index[ends + 8 :],
        index[:-8] + struct.pack("<q", count + 5),
    ):
        (tmp_path / "x.idx").write_bytes(broken)
        with pytest.raises(DataError, match="cut or damaged") as caught:
            split(expand([str(path)])[0])
        assert "\n" not in str(caught.value)
    (tmp_path / "x.idx").write_bytes(index)
    path.write_bytes(tokens[:-4])
    with pytest.raises(DataError, match="speaks of"):
        split(expand([str(path)])[0])
