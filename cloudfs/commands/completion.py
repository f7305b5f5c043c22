"""Prints a script with which a shell completes commands, options, plugins and PIDs.

SHELL is bash, zsh or fish.
"""

from __future__ import annotations

import argparse

from cloudfs.commands._arguments import Exit, Parser, UsageError
from cloudfs.commands._streams import put
from cloudfs.render import to_json

EXAMPLES = """\
  source <(cloudfs completion bash)                                   now, or in ~/.bashrc
  source <(cloudfs completion zsh)                                    in ~/.zshrc, behind compinit
  cloudfs completion fish > ~/.config/fish/completions/cloudfs.fish
"""


def configure(parser: Parser) -> None:
    """The word of `cloudfs completion`."""
    parser.usage = "cloudfs completion [OPTIONS] SHELL"


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    from cloudfs.commands._completion import SCRIPTS, script  # which reads the parsers of all commands, this one too

    if len(arguments.words) != 1 or arguments.words[0] not in SCRIPTS:
        raise UsageError(f"want one SHELL of {', '.join(SCRIPTS)}")
    text = script(arguments.words[0])
    put(to_json({"shell": arguments.words[0], "script": text}) if arguments.json else text)
    return Exit.DONE
