"""Small models, rows and batches that the tests compute with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from bd3_megatron import backbones
from bd3_megatron.attention.mask import Streams
from bd3_megatron.config import DiffusionConfig, EngineConfig, KernelConfig, ModelConfig, OptimizationConfig, Section
from bd3_megatron.diffusion.batches import Batch, causal_batch, diffusion_batch
from bd3_megatron.diffusion.noise import SampleKeys, draw_noise
from bd3_megatron.engine.base import Engine
from bd3_megatron.engine.megatron import MegatronEngine
from bd3_megatron.hf.formats import TokenIds
from bd3_megatron.hf.formats.bd3 import hf_config
from bd3_megatron.hf.mapping import entries, to_hf
from bd3_megatron.hf.modeling_bd3 import BD3Config, BD3ForMaskedLM
from bd3_megatron.model import BlockDiffusionModel, global_name
from bd3_megatron.parallel import World

BOS, EOS, MASK, VOCABULARY = 0, 1, 40, 41
BACKBONES = ("qwen3", "dit")


def shape(backbone: str = "qwen3", **changes) -> ModelConfig:
    """Two layers of 32 over rows of 16 tokens; grouped queries where the backbone has them."""
    grouped = {"kv_heads": 2} if backbones.BACKBONES.instance(backbone).grouped_queries else {}
    sizes = {"layers": 2, "hidden": 32, "heads": 4, "length": 16, "vocab_size": VOCABULARY}
    ids = {"mask_id": MASK, "bos_id": BOS, "eos_id": EOS}
    return ModelConfig(**{"backbone": backbone, **sizes, **ids, **grouped, **changes})


def config(
    model: ModelConfig, diffusion: DiffusionConfig, precision: str = "fp32", **sections: Section
) -> EngineConfig:
    """What an engine of the model is built from, in fp32 unless stated."""
    sections = {"optimization": OptimizationConfig(precision=precision), **sections}
    return EngineConfig(model=model, diffusion=diffusion, **sections)


def weights_of(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under Megatron names, every norm and bias included."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {entry.name: torch.randn(entry.shape, generator=generator) for entry in entries(model)}
    return {name: 0.2 * x + name.endswith("norm.weight") for name, x in drawn.items()}


def build(
    model: ModelConfig,
    diffusion: DiffusionConfig,
    weights: Mapping[str, Tensor],
    kernels: KernelConfig | None = None,
    bf16: bool = False,
) -> BlockDiffusionModel:
    """The model that is trained, with these weights."""
    network = BlockDiffusionModel(
        config(model, diffusion, "bf16" if bf16 else "fp32", kernels=kernels or KernelConfig())
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(weights[global_name(name, network)])
    return network


def engine(world: World, model: ModelConfig, diffusion: DiffusionConfig, seed: int = 0, **options) -> MegatronEngine:
    """A training engine with random weights; ``options`` of the optimizer, in fp32 unless they say otherwise."""
    optimization = OptimizationConfig(**{"precision": "fp32", **options})
    made = MegatronEngine(config(model, diffusion, optimization=optimization), world)
    made.set_weights(weights_of(model, seed))
    return made


def state(engine: Engine) -> dict[str, Tensor]:
    """The live tensors of an engine's state, in a world of one: each lies in one chunk."""
    return {name: chunk.data for name, sharded in engine.state().items() for (chunk,) in [sharded.chunks]}


def oracle(model: ModelConfig, diffusion: DiffusionConfig, weights: Mapping[str, Tensor]) -> BD3ForMaskedLM:
    """The model in plain torch, with the same weights."""
    tokens = TokenIds(model.bos_id, model.eos_id, model.mask_id)
    network = BD3ForMaskedLM(BD3Config(**hf_config(model, diffusion, tokens, torch.float32)))
    missing, unknown = network.load_state_dict(to_hf(weights, model), strict=False)
    assert not unknown
    assert missing == (["lm_head.weight"] if model.tie_embeddings else [])
    return network.eval()


def rows_of(model: ModelConfig, count: int, seed: int = 0) -> np.ndarray:
    """Clean rows ``[count, L]``: BOS, then any token but BOS, EOS and the mask."""
    rows = np.random.default_rng(seed).integers(2, MASK, (count, model.length))
    rows[:, 0] = BOS
    return rows


def documents_of(model: ModelConfig, count: int, seed: int = 0) -> np.ndarray:
    """Document ``[count, L]`` of each position: two or more in a row, at other places in each, inside blocks too."""
    starts = np.random.default_rng(seed).random((count, model.length)) < 3 / model.length
    starts[np.arange(count), model.length // 3 + np.arange(count) % 4] = True
    return starts.cumsum(1) + 100 * np.arange(count)[:, None]


def batch_of(
    model: ModelConfig, diffusion: DiffusionConfig, count: int, seed: int = 0, documents: np.ndarray | None = None
) -> Batch:
    """A micro-batch of random rows with the noise of step 0."""
    rows = rows_of(model, count, seed)
    if diffusion.objective == "causal":
        return causal_batch(rows, documents)
    number = np.arange(count)
    keys = SampleKeys(np.zeros_like(number), number, number, batch=0, batch_rows=count)
    noise = draw_noise(diffusion, model.length, seed, keys)
    return diffusion_batch(rows, noise, model.mask_id, Streams.of(diffusion, model.length), documents)
