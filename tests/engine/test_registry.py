"""The registry: what is installed, and why a broken one is broken."""

from __future__ import annotations

import sys
import types

import pytest

from engine import registry
from engine.connector import Connector
from engine.errors import PluginError


class Half(Connector):
    kind = "half"
    summary = "lacks what it must have"


@pytest.fixture
def announce(monkeypatch):
    module = types.ModuleType("test_registry_leaves")
    vars(module).update(Half=Half, NoConnector=int)
    monkeypatch.setitem(sys.modules, "test_registry_leaves", module)

    def add(name: str, where: str) -> None:
        monkeypatch.setitem(registry._BUILT_IN["connector"], name, where)

    return add


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("test_registry_leaves:Half", "lacks close, info, memory, memory_map, open"),
        ("test_registry_leaves:NoConnector", "not a subclass of Connector"),
        ("test_registry_leaves:Nothing", "AttributeError"),
        ("no_such_module:Nothing", "no_such_module"),
    ],
)
def test_a_broken_plugin_says_why_and_breaks_no_other(announce, where, says):
    announce("broken", where)
    with pytest.raises(PluginError, match="broken") as caught:
        registry.load_connector("broken")
    assert says in str(caught.value)
    problems = {status.plugin.name: status.problem for status in registry.statuses("connector")}
    assert says in problems["broken"]
    assert problems["raw"] is None


@pytest.mark.parametrize(("name", "says"), [("rwa", "did you mean 'raw'"), ("native", "is an OS layer, no connector")])
def test_a_name_that_is_no_connector_is_told_from_one_that_is_something_else(name, says):
    with pytest.raises(PluginError, match=says):
        registry.load_connector(name)
