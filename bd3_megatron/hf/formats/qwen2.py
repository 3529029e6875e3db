"""Qwen2's and Qwen2.5's dense causal models."""

from __future__ import annotations

from typing import ClassVar

from bd3_megatron.hf.formats._causal import CausalFormat


class Qwen2Format(CausalFormat):
    """Folders that ``transformers`` serves as Qwen2ForCausalLM (arXiv 2407.10671)."""

    model_type: ClassVar[str] = "qwen2"
    backbone: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"
