"""The training loop and the `bd3` commands."""

# Before any command imports Megatron-core, because it quiets the warnings of that import.
import bd3_megatron as bd3_megatron
