#!/usr/bin/env python3
"""Writes man/cloudfs.1 and man/mount.fuse.cloudfs.8 from the parsers, the examples and the short texts below.

    .venv/bin/python scripts/manpages.py [FOLDER]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from cloudfs import cli, mount_helper
from cloudfs.commands._arguments import Parser, add_common_options
from cloudfs.commands._catalogue import command_names, load_command, parser_of, summary
from cloudfs.commands._completion import Option, options_of
from engine import __version__

ROOT = Path(__file__).resolve().parent.parent

WORDS = """\
\\fITARGET\\fP says what to open. Left out it is this machine. A path is an image file, its format recognised by
content; PLUGIN[:TARGET][:KEY=VALUE,...] names a plugin, its target and its options. A value that holds a colon, a
comma or a space stands in quotes. Longer chains are written with -c and -o, in the order in which their parts stand
on one another. One bare word of digits is a PID of this machine.

\\fISPACE\\fP is a PID, the name of a process where only one has it, \\fBkernel\\fP or \\fBphysical\\fP. Numbers may be
written 4096, 0x1000, 4K, 2M.

Tables are aligned on a terminal and tab-separated in a pipe.
"""

HELPER = """\
mount(8) and systemd run it for file systems of type fuse.cloudfs once it is linked into /sbin:

@ln -s "$(command -v mount.fuse.cloudfs)" /sbin/mount.fuse.cloudfs

It returns when the mount stands, or with its error. umount(8) ends the mount. \\fITARGET\\fP is written as for
cloudfs(1). In fstab(5) a space is \\e040, a tab \\e011 and a backslash \\e134. What os= and connector= name stands on
\\fITARGET\\fP. In an option a comma stands in double quotes.

Nothing can be written to memory without the option \\fBwritable\\fP.
"""
HELPER_EXAMPLES = """\
mount -t fuse.cloudfs native /mnt -o allow_other

