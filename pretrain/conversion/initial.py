"""Weights that a new run begins with: those of another run, or of a Hugging Face folder (`bd3 pretrain --init`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bd3_common.atomic import atomic_file
from bd3_common.errors import ConfigError
from bd3_megatron.config import ModelConfig
from bd3_megatron.engine.base import Engine
from bd3_megatron.hf.mapping import Weights, check_depth, check_shapes, entries
from bd3_megatron.hf.origin import Origin, read_origin, write_origin
from pretrain.checkpoint.loaded_run import open_run
from pretrain.checkpoint.reader import fill_weights, weights_section
from pretrain.checkpoint.stored import StoredTensors
from pretrain.config.initial import is_run, split_step
from pretrain.config.schema import RunConfig
from pretrain.config.source_tokens import ImportChoices
from pretrain.conversion.convert import open_import
from pretrain.run_folder import layout
from pretrain.run_folder.identity import META_KEY


@dataclass(frozen=True)
class InitialWeights:
    """Weights from outside.

    Attributes:
        parents: as in :class:`pretrain.run_folder.identity.Identity`.
        fill: puts them into an engine, as weights and EMA; every rank calls it.
        origin: what the new run keeps for exports.
    """

    parents: list[str]
    fill: Callable[[Engine], None]
    origin: Origin | None

    def keep(self, run: Path) -> None:
        """Write what the new run keeps for exports into its folder.

        Raises:
            OSError: it cannot be written.
        """
        if self.origin is not None:
            with atomic_file(run / layout.ORIGIN) as temporary:
                temporary.unlink()
                write_origin(temporary, self.origin)


def open_initial(config: RunConfig) -> InitialWeights:
    """Open the weights that ``config.init`` names.

    Raises:
        ConfigError: there are none, or they are of another shape than the configuration's model.
    """
    assert config.init is not None
    where = f"init={config.init}"
    path, step = split_step(config.init)
    if is_run(path):
        run = open_run(Path(path), step, config.init_weights == "ema")
        _check_shape(run.weights, run.config.model, config.model, where)
        run_id = run.checkpoint.meta.get(META_KEY)

        def fill(engine: Engine) -> None:
            stored = StoredTensors(run.checkpoint)
            fill_weights(stored, engine.state(), weights_section(stored, config.init_weights == "ema"))
            engine.loaded(0)

        parents = [f"run:{run_id}"] if run_id else [f"run folder {run.path.name}, step {run.checkpoint.step}"]
        return InitialWeights(parents, fill, read_origin(run.path / layout.ORIGIN))
    found = open_import(Path(path), ImportChoices())
    _check_shape(found.weights, found.model, config.model, where)
    return InitialWeights(found.parents, lambda engine: engine.set_weights(found.weights), found.origin)


def _check_shape(weights: Weights, theirs: ModelConfig, model: ModelConfig, where: str) -> None:
    """Check that the weights of one model are of another one's shape, with the same mask."""
    if (theirs.vocab_size, theirs.mask_id) != (model.vocab_size, model.mask_id):
        raise ConfigError(
            f"{where}: has {theirs.vocab_size} tokens with the mask {theirs.mask_id}, the data {model.vocab_size} with "
            f"{model.mask_id}; prepare the data with its tokenizer"
        )
    try:
        check_depth(weights, model)
        check_shapes(weights, {entry.name: entry.shape for entry in entries(model)})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
