"""The training loop and the `bd3` commands."""
