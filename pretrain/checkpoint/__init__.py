"""Checkpoints: sharded state dicts on disk, written in the background, complete or absent."""
