"""Qwen3's dense causal models."""

from __future__ import annotations

from typing import ClassVar

from bd3_megatron.hf.formats._causal import CausalFormat


class Qwen3Format(CausalFormat):
    """Folders that ``transformers`` serves as Qwen3ForCausalLM (arXiv 2505.09388)."""

    model_type: ClassVar[str] = "qwen3"
    backbone: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    default_head_dim: ClassVar[int | None] = 128  # of transformers' configuration class
