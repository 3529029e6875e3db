"""Grid of a sweep: every combination of values, with its flags and its folder's name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

from bd3_common.errors import ConfigError
from pretrain.config.schema import RunConfig
from pretrain.config.values import did_you_mean, leaves

_MOST = 10_000  # combinations


def combinations(grid: Mapping[str, str]) -> Iterator[tuple[list[str], str]]:
    """Flags and folder name of every combination: ``["--train.lr=1e-3"], "lr=1e-3"``.

    Args:
        grid: values with commas between them, by configuration key.

    Raises:
        ConfigError: an empty grid, an unknown key, or one value twice.
    """
    if not grid:
        raise ConfigError("grid: empty; give keys with their values: --grid train.lr 1e-3,3e-3 train.seed 0,1,2")
    known = leaves(RunConfig)
    choices = []
    for key, text in grid.items():
        path = key.replace("-", "_")
        if path not in known or path == "run":
            raise ConfigError(f"grid={key}: no key of the configuration{did_you_mean(path, known)}")
        values = [value for value in text.split(",") if value]
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"grid={key} {text}: give different values with commas between them")
        choices.append([(path, value) for value in values])
    if math.prod(map(len, choices)) > _MOST:
        raise ConfigError(f"grid: {math.prod(map(len, choices))} combinations; give {_MOST} or fewer")
    tails = [key.rpartition(".")[2] for key in grid]
    for pairs in itertools.product(*choices):
        names = [tail if tails.count(tail) == 1 else path for tail, (path, _) in zip(tails, pairs)]
        name = ",".join(f"{name}={value}" for name, (_, value) in zip(names, pairs))
        yield [f"--{path}={value}" for path, value in pairs], name.replace("/", "_").replace(" ", "_")
