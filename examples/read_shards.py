"""Read the shards that `bd3 prep` wrote with plain webdataset: any WebDataset reader opens them.

python examples/read_shards.py data
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset
from tokenizers import Tokenizer


def rows(data: str, split: str = "train") -> Iterator[np.ndarray]:
    """Rows of token ids ``[L]``, in the order of the shards."""
    shards = sorted(str(path) for path in Path(data, split).glob("*.tar"))
    # Decoded by hand: webdataset's own decoders would also unpickle what a foreign tar may hold.
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        yield from np.load(io.BytesIO(sample["tokens.npy"]), allow_pickle=False)  # [rows, L]


def main(data: str) -> None:
    """Print the first rows as text."""
    tokenizer = Tokenizer.from_file(str(Path(data, "tokenizer.json")))
    for _, row in zip(range(3), rows(data)):
        print(tokenizer.decode(row.tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
