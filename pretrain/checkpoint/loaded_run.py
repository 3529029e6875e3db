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
from bd3_megatron.hf.files import LazyTensors
from bd3_megatron.hf.formats import TokenIds
from bd3_megatron.hf.mapping import check_depth, check_shapes, entries
from pretrain.checkpoint.clip_state import read_clip_state
from pretrain.checkpoint.folder import Checkpoint
from pretrain.checkpoint.reader import find_checkpoint, open_weights
from pretrain.config.checkpoint_options import CheckpointOptions
from pretrain.config.resolve import load_saved
from pretrain.config.schema import RunConfig
from pretrain.run_folder import layout


@dataclass(frozen=True)
class OpenRun:
    """A run folder and one of its checkpoints, whose weights are read when they are asked for."""

    path: Path
    config: RunConfig
    checkpoint: Checkpoint
    weights: LazyTensors

    @property
    def tokens(self) -> TokenIds:
        """Special tokens of the model."""
        model = self.config.model
        return TokenIds(model.bos_id, model.eos_id, model.mask_id, model.pad_id)

    @property
    def tokenizer(self) -> Path | None:
        """The run's ``tokenizer.json``, if it has one."""
        path = self.path / layout.TOKENIZER
        return path if path.is_file() else None


def open_run(run: Path, step: int | None = None, averaged: bool = True) -> OpenRun:
    """Open a run folder; its configuration has the clip interval that was trained on at the checkpoint.

    Raises:
        ConfigError: not a run folder, no such checkpoint, or one of another model than the configuration's.
    """
    config_file = run / layout.CONFIG
    if not config_file.is_file():
        raise ConfigError(
            f"{run}: not a run folder ({layout.CONFIG} is missing); give the folder that bd3 pretrain wrote"
        )
    config = load_saved(config_file)
    found = find_checkpoint(run, step)
    diffusion, _ = read_clip_state(config, found.meta)
    config = config.model_copy(update={"diffusion": diffusion})
    if config.model.mask_id is None:
        raise ConfigError(f"{config_file}: model.mask_id=null: set it to the id the model was trained with")
    weights = open_weights(found, averaged)
    try:
        check_depth(weights, config.model)
        check_shapes(weights, {entry.name: entry.shape for entry in entries(config.model)})
    except ConfigError as error:
        raise ConfigError(f"{config_file}: {error}") from None
    return OpenRun(run, config, found, weights)


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
    """Read a run folder with all weights; errors as :func:`open_run`."""
    found = open_run(run, step, averaged)
    return LoadedRun(found.config, found.checkpoint, dict(found.weights))
