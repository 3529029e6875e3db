"""`bd3 prep`: text to a data set, other rows of a finished one, or an index of existing token tars."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from pydantic import Field

from bd3_common.text import json_line, printable, show
from data_prep.build.index import index_folder
from data_prep.build.outcome import totals
from data_prep.build.plan import PrepConfig
from data_prep.build.prep import prep
from data_prep.build.token_tar import IndexConfig
from data_prep.format.manifest import Manifest
from data_prep.repack.repack import RepackConfig, repack
from data_prep.sources import Listing, find
from pretrain.config.command_line import Positional, parse_options


class PrepOptions(PrepConfig):
    """Tokenize text, cut it into rows and write them as WebDataset shards.

    bd3 prep repack DATA --out OUT writes a finished data set anew in rows of another length; it has its own --help."""

    inputs: Positional[tuple[str, ...]] = Field(min_length=1, description=PrepConfig.model_fields["inputs"].description)
    index: str | None = Field(
        default=None,
        description="folder of WebDataset tars of token ids to index in place, "
        "instead of preparing text; bd3 prep --index DIR --help lists its options",
    )
    dry_run: bool = Field(default=False, description="estimate tokens, shards, disk and time; write nothing")
    json_: bool = Field(default=False, description="print one line of JSON")


class IndexOptions(IndexConfig):
    """Index WebDataset tars of token ids in place: write a manifest over them, so that they train as they are."""


class RepackOptions(RepackConfig):
    """Write a data set anew in rows of another length or packing, without tokenizing again."""

    data: Positional[str] = Field(min_length=1, description=RepackConfig.model_fields["data"].description)


def main(args: list[str]) -> None:
    """Parse the options, prepare the data set and print what it holds.

    ``repack`` as the first word is the command `bd3 prep repack`; an input of this name is written ``./repack``.

    Raises:
        ConfigError, DataError: one line for the user.
    """
    if args[:1] == ["repack"]:
        _repack(args[1:])
        return
    if any(word.partition("=")[0] == "--index" for word in args):
        _index(args)
        return
    options = parse_options(PrepOptions, args, "bd3 prep")
    config = PrepConfig(**options.model_dump(exclude={"dry_run", "index", "json_"}))
    if options.dry_run:
        from data_prep.build.estimate import estimate

        show("\n".join(map(printable, estimate(config).lines())))
        return
    listing = find(config.inputs)
    manifest = prep(config, lambda line: show(line, sys.stderr), listing)
    if manifest is None:
        return
    if options.json_:
        print(json_line(as_json(config.out, manifest, listing)))
    else:
        _print(config.out, manifest)


def as_json(folder: str, manifest: Manifest, listing: Listing) -> dict[str, Any]:
    """Results for ``--json``: of the documents, ``read + left_out + rejected = all``."""
    return {
        "folder": folder,
        "length": manifest.length,
        "vocab_size": manifest.vocab_size,
        "files": len(listing.sources),
        "passed_over": [asdict(known) for known in listing.passed_over],
        "documents": totals(manifest),
        "left_out": manifest.skipped,
        "nul": {"characters": manifest.nul_characters, "documents": manifest.nul_documents},
        "splits": {
            name: {"documents": split.documents, "rows": split.rows, "tokens": split.tokens}
            for name, split in manifest.splits.items()
        },
    }


def _index(args: list[str]) -> None:
    options = parse_options(IndexOptions, args, "bd3 prep")
    _print(options.index, index_folder(options, lambda line: show(line, sys.stderr)))


def _repack(args: list[str]) -> None:
    options = parse_options(RepackOptions, args, "bd3 prep repack")
    config = RepackConfig(**options.model_dump())
    _print(config.out, repack(config, lambda line: show(line, sys.stderr)))


def _print(folder: str, manifest: Manifest) -> None:
    show(f"{printable(folder)}: {manifest.length} tokens per row, vocabulary {manifest.vocab_size:,}")
    for name, split in manifest.splits.items():
        print(f"  {name}: {split.documents:,} documents, {split.rows:,} rows, {split.tokens:,} tokens")
