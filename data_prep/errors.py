"""The user error of data preparation and reading."""

from __future__ import annotations

from bd3_common.errors import UserError


class DataError(UserError):
    """Something is wrong with the data or its place; the text is one line: what, where, value, remedy."""
