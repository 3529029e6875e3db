"""Seeded mutations of files: values of JSON and YAML trees, lines, members of tars, headers, bytes, kinds of files."""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import json
import lzma
import math
import os
import random
import struct
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
import zstandard

DEEP, LONG, HUGE = "@deep@", "@long@", "@huge@"
"""marks that stand for texts which Python's encoder does not write"""
VALUES: list[Any] = [
    *(None, True, False, [], {}, "", DEEP, LONG, HUGE, math.nan, math.inf, -math.inf, 1e300, -1e300, 1e-300),
    *(0, 1, -1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(0.5, -0.5, 10**9, 10**12, 2**70, "1", "-1", "1e9", "NaN", "true", "null", "a" * 300, "x\0y", "\x1b[31m\x07"),
    *("\u202e", "\ud800", "\x9b31m", "line\nend", "..", "../../secret", "/etc/hostname", "a/../../../secret", "./a"),
    *("~", "$HOME", "`id`", "${x}", "--help", "{}", "%s%n", "O", "|O", "<f8", "V8", "F8_E8M0", [[]], [None], {"": {}}),
]
DOCUMENTS = [
    b"",
    b"\0",
    b"{",
    b"null",
    b"5",
    b'"x"',
    b"[]",
    b"{}",
    b"[" * 5000,
    b'{"a":' * 5000,
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"\x80\x04\x95cos\nsystem\n(S'touch /tmp/owned'\ntR.",
    b"PK\x03\x04" + b"\0" * 60,
    b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    b"9" * 5000,
    b"# bd3\n" * 50,
]
YAML = [
    "a: &a [x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi")),
    "guard: &g\n  skip: *g\n",
    "<<: {a: 1}\n",
    "model: !!python/object/apply:os.system ['true']\n",
    "model: {layers: " + "[" * 500 + "]" * 500 + "}\n",
    "? [a, b]\n: 1\n",
    "model:\n  layers: 1\n  layers: 2\n",
    "model:\n\tlayers: 1\n",
    "run: !!binary '%%'\n",
    "model: {layers: 0x" + "f" * 6000 + "}\n",
    "model: {layers: 1:2:3:4:5:6:7:8:9:10}\n",
    "model: {layers: 2020-99-99}\n",
    "--- a\n--- b\n",
    "%YAML 9.9\n---\na: 1\n",
    "model: {rope_theta: .inf, layers: .nan}\n",
    'run: "\\u202e\\x1b"\n',
]


