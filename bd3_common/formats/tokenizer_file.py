"""A ``tokenizer.json`` from outside: checked, without randomness, loaded without truncation and padding.

The file cannot run code. It can make encoding slow: a regular expression of a pre-tokenizer or normalizer may
backtrack. The library gives up one match after 10 million steps, and :func:`library_errors` tells it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from bd3_common.errors import UserError
from bd3_common.schema import MAX_BYTES, MAX_VOCABULARY, OpenRecord, check, parse, read_bytes
from bd3_common.text import shorten

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_ID = MAX_VOCABULARY - 2
"""largest id, so that a mask may follow"""
_REMEDY = "give a tokenizer.json that `tokenizers` wrote"
_SAMPLING = ("dropout", "alpha", "nbest_size")  # of BPE and Unigram: other ids for the same text each time

_Id = Annotated[int, Field(ge=0, le=MAX_ID)]


class _Added(OpenRecord):
    id: _Id
    content: str


class _Model(OpenRecord):
    dropout: Annotated[float, Field(ge=0, le=1)] | None = None
    vocab: Any = None


class _Outline(OpenRecord):
    model: _Model
    added_tokens: list[_Added] = Field(default=[])


@dataclass(frozen=True)
class TokenizerFile:
    """A checked ``tokenizer.json``.

    Attributes:
        content: its JSON, without sampling.
        data: its bytes, as they are in the file unless there was sampling to remove.
        remarks: a line for each option that was removed.
        error: class of the errors.
    """

    path: Path
    content: dict[str, Any]
    data: bytes
    remarks: tuple[str, ...]
    error: type[UserError]

    def load(self) -> Tokenizer:
        """The tokenizer, which neither cuts nor pads.

        Raises:
            UserError: `tokenizers` does not take it.
        """
        return load_json(self.data, self.path, self.error)


def read_tokenizer(path: str | Path, error: type[UserError] = UserError) -> TokenizerFile:
    """Read and check a ``tokenizer.json``.

    Raises:
        UserError: of class ``error``, one line: no such file, no tokenizer, or ids that no model has.
        OSError: it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise error(
            f"{path}: no such tokenizer file; give the path of a tokenizer.json (bd3 prep trains one for bpe:N)"
        )
    data = read_bytes(path, error, MAX_BYTES)
    try:
        content = parse(data, dict[str, Any], path)
        outline = check(content, _Outline, path)
        if isinstance(outline.model.vocab, dict):
            check({"model.vocab": outline.model.vocab}, dict[str, dict[str, _Id]], path)
        _check_character_maps(content.get("normalizer"), path)
    except UserError as fault:
        raise _refused(path, str(fault).removeprefix(f"{path}: "), error) from None
    model, remarks = content["model"], []
    for key in _SAMPLING:
        if model.get(key):
            remarks.append(f"{path}: model.{key}={shorten(model[key])} is not used: one text always gives the same ids")
            model[key] = None
    return TokenizerFile(path, content, dump(content) if remarks else data, tuple(remarks), error)


def load_json(data: bytes, path: str | Path, error: type[UserError] = UserError) -> Tokenizer:
    """The tokenizer in ``data``, without truncation and padding; ``path`` is for the error."""
    from tokenizers import Tokenizer

    try:
        with library_errors():
            tokenizer = Tokenizer.from_buffer(data)
    except LibraryError as fault:
        raise _refused(path, str(fault), error) from None
    # Stored in the file, they would cut or fill every text without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def dump(content: Mapping[str, Any]) -> bytes:
    """JSON of a tokenizer, indented as `tokenizers` does it."""
    return json.dumps(content, ensure_ascii=False, indent=2).encode()


class LibraryError(Exception):
    """`tokenizers` has failed; the text is one line."""


@contextmanager
def library_errors() -> Iterator[None]:
    """Turn what `tokenizers` raises in the block, panics included, into LibraryError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # plain Exception, and for a panic a class of its own that is none
        raise LibraryError(shorten(next(iter(str(error).splitlines()), type(error).__name__), 160)) from None


def _refused(path: str | Path, reason: str, error: type[UserError]) -> UserError:
    return error(f"{path}: not a tokenizer ({reason}); {_REMEDY}")


def _check_character_maps(normalizer: Any, path: Path) -> None:
    """Check the tables of SentencePiece normalizers, at which the library would panic."""
    if not isinstance(normalizer, dict):
        return
    parts = normalizer.get("normalizers")
    for part in parts if isinstance(parts, list) else []:
        _check_character_maps(part, path)
    table = normalizer.get("precompiled_charsmap")
    if normalizer.get("type") != "Precompiled" or not isinstance(table, str):
        return
    try:
        blob = base64.b64decode(table, validate=True)
        size = int.from_bytes(blob[:4], "little")
        if len(blob) < 4 + size:
            raise ValueError(f"{len(blob)} bytes, {4 + size} are stated")
        blob[4 + size :].decode()
    except ValueError as fault:
        raise UserError(f"{path}: normalizer.precompiled_charsmap: is damaged: {shorten(str(fault), 80)}") from None
