"""`plugins`: what is installed, its version, and why a broken one is broken."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator

from cloudfs import nodes, render
from cloudfs.nodes.contexts import PluginProblem, TreeContext
from cloudfs.nodes.files.text import TextFile
from engine import registry

GROUP = "cloudfs.nodes"
"""Entry points of packages that add files to the tree."""
COLUMNS = (
    render.Column("kind", "KIND"),
    render.Column("name", "NAME"),
    render.Column("distribution", "FROM"),
    render.Column("what", "WHAT"),
)

log = logging.getLogger(__name__)


def load_entries() -> tuple[PluginProblem, ...]:
    """Import all that registers entries, ours and that of other packages; gives what failed, and why."""
    for module in nodes.ENTRY_MODULES:
        importlib.import_module(f"{nodes.__name__}.{module}")
    return tuple(
        PluginProblem(status.plugin.name, status.plugin.distribution, status.problem)
        for status in entry_statuses()
        if status.problem is not None
    )


def entry_statuses() -> Iterator[registry.PluginStatus]:
    """Every package that adds entries, loaded, with what is wrong with it."""
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP):
        brought_by = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"
        plugin = registry.Plugin(entry.name, "entries", entry.value, brought_by)
        try:
            loaded = entry.load()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            log.warning("entries of %s (%s) cannot be loaded: %s", entry.name, brought_by, problem)
            log.debug("how they failed", exc_info=True)
            yield registry.PluginStatus(plugin, "", problem)
        else:
            summary = (getattr(loaded, "__doc__", None) or "").strip().split("\n", 1)[0]
            yield registry.PluginStatus(plugin, summary, None)


def rows(tree: TreeContext) -> Iterator[dict[str, str]]:
    """One row for each plugin and for each package whose entries are missing."""
    for kind in ("connector", "oslayer"):
        for status in registry.statuses(kind):
            what = status.summary if status.problem is None else f"broken: {status.problem}"
            plugin = status.plugin
            yield {"kind": kind, "name": plugin.name, "distribution": plugin.distribution, "what": what}
    for problem in tree.problems:
        what = f"broken: {problem.problem}"
        yield {"kind": "entries", "name": problem.name, "distribution": problem.distribution, "what": what}


def plugins_file(tree: TreeContext) -> TextFile:
    """The file. Not sized: to say what is broken all plugins are loaded, which takes longer than stat(2) may."""

    def text() -> str:
        return render.table(rows(tree), COLUMNS, terminal=True)

    return TextFile(tree, "plugins", text, sized=False, may_block=True)
