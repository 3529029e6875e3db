"""Block diffusion language models on Megatron-core: the model, its objective and what shards it."""