class Mutator:
    """Mutations that a seed determines.

    Args:
        outside: a folder that no mutation may lead to; some paths and links point there.
    """

    def __init__(self, seed: str, outside: Path):
        self.random, self.outside = random.Random(seed), outside

    def mutate(self, path: Path, form: str) -> None:
        """Change the file at ``path``, which has the form ``form``, or put something else in its place."""
        draw = self.random.random()
        if draw < 0.06:
            self._replace(path)
        elif draw < 0.12:
            path.write_bytes(self.random.choice(DOCUMENTS))
        elif draw < 0.3:
            path.write_bytes(self.damage(path.read_bytes()))
        else:
            change: Callable[[bytes], bytes] = getattr(self, f"_{form}")
            path.write_bytes(change(path.read_bytes()))

    def _replace(self, path: Path) -> None:
        """Something that is no regular file of ours, or nothing."""
        kinds = [lambda: None, path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path.name)]
        kinds += [lambda: path.symlink_to("nowhere"), lambda: path.symlink_to("/dev/zero"), path.touch]
        kinds += [lambda: path.symlink_to("."), lambda: path.symlink_to("/dev/null")]
        path.unlink()
        self.random.choice(kinds)()

    def damage(self, data: bytes) -> bytes:
        """Bytes flipped, cut, inserted, repeated, zeroed or overwritten by extreme numbers."""
        out, rng = bytearray(data), self.random
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            at = rng.randrange(len(out) + 1)
            end = min(len(out), at + rng.choice([1, 4, 8, 64, 4096]))
            kind = rng.randrange(7)
            if kind == 0 and at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del out[at:]
            elif kind == 2:
                del out[at:end]
            elif kind == 3:
                out[at:at] = rng.randbytes(rng.choice([1, 8, 512]))
            elif kind == 4:
                out[at:at] = out[at:end]
            elif kind == 5:
                out[at:end] = bytes(end - at)
            else:
                extreme = rng.choice([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])
                out[at : at + 8] = struct.pack(rng.choice("<>") + "Q", extreme)
        return bytes(out)

    def tree(self, value: Any) -> Any:
        """One to three places of a tree changed."""
        for _ in range(self.random.choice([1, 1, 2, 3])):
            value = self._once(value)
        return value

    def _once(self, value: Any) -> Any:
        rng = self.random
        if not isinstance(value, dict | list) or not value or rng.random() < 0.05:
            return self._value(value)
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.85:
            value[key] = self._once(value[key])
            return value
        kind = rng.randrange(8)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[rng.choice(["", "x\0", "\x1b[1m", "__class__", "self", "model_config", "a" * 500])] = copy.deepcopy(
                value[key]
            )
        elif kind == 1:
            value.append(copy.deepcopy(value[key]))
        elif kind == 2:
            other = rng.choice(keys)
            value[key], value[other] = value[other], value[key]
        else:
            value[key] = self._value(value[key])
        return value

    def _value(self, value: Any) -> Any:
        rng = self.random
        if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
            return rng.choice(
                [value + 1, value - 1, -value, value * 2, value << 20, value << 40, float(value), str(value)]
            )
        if isinstance(value, str) and rng.random() < 0.4:
            paths = [f"{self.outside}/secret.tar", f"../../outside/{value}", value + "\0", value[:-1], value.upper()]
            return rng.choice(paths)
        return copy.deepcopy(rng.choice(VALUES))

    def _text(self, value: Any) -> bytes:
        text = json.dumps(value, ensure_ascii=self.random.random() < 0.8)
        for mark, meant in ((DEEP, "[" * 3000 + "]" * 3000), (LONG, f'"{"a" * 100_000}"'), (HUGE, "7" * 5000)):
            text = text.replace(f'"{mark}"', meant)
        return text.encode("utf-8", "surrogatepass")

    def _json(self, data: bytes) -> bytes:
        return self._text(self.tree(json.loads(data)))

    def _jsonl(self, data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        at = self.random.randrange(len(lines))
        kind = self.random.randrange(8)
        if kind == 0:
            lines.insert(at, self.random.choice(DOCUMENTS) + b"\n")
        elif kind == 1:
            lines[at] = lines[at].rstrip(b"\n")
        else:
            lines[at] = self._text(self.tree(json.loads(lines[at]))) + b"\n"
        return b"".join(lines)

    def _yaml(self, data: bytes) -> bytes:
        if self.random.random() < 0.2:
            return self.random.choice(YAML).encode()
        if self.random.random() < 0.1:
            return data + self.random.choice(YAML).encode()
        value = self.tree(yaml.safe_load(data))
        # JSON with what no YAML writer writes is YAML, too.
        return self._text(value) if self.random.random() < 0.5 else yaml.safe_dump(value).encode("utf-8", "replace")

    def _gz(self, data: bytes) -> bytes:
        return gzip.compress(self._jsonl(gzip.decompress(data)), 1)

    def _zst(self, data: bytes) -> bytes:
        return zstandard.compress(self._jsonl(zstandard.decompress(data)), 1)

    def _bz2(self, data: bytes) -> bytes:
        return bz2.compress(self._jsonl(bz2.decompress(data)), 1)

    def _xz(self, data: bytes) -> bytes:
        return lzma.compress(self._jsonl(lzma.decompress(data)), preset=0)

    def _bytes(self, data: bytes) -> bytes:
        return self.damage(data)

    def _npy(self, data: bytes) -> bytes:
        """The header's text changed, its length kept or not."""
        size = int.from_bytes(data[8:10], "little")
        header, body = data[10 : 10 + size], data[10 + size :]
        numbers = [
            b"(1,)",
            b"(-1, 3)",
            b"(4611686018427387904, 3)",
            b"()",
            b"(3)",
            b"(2.5,)",
            b"[1]",
            b"__import__('os')",
        ]
        begin, end = header.index(b"("), header.index(b")") + 1
        header = header[:begin] + self.random.choice(numbers) + header[end:]
        if self.random.random() < 0.3:
            header = header.replace(b"<i8", self.random.choice([b"|O", b"<f8", b"<i4", b"|V8", b"<M8[s]", b"<U9"]))
        return data[:8] + struct.pack("<H", len(header)) + header + body

    def _safetensors(self, data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = self._json(data[8 : 8 + size])
        stated = (
            len(header) if self.random.random() < 0.8 else self.random.choice([0, 1, 2**40, 2**63, 2**64 - 1, size])
        )
        return stated.to_bytes(8, "little") + header + data[8 + size :]

    def _tar(self, data: bytes) -> bytes:
        """Members renamed, doubled, dropped, changed in type or content."""
        out, rng = io.BytesIO(), self.random
        with tarfile.open(fileobj=io.BytesIO(data)) as source, tarfile.open(fileobj=out, mode="w") as target:
            members = source.getmembers()
            chosen = rng.randrange(len(members))
            for number, member in enumerate(members):
                file = source.extractfile(member)
                payload = file.read() if file is not None else b""
                kind = rng.randrange(7) if number == chosen else -1
                if kind == 0:
                    continue
                if kind == 1:
                    member.name = rng.choice(
                        ["../x.json", "/x.npy", "x", "a\nb.txt", "\x1b[1m.txt", "a" * 300 + ".json"]
                    )
                elif kind == 2:
                    member.type = rng.choice(
                        [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"Z"]
                    )
                    member.linkname = f"{self.outside}/secret.tar"
                elif kind in (3, 4) and member.name.endswith("json"):
                    payload = self._json(payload)
                elif kind == 3 and member.name.endswith("npy"):
                    payload = self._npy(payload)
                elif kind in (3, 4):
                    payload = self.damage(payload)
                elif kind == 5:
                    target.addfile(member, io.BytesIO(payload))
                elif kind == 6:
                    member.pax_headers = {"size": rng.choice(["-1", "9" * 30, "x", "0"]), "path": "../../x"}
                if member.type == tarfile.REGTYPE:
                    member.size = len(payload)
                target.addfile(member, io.BytesIO(payload))
        changed = out.getvalue()
        return changed if rng.random() < 0.9 else changed[: -rng.randrange(1, 2048)]
