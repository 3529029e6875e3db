"""Llama's causal models, and others of the same class."""

from __future__ import annotations

from typing import ClassVar

from bd3_megatron.hf.formats._causal import CausalFormat


class LlamaFormat(CausalFormat):
    """Folders that ``transformers`` serves as LlamaForCausalLM (arXiv 2302.13971)."""

    model_type: ClassVar[str] = "llama"
    backbone: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
