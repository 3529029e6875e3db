"""`bd3 config`: print the resolved configuration as YAML."""

from __future__ import annotations

from bd3_megatron.layout import split_layers
from pretrain.config.resolve import ShowOptions, resolve, to_yaml


def main(args: list[str]) -> None:
    """``bd3 config``: print the resolved configuration."""
    config, options = resolve(ShowOptions, args, "bd3 config")
    model, parallel = config.model, config.parallel
    if model.vocab_size is not None:
        print(f"# parameters: {model.parameters(model.vocab_size):,}")
    if options.world_size is not None:
        tensor, pipeline, context = parallel.tensor, parallel.pipeline, parallel.context
        data = options.world_size // (tensor * pipeline * context)
        print(
            f"# ranks: {options.world_size} = tensor {tensor} x context {context} x pipeline {pipeline} x data {data}"
        )
    if parallel.pipeline > 1:
        stages = parallel.pipeline * parallel.interleave
        counts = split_layers(model.layers, stages, parallel.embedding_weight, parallel.head_weight)
        kind = "virtual stage" if parallel.interleave > 1 else "stage"
        print(f"# layers per {kind}: {', '.join(map(str, counts))}")
    print(to_yaml(config), end="")
