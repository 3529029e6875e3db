"""The schema reader: one line for whatever does not fit."""

from __future__ import annotations

import os
from typing import Any

import pytest

from bd3_common.errors import UserError
from bd3_common.schema import Count, InnerPath, OpenRecord, Record, parse, read
from bd3_common.text import printable, shorten


class Shard(Record):
    name: InnerPath
    rows: Count


class Listing(Record):
    shards: list[Shard]
    note: Any = None


GOOD = '{"shards": [{"name": "train/a.tar", "rows": 3}], "note": {"a": 1}}'


def test_a_text_that_fits_is_a_value():
    assert parse(GOOD, Listing, "f").shards[0] == Shard(name="train/a.tar", rows=3)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[" * 100_000, "f: is no JSON: "),
        ("", "f: is no JSON: "),
        (b"\xff", "f: is no JSON: "),
        ("null", "f: value None: "),
        ('{"shards": 5}', "f: shards: value 5: "),
        ('{"shards": [], "x": 1}', "f: x: unknown key"),
        ('{"shards": [{"name": "a"}]}', "f: shards[0].rows: is missing"),
        (GOOD.replace("3", '"3"'), "f: shards[0].rows: value 3: "),
        (GOOD.replace("3", "true"), "f: shards[0].rows: value True: "),
        (GOOD.replace("3", "-1"), "f: shards[0].rows: value -1: "),
        (GOOD.replace("3", "9" * 4000), "f: shards[0].rows: value an integer of "),
        (GOOD.replace("3", "NaN"), "f: is no JSON: "),
        (GOOD.replace('{"a": 1}', "[NaN]"), "f: is no JSON: "),
        (GOOD.replace("train/a.tar", "../a.tar"), "f: shards[0].name: value ../a.tar: must be a path inside"),
        (GOOD.replace("train/a.tar", "/etc/passwd"), "f: shards[0].name: value /etc/passwd: must be a path inside"),
        (GOOD.replace("train/a.tar", "a\\u0000"), "f: shards[0].name: value a\\x00: must be a path inside"),
        (GOOD.replace("name", "\\u001b[31m"), "f: shards[0].name: is missing"),
    ],
)
def test_what_does_not_fit_is_one_line(text, line):
    with pytest.raises(UserError) as caught:
        parse(text, Listing, "f", "write it again")
    assert str(caught.value).startswith(line)
    assert str(caught.value).endswith("; write it again")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_other_programs_files_may_have_more_keys():
    class Theirs(OpenRecord):
        rows: Count

    assert parse('{"rows": 1, "more": {}}', Theirs, "f").rows == 1


def test_only_regular_files_of_a_sane_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        read(tmp_path / "pipe", Listing)
    (tmp_path / "large").write_text(" " * 100)
    with pytest.raises(UserError, match="more than 10 bytes"):
        read(tmp_path / "large", Listing, max_bytes=10)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent", Listing)


def test_text_from_outside_has_no_control_characters():
    assert printable("plain") == "plain"
    assert printable("naïve 漢字") == "naïve 漢字"
    assert printable("\x1b]0;owned\x07\u202e\n") == "\\x1b]0;owned\\x07\\u202e\\x0a"
    assert printable("a\nb\x9b", keep="\n") == "a\nb\\x9b"
    assert shorten("x" * 100) == "x" * 57 + "..."
    assert shorten(list(range(10**6))) == "a list of 1000000"
