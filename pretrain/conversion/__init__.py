"""Checkpoints of a run to and from other formats, and run folders made of them."""
