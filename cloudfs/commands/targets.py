"""Lists what could be opened here: running guests and the like, of one plugin or of all.

With -c and -o: what could be opened in the machine that the chain opens, such as guests in a guest.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from cloudfs.commands._arguments import Exit, Parser, UsageError, add_chain_options, path_target
from cloudfs.commands._output import Output
from cloudfs.render import Column, target_record
from engine import registry
from engine.chain import Spec
from engine.connector import Connector
from engine.errors import EngineError
from engine.machine import Machine
from engine.oslayer import OsLayer
from engine.targets import chain_of, open_chain

EXAMPLES = """\
  cloudfs targets                       everything that any plugin can list
  cloudfs targets raw                   what one plugin can list
  cloudfs targets qemu                  the guests that run here
  cloudfs targets qemu -c qemu:web-01   the guests in a guest
  cloudfs targets --json | jq -r '.[].target'
"""
COLUMNS = (Column("plugin", "PLUGIN"), Column("target", "TARGET"), Column("description", "DESCRIPTION"))


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs targets`."""
    parser.usage = "cloudfs targets [OPTIONS] [PLUGIN]"
    add_chain_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the targets."""
    if len(arguments.words) > 1:
        raise UsageError(f"{len(arguments.words)} words are too many: want [PLUGIN]")
    output = Output("targets", json=arguments.json, no_color=arguments.no_color)
    rows: list[dict[str, Any]] = []
    code = Exit.DONE
    with Machine() as machine:
        parent = _parent(machine, arguments)
        for name in arguments.words or [plugin.name for plugin in registry.plugins("connector")]:
            try:
                rows += _targets(machine, registry.load_connector(name), parent)
            except (EngineError, OSError) as error:
                if arguments.words:
                    raise
                output.say(f"the targets of {name} cannot be listed: {error}")
                code = Exit.PARTIAL
    if output.json:
        output.document(rows)
    else:
        output.table(rows, COLUMNS)
        if not rows and code == Exit.DONE:
            output.say("nothing runs here that could be opened by its name; images are opened by their path")
    return code


def _parent(machine: Machine, arguments: argparse.Namespace) -> OsLayer | None:
    """The OS layer in which to look, where one is asked for."""
    if arguments.file is None and not arguments.chain:
        return None
    target = None if arguments.file is None else path_target(arguments.file)
    return open_chain(machine, chain_of(target, arguments.chain)).layer


def _targets(machine: Machine, plugin: type[Connector], parent: OsLayer | None) -> Iterator[dict[str, Any]]:
    if parent is None and plugin.default_parent is not None:
        known = machine.find("oslayer", plugin.default_parent)
        parent = (known or machine.open("oslayer", Spec(plugin.default_parent))).layer
    for target in plugin.targets(parent):
        yield target_record(target, plugin.kind)
