"""Configuration of an SDAR model: Qwen3's, with blocks.

This file ships with exports; it needs transformers 4.51 or later.
"""

from __future__ import annotations

from transformers import Qwen3Config


class SDARConfig(Qwen3Config):
    """Shape of a block diffusion model with Qwen3's layers.

    Args:
        block_size: tokens of a block, which see each other and all blocks before.
        mask_token_id: id of the token that stands where one is to be predicted.
        unused_ids: ranges ``[first, end)`` of ids that no token has; the decoding of ``modeling_sdar.py`` leaves them
            out, engines do not know them.
    """

    model_type = "sdar"

    def __init__(self, block_size: int = 4, mask_token_id: int = 151669, unused_ids: list | None = None, **kwargs):
        # transformers 5 reads special ids from the keywords, 4 sets attributes after.
        super().__init__(**kwargs)
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.unused_ids = unused_ids or []
