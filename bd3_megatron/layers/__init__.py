"""Layer specs (Megatron's own or Transformer Engine's), FP8 state, and the head with its cross-entropy."""
