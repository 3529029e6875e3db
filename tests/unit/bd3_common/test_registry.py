"""Registries: entries of installed distributions that are broken or take a name that is there."""

from __future__ import annotations

import logging
from importlib.metadata import EntryPoint

import pytest

from bd3_common import registry as module
from bd3_common.errors import ConfigError
from bd3_common.registry import Registry
from bd3_megatron.diffusion.schedules import Schedule
from bd3_megatron.diffusion.schedules.loglinear import LogLinear


class Distribution:
    name = "other"


@pytest.fixture
def schedules(monkeypatch):
    """A registry of schedules, and what a distribution has installed for it."""
    installed: dict[str, str] = {}

    def entry_points(group: str) -> list[EntryPoint]:
        return [EntryPoint(name, value, group)._for(Distribution()) for name, value in installed.items()]

    monkeypatch.setattr(module, "entry_points", entry_points)
    # Built-in entries are looked for beside the base class.
    return Registry(Schedule, "noise schedule", "diffusion.schedule", "bd3_megatron.schedules"), installed


def test_a_broken_distribution_stops_only_what_uses_it(schedules, caplog):
    registry, installed = schedules
    installed |= {"good": "bd3_megatron.diffusion.schedules.loglinear:LogLinear", "bad": "no_such_module:Schedule"}
    assert {"good", "bad", "loglinear"} <= set(registry.names())
    with pytest.raises(ConfigError, match=r"noise schedule bad: no_such_module cannot be imported .*uninstall.* other"):
        registry.load("bad")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = registry.load_all()
    assert found["good"] is LogLinear
    assert "bad" not in found
    assert len(caplog.messages) == 1
    assert "no_such_module" in caplog.messages[0]


def test_an_installed_entry_takes_no_name_that_is_there(schedules, caplog):
    registry, installed = schedules
    installed["loglinear"] = "no_such_module:Schedule"
    with caplog.at_level(logging.WARNING):
        assert registry.load("loglinear") is LogLinear
    assert "noise schedule loglinear of the distribution other is not used" in caplog.text


def test_a_plugin_takes_no_name_that_is_there(schedules):
    registry, installed = schedules
    installed["cubic"] = "no_such_module:Schedule"
    for name in ("loglinear", "cubic"):
        with pytest.raises(ConfigError, match=f"noise schedule {name}: there is one of this name already"):
            registry.add(name, LogLinear)
