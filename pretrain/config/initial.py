"""The shape of a model whose first weights come from another run or checkpoint (`bd3 pretrain --init`)."""

from __future__ import annotations

from pathlib import Path

from bd3_common.errors import ConfigError
from bd3_megatron.config import ModelConfig
from pretrain.config import CONFIG_FILE

_OWN = {"length", "dropout", "init_std", "vocab_size", "mask_id", "bos_id", "eos_id", "pad_id"}
"""keys that a run decides for itself, or its data"""


def split_step(init: str) -> tuple[str, int | None]:
    """Folder and step of ``RUN@STEP``; the step is None without one."""
    path, sign, step = init.rpartition("@")
    if sign and step.isascii() and step.isdecimal() and not Path(init).exists():
        return path, int(step)
    return init, None


def is_run(path: str) -> bool:
    """True for a run folder, false for a Hugging Face folder.

    Raises:
        ConfigError: neither.
    """
    folder = Path(path)
    if (folder / CONFIG_FILE).is_file():
        return True
    if not (folder / "config.json").is_file() and not folder.is_file():
        raise ConfigError(
            f"init={path}: neither a run folder (no {CONFIG_FILE}) nor a Hugging Face folder (no config.json)"
        )
    return False


def shape_values(model: ModelConfig) -> dict[str, object]:
    """Values of the model's section that its weights decide."""
    return model.model_dump(mode="json", exclude=_OWN)
