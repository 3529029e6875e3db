"""Cases that one fixture computes together: those of this session alone, without the long ones in `make test`."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def with_long(cases: Iterable[tuple], long: Iterable[tuple]) -> list:
    """Parameters of ``cases``; those among ``long`` are marked so."""
    long, cases = set(long), list(cases)
    assert long <= set(cases)
    return [pytest.param(*case, marks=pytest.mark.long if case in long else ()) for case in cases]


def collected(request: pytest.FixtureRequest, *names: str) -> set[tuple]:
    """Values of the parameters ``names`` over the tests of the fixture's module that will run."""
    found = set()
    for item in request.session.items:
        params = getattr(item, "callspec", None) and item.callspec.params
        if item.path == request.path and params and set(names) <= params.keys():
            found.add(tuple(params[name] for name in names))
    return found
