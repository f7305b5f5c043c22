"""Unmounts what `cloudfs mount` has mounted, also where its daemon is dead.

A mount that is in use stays, and who uses it is said. With --force it ends nevertheless, at once, also when it hangs:
files that are open there give errors from then on. A user other than root has his own daemon ended for that, unless
/sys/fs/fuse/connections is there.
"""

from __future__ import annotations

import argparse
import os

from cloudfs.commands._arguments import Exit, Parser, UsageError
from cloudfs.commands._output import Output
from cloudfs.mountpoint import absolute, unmount

EXAMPLES = """\
  cloudfs umount /tmp/machine
  cloudfs umount --force /tmp/machine   while files of it are open, or when it hangs
"""


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs umount`."""
    parser.usage = "cloudfs umount [OPTIONS] MOUNTPOINT"
    parser.add_argument(
        "--force", action="store_true", help="end it for everyone: whoever waits for the mount gets an error"
    )


def run(arguments: argparse.Namespace) -> int:
    """Unmount."""
    if len(arguments.words) != 1:
        raise UsageError("want one MOUNTPOINT")
    mountpoint = absolute(arguments.words[0])
    os.chdir("/")  # who stands in the mount keeps it busy: that must not be this process
    unmount(mountpoint, force=arguments.force)
    output = Output("umount", json=arguments.json, no_color=arguments.no_color)
    if output.json:
        output.document({"mountpoint": mountpoint, "unmounted": True})
    return Exit.DONE
