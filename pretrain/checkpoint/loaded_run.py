"""A trained run: its configuration and the weights of one checkpoint, for the commands after training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_megatron import parallel
from bd3_megatron.attention.backends import portable
from bd3_megatron.config import Fp8Config, ParallelConfig, ZeroConfig
from bd3_megatron.engine.megatron import MegatronEngine
from bd3_megatron.hf.mapping import check_depth, check_shapes, entries
from pretrain.checkpoint.clip_state import read_clip_state
from pretrain.checkpoint.folder import Checkpoint
from pretrain.checkpoint.reader import find_checkpoint, read_weights
from pretrain.config.checkpoint_options import CheckpointOptions
from pretrain.config.resolve import load_saved
from pretrain.config.schema import RunConfig
from pretrain.run_folder.layout import CONFIG


@dataclass
class LoadedRun:
    """A run's configuration and one checkpoint's weights."""

    config: RunConfig
    checkpoint: Checkpoint
    weights: dict[str, Tensor]

    @contextmanager
    def engine(self, changed: RunConfig | None = None) -> Iterator[MegatronEngine]:
        """The model with these weights, ready to evaluate or sample, in a world of 1; leaving the context ends it.

        Args:
            changed: configuration to use instead of the run's, with the same shapes.
        """
        config = (changed or self.config).engine()
        # This machine may have no GPU, though the run was trained on one. FP8 is for training: here it is bf16.
        attention = portable(config.kernels.attention)
        kernels = config.kernels.model_copy(update={"layers": "auto", "attention": attention})
        config = config.replace(kernels=kernels, parallel=ParallelConfig(), zero=ZeroConfig(), fp8=Fp8Config())
        world = parallel.start(config.parallel)
        try:
            engine = MegatronEngine(config, world, training=False)
            engine.set_weights(self.weights)
            yield engine
        finally:
            parallel.stop()


def load_chosen(options: CheckpointOptions) -> LoadedRun:
    """Read the checkpoint that a command's options choose.

    Raises:
        ConfigError: as :func:`load_run`.
    """
    return load_run(Path(options.run), options.step, averaged=options.weights == "ema")


def load_run(run: Path, step: int | None = None, averaged: bool = True) -> LoadedRun:
    """Read a run folder; its configuration has the clip interval that was trained on at the checkpoint.

    Raises:
        ConfigError: not a run folder, no such checkpoint, or one of another model than the configuration's.
    """
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run}: not a run folder ({CONFIG} is missing); give the folder that bd3 pretrain wrote")
    config = load_saved(run / CONFIG)
    found = find_checkpoint(run, step)
    diffusion, _ = read_clip_state(config, found.meta)
    config = config.model_copy(update={"diffusion": diffusion})
    if config.model.mask_id is None:
        raise ConfigError(f"{run / CONFIG}: model.mask_id=null: set it to the id the model was trained with")
    weights = read_weights(found, averaged)
    try:
        check_depth(weights, config.model)
        check_shapes(weights, {entry.name: entry.shape for entry in entries(config.model)})
    except ConfigError as error:
        raise ConfigError(f"{run / CONFIG}: {error}") from None
    return LoadedRun(config, found, weights)
