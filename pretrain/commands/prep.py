"""`bd3 prep`: text to a data set, or an index of existing token tars."""

from __future__ import annotations

import sys

from pydantic import Field

from data_prep.build.index import index_folder
from data_prep.build.plan import PrepConfig
from data_prep.build.prep import prep
from data_prep.build.token_tar import IndexConfig
from data_prep.format.manifest import Manifest
from pretrain.config.command_line import Positional, parse_options


class PrepOptions(PrepConfig):
    """Tokenize text, cut it into rows and write them as WebDataset shards."""

    inputs: Positional[tuple[str, ...]] = Field(min_length=1, description=PrepConfig.model_fields["inputs"].description)
    index: str | None = Field(
        default=None,
        description="folder of WebDataset tars of token ids to index in place, "
        "instead of preparing text; bd3 prep --index DIR --help lists its options",
    )
    dry_run: bool = Field(default=False, description="estimate tokens, shards, disk and time; write nothing")


class IndexOptions(IndexConfig):
    """Index WebDataset tars of token ids in place: write a manifest over them, so that they train as they are."""


def main(args: list[str]) -> None:
    """Parse the options, prepare the data set and print what it holds.

    Raises:
        ConfigError, DataError: one line for the user.
    """
    if any(word.partition("=")[0] == "--index" for word in args):
        _index(args)
        return
    options = parse_options(PrepOptions, args, "bd3 prep")
    config = PrepConfig(**options.model_dump(exclude={"dry_run", "index"}))
    if options.dry_run:
        from data_prep.build.estimate import estimate

        print("\n".join(estimate(config).lines()))
        return
    manifest = prep(config, lambda line: print(line, file=sys.stderr, flush=True))
    if manifest is None:
        return
    _print(config.out, manifest)


def _index(args: list[str]) -> None:
    options = parse_options(IndexOptions, args, "bd3 prep")
    _print(options.index, index_folder(options, lambda line: print(line, file=sys.stderr, flush=True)))


def _print(folder: str, manifest: Manifest) -> None:
    print(f"{folder}: {manifest.length} tokens per row, vocabulary {manifest.vocab_size:,}")
    for name, split in manifest.splits.items():
        print(f"  {name}: {split.documents:,} documents, {split.rows:,} rows, {split.tokens:,} tokens")
