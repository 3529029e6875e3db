"""`bd3 prep`: text to a data set, from the command line."""

from __future__ import annotations

import sys

from pydantic import Field

from data_prep.build.plan import PrepConfig
from data_prep.build.prep import prep
from pretrain.config.command_line import Positional, parse_options


class PrepOptions(PrepConfig):
    """Tokenize text, cut it into rows and write them as WebDataset shards."""

    inputs: Positional[tuple[str, ...]] = Field(min_length=1, description=PrepConfig.model_fields["inputs"].description)
    dry_run: bool = Field(
        default=False, description="estimate tokens, shards, disk and time from a sample; write nothing"
    )


def main(args: list[str]) -> None:
    """Parse the options, prepare the data set and print what it holds.

    Raises:
        ConfigError, DataError: one line for the user.
    """
    options = parse_options(PrepOptions, args, "bd3 prep")
    config = PrepConfig(**options.model_dump(exclude={"dry_run"}))
    if options.dry_run:
        from data_prep.build.estimate import estimate

        print("\n".join(estimate(config).lines()))
        return
    manifest = prep(config, lambda line: print(line, file=sys.stderr, flush=True))
    if manifest is None:
        return
    print(f"{config.out}: {manifest.length} tokens per row, vocabulary {manifest.vocab_size:,}")
    for name, split in manifest.splits.items():
        print(f"  {name}: {split.documents:,} documents, {split.rows:,} rows, {split.tokens:,} tokens")
