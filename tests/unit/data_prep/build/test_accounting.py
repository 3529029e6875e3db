"""What prep takes and what it leaves: totals add up, and every file passed over is told."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.build.outcome import totals
from data_prep.build.prep import PrepConfig, prep
from data_prep.errors import DataError
from data_prep.format.manifest import load_manifest, save_manifest
from data_prep.format.tokenizer import train_bpe
from pretrain import cli

WORDS = "the quick brown fox jumps over a lazy dog while many small rivers run down to the sea"
DOCUMENTS = [f"{WORDS} number {number}" for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    train_bpe([WORDS] * 3, 300).save(str(path))
    return str(path)


def lines(prefix: str = "d", texts=DOCUMENTS) -> bytes:
    return "".join(json.dumps({"id": f"{prefix}{n}", "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def tar(members) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def run(capsys, *args) -> tuple[int, dict, str]:
    """``bd3 prep --json``: its exit code, line and messages."""
    code = cli.main(["prep", *map(str, args), "--length", "16", "--workers", "1", "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else {}, captured.err


def test_a_folder_is_read_in_depth_and_the_rest_is_told(tmp_path, tokenizer, capsys):
    folder = tmp_path / "mixed"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(lines())
    (folder / "b.json.gz").write_bytes(gzip.compress(lines("e")))
    (folder / "d.JSONL").write_bytes(lines("f"))
    (folder / "sub" / "c.json").write_text(json.dumps([{"id": f"g{n}", "text": t} for n, t in enumerate(DOCUMENTS)]))
    (folder / "sub" / "LICENSE").write_text("...")
    (folder / ".hidden").mkdir()
    code, found, messages = run(capsys, folder, "--out", tmp_path / "o", "--tokenizer", tokenizer)
    assert code == 0
    assert found["documents"] == {"read": 240, "left_out": 0, "rejected": 0, "all": 240}
    assert {known["reason"]: known["count"] for known in found["passed_over"]} == {"of no known kind": 1, "hidden": 1}
    assert "documents: 240 read + 0 left out + 0 rejected = 240 in all" in messages
    assert "passed over: 1 hidden" in messages
    assert "LICENSE" in messages
    assert cli.main(["prep", str(folder), "--out", str(tmp_path / "x"), "--tokenizer", tokenizer, "--dry-run"]) == 0
    assert "LICENSE" in capsys.readouterr().out
    code, again, _ = run(capsys, folder, "--out", tmp_path / "o", "--tokenizer", tokenizer)
    assert (code, again) == (0, found)  # from the manifest


def test_a_sample_that_stands_for_a_thousand_documents(tmp_path, tokenizer, capsys):
    good = [(f"{n:04d}.txt", text.encode()) for n, text in enumerate(DOCUMENTS)]
    lost = [(f"report v2.{n}.txt", b"lost document number %d" % n) for n in range(1000)]
    path = tmp_path / "dots.tar.gz"
    path.write_bytes(gzip.compress(tar(good + lost)))
    args = (path, "--out", tmp_path / "o", "--tokenizer", tokenizer)
    code, _, messages = run(capsys, *args)
    assert code == 2
    assert "max_rejects=100" in messages
    assert "'report v2.0.txt' is .0.txt of the sample 'report v2'" in messages.replace("\n", " ")
    code, found, _ = run(capsys, *args, "--max-rejects", "1000")
    assert code == 0
    assert found["documents"] == {"read": 60, "left_out": 0, "rejected": 1000, "all": 1060}
    assert len((tmp_path / "o" / "rejects.jsonl").read_text().splitlines()) == 1000


def test_texts_beside_a_sample_are_counted(tmp_path, tokenizer, capsys):
    members = [(f"{n:04d}.txt", text.encode()) for n, text in enumerate(DOCUMENTS)]
    members += [(f"notes.{n}.txt", b"lost") for n in range(7)] + [("notes.txt", b"a text that is read")]
    members += [("README", b"no extension"), ("._a.txt", b"hidden"), ("0059b.json", b'{"text": "  "}')]
    (tmp_path / "x.tar").write_bytes(tar(members))
    code, found, messages = run(capsys, tmp_path / "x.tar", "--out", tmp_path / "o", "--tokenizer", tokenizer)
    assert code == 0
    assert found["left_out"] == {"short": 1, "hidden": 1, "member": 7, "unnamed": 1}
    assert found["documents"] == {"read": 61, "left_out": 10, "rejected": 0, "all": 71}
    assert "7 texts of a tar beside the .txt of their sample" in messages
    (tmp_path / "y.tar").write_bytes(tar([*members, ("more.jsonl", lines())]))
    code, _, messages = run(capsys, tmp_path / "y.tar", "--out", tmp_path / "p", "--tokenizer", tokenizer)
    assert code == 2
    assert "member 'more.jsonl' is a file of documents; unpack the tar" in " ".join(messages.split())


RECORDS = st.lists(st.sampled_from(["good", "nul", "short", "long", "bad", "null", "blank"]), max_size=12)


@settings(max_examples=6)
@given(records=RECORDS, layout=st.sampled_from(["x.jsonl", "x.json", "x.tar"]))
def test_totals_add_up(tmp_path_factory, tokenizer, records, layout):
    folder = tmp_path_factory.mktemp("totals")
    texts = {
        "good": WORDS,
        "nul": f"\0{WORDS}\0",
        "short": "ab",
        "long": WORDS * 9,
        "bad": 3,
        "null": None,
        "blank": " ",
    }
    found = [{"id": f"r{n}", "text": texts[kind]} for n, kind in enumerate(records)]
    found += [{"id": f"d{n}", "text": text} for n, text in enumerate(DOCUMENTS)]
    if layout == "x.tar":
        body = tar([(f"{n}.json", json.dumps(record).encode()) for n, record in enumerate(found)])
    else:
        texts_ = [json.dumps(record) for record in found]
        body = ("[" + ", ".join(texts_) + "]" if layout == "x.json" else "\n".join(texts_)).encode()
    (folder / layout).write_bytes(body)
    options = {"inputs": (str(folder / layout),), "out": str(folder / "o"), "tokenizer": tokenizer, "length": 16}
    manifest = prep(PrepConfig(**options, min_chars=5, max_chars=300, validation_fraction=0.3, workers=1))
    count = records.count
    rejected, left_out = count("bad") + count("null"), count("short") + count("long") + count("blank")
    read = count("good") + count("nul") + len(DOCUMENTS)
    assert totals(manifest) == {"read": read, "left_out": left_out, "rejected": rejected, "all": len(found)}
    assert (manifest.nul_characters, manifest.nul_documents) == (2 * count("nul"), count("nul"))
    assert ("nul_characters" in (folder / "o" / "manifest.json").read_text()) == bool(count("nul"))
    assert load_manifest(folder / "o") == manifest


def test_a_manifest_without_nul_is_as_before(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines())
    manifest = prep(PrepConfig(inputs=(str(path),), out=str(tmp_path / "o"), tokenizer=tokenizer, length=16, workers=1))
    before = (tmp_path / "o" / "manifest.json").read_bytes()
    save_manifest(manifest, tmp_path)
    assert Path(tmp_path / "manifest.json").read_bytes() == before
    assert b"nul_" not in before


def test_texts_without_a_token_are_counted(tmp_path, capsys):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    made.normalizer = normalizers.Replace("x", "")
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "t.json"))
    (tmp_path / "x.jsonl").write_bytes(lines(texts=["a b " * 9] * 40 + ["xxx"] * 5))
    args = ("--packing", "stream", "--no-add-bos", "--no-add-eos", "--tokenizer", tmp_path / "t.json")
    code, found, _ = run(capsys, tmp_path / "x.jsonl", "--out", tmp_path / "o", *args)
    assert (code, found["left_out"]) == (0, {"empty": 5})
    assert found["documents"] == {"read": 40, "left_out": 5, "rejected": 0, "all": 45}


def test_nothing_to_read_tells_what_is_there(tmp_path, tokenizer):
    (tmp_path / "notes.md").write_text("x")
    config = PrepConfig(inputs=(str(tmp_path),), out=str(tmp_path / "o"), tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"nothing here that can be read; passed over: 1 of no known kind"):
        prep(config)
