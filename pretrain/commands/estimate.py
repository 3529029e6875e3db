"""`bd3 estimate`: memory, traffic and time of a run before it is launched; starts nothing.

Without torch, except for ``--device cpu``, which measures this machine.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from bd3_common.errors import ConfigError
from bd3_common.text import json_line, printable, show
from bd3_megatron.layout import check_layout
from data_prep.format.manifest import load_manifest
from data_prep.format.remote import is_remote
from pretrain.config.resolve import ShowOptions, resolve
from pretrain.config.schema import RunConfig, check_batches
from pretrain.estimate.devices import DEVICES, Device, device_name, this_cpu
from pretrain.estimate.prediction import Prediction
from pretrain.estimate.report import record, report_lines


class EstimateOptions(ShowOptions):
    """Predict memory, traffic and time of a run of this configuration; starts nothing. Later wins: defaults, preset,
    file, flags."""

    device: Annotated[Literal[(*DEVICES, "cpu")], BeforeValidator(device_name)] = Field(  # type: ignore[valid-type]
        default="h100-sxm",
        description="device of a rank, also by its everyday name (H100, A100, 4090); cpu measures this machine",
    )
    efficiency: float = Field(
        default=0.5, gt=0, le=1, description="assumed part of the peak that matrix products reach"
    )
    gpus_per_node: int = Field(default=8, ge=1, description="ranks that share a node and its fast links")
    json_: bool = Field(default=False, description="print one line of JSON")


def main(args: list[str]) -> None:
    """Print the prediction as tables, or as JSON."""
    config, options = resolve(EstimateOptions, args, "bd3 estimate")
    prediction = predict(config, options)
    if options.json_:
        print(json_line(record(prediction)))
    else:
        show("\n".join(map(printable, report_lines(prediction))))


def predict(config: RunConfig, options: EstimateOptions) -> Prediction:
    """The prediction for a resolved configuration.

    Raises:
        ConfigError: no vocabulary is known, layout and batch do not fit, or the device has no FP8.
    """
    config = with_vocabulary(config)
    parallel = config.parallel
    world = options.world_size or parallel.tensor * parallel.pipeline * parallel.context
    data_size = check_layout(config.engine(), world)
    check_batches(config.train, parallel, data_size)
    device: Device = this_cpu() if options.device == "cpu" else DEVICES[options.device]
    if config.fp8.enabled and device.fp8_flops is None:
        fitting = " or ".join(name for name, other in DEVICES.items() if other.fp8_flops is not None)
        raise ConfigError(
            f"fp8.enabled=true: --device={options.device} has no FP8; use fp8.enabled=false, or {fitting}"
        )
    return Prediction(config, world, data_size, device, options.efficiency, options.gpus_per_node)


def with_vocabulary(config: RunConfig) -> RunConfig:
    """The configuration with the vocabulary that the model or else its data set states.

    Raises:
        ConfigError: neither states one.
        DataError: the data set cannot be read.
    """
    if config.model.vocab_size is not None:
        return config
    folder = next((path for path in config.data.weights() if not is_remote(path)), None)
    if folder is None:
        raise ConfigError(
            "model.vocab_size=null: the size of the model depends on it; give --model.vocab-size or a local --data.path"
        )
    model = config.model.model_copy(update={"vocab_size": load_manifest(folder).vocab_size})
    return config.model_copy(update={"model": model})
