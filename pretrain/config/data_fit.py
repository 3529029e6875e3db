"""Fit of a model's configuration to a data set: row length, vocabulary and special ids."""

from __future__ import annotations

from bd3_common.errors import ConfigError
from bd3_megatron.config import ModelConfig
from data_prep.format.manifest import Manifest


def resolve_model(model: ModelConfig, manifest: Manifest, path: str) -> ModelConfig:
    """Fill vocabulary and special ids from the data set, and check them where the model states them.

    Raises:
        ConfigError: model and data set contradict each other.
    """
    if model.length != manifest.length:
        raise ConfigError(
            f"model.length={model.length}: the rows of {path} have {manifest.length} tokens; "
            f"use model.length={manifest.length} for a new run, or bd3 prep repack with --length {model.length}"
        )
    decided = {}
    for name in ("vocab_size", "mask_id", "bos_id", "eos_id"):
        stated, there = getattr(model, name), getattr(manifest, name)
        if stated is not None and stated != there and name != "vocab_size":
            raise ConfigError(f"model.{name}={stated}: {path} has {there}; leave model.{name} null to follow the data")
        if name == "vocab_size" and stated is not None and stated < there:
            raise ConfigError(
                f"model.vocab_size={stated}: {path} has {there} ids; use {there} or more, or leave it null"
            )
        decided[name] = there if stated is None else stated
    decided["pad_id"] = manifest.pad_id if model.pad_id is None else model.pad_id  # no row has it
    return ModelConfig(**model.model_dump() | decided)
