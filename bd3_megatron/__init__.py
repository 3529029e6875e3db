"""Block diffusion language models on Megatron-core: the model, its objective and what shards it."""

import logging
import warnings

# Megatron-core warns at import about every optional accelerator package it does not find. Which kernels run here is
# decided in layers.py, so these lines would only hide what matters on a user's terminal.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
# It also calls collectives by the names that newer torch deprecates.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
# Newer releases log once per layer how a layer specification or the gradient buffers could be given otherwise.
for _module in ("transformer.transformer_layer", "distributed.distributed_data_parallel"):
    logging.getLogger(f"megatron.core.{_module}").setLevel(logging.ERROR)
