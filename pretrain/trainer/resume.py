"""Resume: the checkpoint to continue from, and the configuration keys that may change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bd3_common.errors import ConfigError
from bd3_megatron.parallel import World
from data_prep.read.stream import RowStream
from pretrain.checkpoint.folder import Checkpoint, folders
from pretrain.checkpoint.reader import newest_on_all_ranks
from pretrain.config.resolve import load_saved
from pretrain.config.schema import RunConfig
from pretrain.distributed.collective_errors import mark_collective
from pretrain.distributed.collectives import on_rank_0
from pretrain.run_folder import layout
from pretrain.run_folder.data import data_identity, order_seed
from pretrain.trainer.stability import check_skips, read_ranges, undone

# Keys that may change on resume: length, machine, layout and logs. A decaying learning rate depends on train.steps, so
# extending a run changes the rate of the remaining steps. All kernels compute the same function up to rounding, which
# is coarser with FP8, and another machine may lack some of them. guard.skip may change for future steps only
# (pretrain.trainer.stability.check_skips).
_FREE = ("run", "parallel", "zero", "kernels", "fp8", "log", "profile", "preflight", "eval", "checkpoint")
_FREE += ("guard", "train.steps", "train.micro_batch", "data.path", "data.cache", "data.cache_gb", "data.verify_gb")


def check_same_run(run: Path, config: RunConfig) -> None:
    """Check that the run in the folder was started with this configuration.

    Raises:
        ConfigError: names the first key that differs, with both values.
    """
    if not (run / layout.CONFIG).is_file():
        if (run / layout.CHECKPOINTS).exists():
            raise ConfigError(f"run={run}: has checkpoints but no {layout.CONFIG}; put it back or use another --run")
        return
    before, now = (_comparable(found) for found in (load_saved(run / layout.CONFIG), config))
    for path, old, new in _differences(before, now):
        if not any(path == free or path.startswith(free + ".") for free in _FREE):
            raise ConfigError(f"{path}={new}: the run in {run} was started with {old}; use that, or another --run")


def _comparable(config: RunConfig) -> dict[str, Any]:
    """Values of the configuration to compare; for a mix only the weights, because data sets may be moved."""
    values = config.model_dump()
    if config.data.mix is not None:
        values["data"]["mix"] = list(config.data.mix.values())
    return values


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""):
    for key, old in before.items():
        new = now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new


def position(config: RunConfig, step: int, stream: RowStream) -> dict[str, Any]:
    """Position in the data after ``step`` steps, which determines rows and noise of all later steps on any layout.

    ``data_positions`` is the number of rows read of each data set.
    """
    rows, data = step * config.train.global_batch, config.data
    return {
        "rows": rows,
        "data_positions": stream.positions(rows),
        "order": f"lanes {data.lanes}" if data.order == "lanes" else data.order,
        "seed": config.train.seed,
        "order_seed": order_seed(config),
        "beta": config.diffusion.beta,
        "omega": config.diffusion.omega,
    }


def _named(config: RunConfig) -> str:
    data = config.data
    return f"data.path={data.path}" if data.mix is None else f"data.mix={' '.join(data.mix)}"


def checkpoint_to_resume(run: Path, config: RunConfig, stream: RowStream, world: World) -> Checkpoint | None:
    """The newest complete checkpoint, or None for a new run.

    Raises:
        ConfigError: no checkpoint is complete, or it has other data or another position than the configuration; on all
            ranks.
    """
    left_out = on_rank_0(lambda: read_ranges(run))
    found = newest_on_all_ranks(
        run,
        world,
        usable=lambda step, meta: not undone(left_out, step, meta),
    )
    if found is None:
        if on_rank_0(lambda: folders(run)):
            raise mark_collective(
                ConfigError(
                    f"{run / layout.CHECKPOINTS}: none is complete; put one back, or start again with another --run"
                )
            )
        return None
    data = data_identity(*stream.manifests)
    if found.meta.get("data", data) != data:
        raise mark_collective(
            ConfigError(
                f"{_named(config)}: not the data {found.path} was trained on; "
                f"use the data set of the run, or another --run"
            )
        )
    for name, value in position(config, found.step, stream).items():
        if found.meta.get(name, value) != value:
            raise mark_collective(
                ConfigError(
                    f"{found.path}: written with {name} {found.meta[name]}, the configuration gives {value}; "
                    f"use the configuration the run was started with"
                )
            )
    on_rank_0(lambda: check_skips(run, config.guard, found.step))
    return found