native                 /mnt/machine fuse.cloudfs noauto,x-systemd.automount,_netdev  0 0
raw:/a.raw:base=0x1000 /mnt/image   fuse.cloudfs nofail,fsname=image,timeout=5       0 0
"""
CODES = {
    "0": "done",
    "1": "the target failed or was not recognised",
    "2": "wrong usage",
    "3": "no such process, module or address space",
    "4": "done, but part of it could not be read; standard error says what",
    "130": "interrupted",
}
HELPER_CODES = {
    "0": "mounted; or nothing was asked for, as with -f, and with nofail where TARGET does not exist",
    "1": "wrong usage",
    "8": "interrupted",
    "32": "it could not be mounted",
}


def plain(text: str) -> str:
    """Text of which roff takes nothing for its own."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    text = text.replace("…", "...").replace("^", "\\(ha").replace("~", "\\(ti")
    assert text.isascii(), f"write it in ASCII: {text!r}"
    return "\\&" + text if text.startswith((".", "\\(aq")) else text


def paragraphs(text: str, *, ready: bool = False) -> list[str]:
    """Paragraphs; those that begin with @ or a space are literal. `ready`: the text holds roff's own words."""
    lines = []
    for part in re.split(r"\n\n+", text.strip("\n")):
        literal = part.startswith(("@", " "))
        lines += [".PP"]
        if literal:
            lines += literally(part.removeprefix("@"))
        else:
            lines += [line if ready else plain(line.strip()) for line in part.splitlines()]
    return lines


def literally(text: str) -> list[str]:
    """An example as it stands, indented."""
    return [".RS 4", ".nf", *(plain(line) if line else ".sp" for line in text.splitlines()), ".fi", ".RE"]


def option_lines(option: Option) -> list[str]:
    """One option and its help."""
    value = f" \\fI{plain(option.metavar)}\\fP" if option.metavar else ""
    names = ", ".join(f"\\fB{plain(name)}\\fP{value}" for name in option.names)
    return [".TP", names, plain(option.help)]


def table(rows: dict[str, str]) -> list[str]:
    """Words in bold and what they mean."""
    lines = []
    for name, text in rows.items():
        lines += [".TP", f"\\fB{plain(name)}\\fP", plain(text)]
    return lines


def head(name: str, section: int, what: str) -> list[str]:
    """Title and NAME."""
    return [
        '.\\" Made by scripts/manpages.py from the command line\'s parsers: change them, not this.',
        f'.TH {name.upper()} {section} "" "cloudfs {__version__}" "cloudfs"',
        ".nh",
        ".ad l",
        ".SH NAME",
        f"{plain(name)} \\- {plain(what)}",
        ".SH SYNOPSIS",
    ]


def command_lines(name: str, common: set[tuple[str, ...]]) -> list[str]:
    """The section of one command."""
    parser, command = parser_of(name), load_command(name)
    lines = [f".SS {plain(name)}", f"\\fB{plain(str(parser.usage))}\\fP", *paragraphs(command.__doc__)]
    for option in options_of(parser):
        if option.names not in common:
            lines += option_lines(option)
    return [*lines, ".PP", *literally(re.sub(r"(?m)^  ", "", command.EXAMPLES))]


def cloudfs_page() -> str:
    """cloudfs.1"""
    shared = Parser(prog="cloudfs")
    add_common_options(shared)
    options = list(options_of(shared))
    lines = head("cloudfs", 1, "show the memory of a machine as files and tables")
    lines += [
        "\\fBcloudfs\\fP \\fICOMMAND\\fP [\\fIOPTIONS\\fP] [\\fIWORDS\\fP]",
        ".SH DESCRIPTION",
        *paragraphs(cli.TOUR.split("\n\n")[0]),
        *table({name: summary(name) for name in command_names()}),
        *paragraphs(WORDS, ready=True),
        ".SH OPTIONS OF EVERY COMMAND",
    ]
    for option in options:
        lines += option_lines(option)
    lines.append(".SH COMMANDS")
    for name in command_names():
        lines += command_lines(name, {option.names for option in options})
    lines += [".SH EXIT STATUS", *table(CODES)]
    lines += [".SH ENVIRONMENT", *table({"NO_COLOR": "no colours, where it is not empty"})]
    lines += [".SH SEE ALSO", "\\fBmount.fuse.cloudfs\\fP(8), \\fBproc\\fP(5), \\fBfuse\\fP(4)"]
    return "\n".join(lines) + "\n"


def helper_page() -> str:
    """mount.fuse.cloudfs.8"""
    lines = head(mount_helper.NAME, 8, "mount a machine's memory by mount(8), fstab(5) and systemd")
    lines += [
        f"\\fB{plain(mount_helper.USAGE)}\\fP",
        ".PP",
        "\\fBmount \\-t fuse.cloudfs\\fP \\fITARGET MOUNTPOINT\\fP [\\fB\\-o\\fP \\fIOPTION\\fP[,\\fIOPTION\\fP...]]",
        ".SH DESCRIPTION",
        *paragraphs(HELPER, ready=True),
        ".SH OPTIONS",
        *table({
            "-f": "check the words, mount nothing",
            "-s": "ignore mount options that are not known",
            "-v": "log what is done",
            "-n, -N NAMESPACE, -t TYPE": "read by mount(8); here they change nothing",
        }),
        ".SH MOUNT OPTIONS",
        *table(dict(mount_helper.OPTIONS)),
        ".SH EXIT STATUS",
        *table(HELPER_CODES),
        ".SH EXAMPLES",
        *literally(HELPER_EXAMPLES),
        ".SH SEE ALSO",
        "\\fBcloudfs\\fP(1), \\fBmount\\fP(8), \\fBfstab\\fP(5), \\fBsystemd.mount\\fP(5)",
    ]
    return "\n".join(lines) + "\n"


PAGES = {"cloudfs.1": cloudfs_page, "mount.fuse.cloudfs.8": helper_page}


def tidied(page: str) -> str:
    """A page without paragraphs that stand where one begins anyway."""
    return re.sub(r"(?m)^(\.S[HS] .*\n)\.PP\n", r"\1", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "man", help="where the pages go")
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (folder / name).write_text(tidied(page()), encoding="ascii")


if __name__ == "__main__":
    main()
