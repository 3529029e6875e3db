"""The one error of this room that a user is meant to read."""

from __future__ import annotations


class DataError(ValueError):
    """Something is wrong with the data or its place; the text is one line: what, where, value, remedy."""
