"""Repacking of data sets: rows of another length or packing from the token ids of finished ones."""
