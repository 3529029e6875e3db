"""Sampling: decoding algorithms, the state of a block, the cache of finished blocks, and the loop over blocks."""
