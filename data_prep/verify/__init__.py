"""Verification of data sets: damage, duplicate rows, counts."""
