"""Resume: the checkpoint to continue from, and the configuration keys that may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_common.errors import ConfigError
from bd3_common.text import shorten
from bd3_megatron.parallel import World
from data_prep.read.stream import RowStream
from pretrain.checkpoint.folder import Checkpoint, folders
from pretrain.checkpoint.owner import identity_of
from pretrain.checkpoint.reader import newest_on_all_ranks
from pretrain.config.resolve import absent_values, load_saved
from pretrain.config.schema import RESUMABLE, RunConfig
from pretrain.config.values import Layer, build
from pretrain.conversion.initial import InitialWeights, open_initial
from pretrain.distributed.collective_errors import mark_collective
from pretrain.distributed.collectives import on_rank_0, raise_on_all_ranks
from pretrain.run_folder import layout
from pretrain.run_folder.data import data_identity, order_seed, same_data
from pretrain.run_folder.identity import Identity
from pretrain.run_folder.prepare import contents
from pretrain.trainer.stability import check_skips, read_ranges, undone

# Keys that may change on resume: machine, layout and logs. All kernels compute the same function up to rounding, which
# is coarser with FP8, and another machine may lack some of them. guard.skip may change for future steps only
# (pretrain.trainer.stability.check_skips).
_MAY_CHANGE: tuple[str, ...] = (
    "run",
    "resume",
    "parallel",
    "zero",
    "kernels",
    "fp8",
    "log",
    "profile",
    "preflight",
    "eval",
)
_MAY_CHANGE += ("init", "init_weights", "checkpoint", "guard", "train.micro_batch")
_MAY_CHANGE += ("data.path", "data.cache", "data.cache_gb", "data.verify_gb")


@dataclass(frozen=True)
class Beginning:
    """Where a job begins.

    Attributes:
        checkpoint: to continue from; None for a new run.
        identity: of the run.
        seen: listing of the run folder at the time of the decision (:func:`pretrain.run_folder.prepare.contents`).
        initial: weights that a new run begins with; None: random ones.
    """

    checkpoint: Checkpoint | None
    identity: Identity
    seen: list[str]
    initial: InitialWeights | None = None

    @property
    def step(self) -> int:
        """Steps done."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def meta(self) -> dict[str, Any]:
        """Metadata of the checkpoint."""
        return {} if self.checkpoint is None else self.checkpoint.meta


def settings(config: RunConfig) -> dict[str, Any]:
    """Values of the configuration that decide the weights, as nested plain values for a checkpoint's meta.

    For a mix only the weights of the data sets, because they may be moved; their content has an identity of its own.
    """
    values = config.model_dump(mode="json")
    if config.data.mix is not None:
        values["data"]["mix"] = list(config.data.mix.values())
    return _deciding_weights(values)


def _deciding_weights(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        if f"{prefix}{key}" not in _MAY_CHANGE:
            found[key] = _deciding_weights(value, f"{prefix}{key}.") if isinstance(value, dict) else value
    return found


def check_same_run(run: Path, config: RunConfig, recorded: Mapping[str, Any] | None = None) -> None:
    """Check that the run in the folder was started with this configuration.

    Args:
        recorded: :func:`settings` in the meta of its checkpoint; None: compare with the folder's configuration file.

    Raises:
        ConfigError: names the first key that differs, with both values.
    """
    if not (run / layout.CONFIG).is_file():
        if (run / layout.CHECKPOINTS).exists():
            raise ConfigError(f"run={run}: has checkpoints but no {layout.CONFIG}; put it back or use another --run")
        return
    before = settings(load_saved(run / layout.CONFIG)) if recorded is None else recorded
    constant = config.train.decay == "constant"  # then the rate does not depend on train.steps
    for path, old, new in _differences(before, settings(config), settings(_before_new_keys())):
        if path in config.resume.allow or (path == "train.steps" and constant):
            continue
        problem = f"{path}={shorten(new)}: the run in {run} was started with {shorten(old)}"
        if path not in RESUMABLE:
            raise ConfigError(f"{problem}; use that, or another --run")
        if path == "train.steps":
            problem += ", where its learning rate reaches its minimum"
        raise ConfigError(f"{problem}; use that, another --run, or --resume.allow {path.replace('_', '-')}")


def _before_new_keys() -> RunConfig:
    """The configuration that a file without any key means."""
    return build(RunConfig, [Layer(absent_values(RunConfig))])


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Path and both values of each key that differs; a key that did not exist yet had its value of then."""
    for key, new in now.items():
        default = defaults.get(key)
        old = before.get(key, default)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, default if isinstance(default, dict) else {}, f"{prefix}{key}.")
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


def find_beginning(run: Path, config: RunConfig, stream: RowStream, world: World) -> Beginning:
    """The newest complete checkpoint of the run in the folder, or the beginning of a new run.

    Raises:
        ConfigError: no checkpoint is complete, or the run has other data, another position or other values than the
            configuration, or the weights to begin with are not there or of another shape; on all ranks.
    """
    seen = on_rank_0(lambda: contents(run))
    left_out = on_rank_0(lambda: read_ranges(run))
    found = newest_on_all_ranks(
        run,
        world,
        usable=lambda step, meta: not undone(left_out, step, meta),
    )
    if found is None and on_rank_0(lambda: len(folders(run))):
        raise mark_collective(
            ConfigError(
                f"{run / layout.CHECKPOINTS}: none is complete; put one back, or start again with another --run"
            )
        )
    recorded = None if found is None else _recorded_settings(found)
    on_rank_0(lambda: check_same_run(run, config, recorded))
    if found is None:
        initial = None if config.init is None else raise_on_all_ranks(lambda: open_initial(config))
        new = Identity(id=on_rank_0(lambda: Identity().id), parents=[] if initial is None else initial.parents)
        return Beginning(None, new, seen, initial)
    if not same_data(found.meta.get("data", data_identity(*stream.manifests)), *stream.manifests):
        raise mark_collective(
            ConfigError(
                f"{_named(config)}: not the data {found.path} was trained on; "
                f"use the data set of the run, or another --run"
            )
        )
    for name, value in position(config, found.step, stream).items():
        if name in ("beta", "omega") and config.clip_search.every:
            continue  # the search has moved them
        if found.meta.get(name, value) != value:
            raise mark_collective(
                ConfigError(
                    f"{found.path}: written with {name} {found.meta[name]}, the configuration gives {value}; "
                    f"use the configuration the run was started with"
                )
            )
    on_rank_0(lambda: check_skips(run, config.guard, found.step))
    return Beginning(found, Identity(**on_rank_0(lambda: identity_of(run).model_dump())), seen)


def _recorded_settings(found: Checkpoint) -> dict[str, Any] | None:
    recorded = found.meta.get("settings")
    if recorded is None or isinstance(recorded, dict):
        return recorded
    raise mark_collective(ConfigError(f"{found.path}: its settings are {shorten(recorded)}, not keys with values"))
