"""`mount.fuse.cloudfs`: how mount(8), fstab and systemd mount, once it is linked into /sbin.

    mount.fuse.cloudfs TARGET MOUNTPOINT [-sfnv] [-N NAMESPACE] [-t TYPE] [-o OPTION[,OPTION...]]

It puts what mount(8) gives its helpers into the words of `cloudfs mount --daemon`, so it returns when the mount
stands; its exit codes are those of mount(8).
"""

from __future__ import annotations

import contextlib
import enum
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from types import MappingProxyType

from cloudfs import cli
from cloudfs.commands._arguments import Exit
from cloudfs.commands._streams import put
from engine.records import dataclass

NAME = "mount.fuse.cloudfs"
USAGE = f"{NAME} TARGET MOUNTPOINT [-sfnv] [-o OPTION[,OPTION...]]"


class MountExit(enum.IntEnum):
    """What the exit codes of mount(8) mean."""

    DONE = 0
    USAGE = 1
    """Wrong usage, or no permission."""
    SYSTEM = 2
    INTERRUPTED = 8
    FAILED = 32


OPTIONS: Mapping[str, str] = MappingProxyType({
    "writable": "allow writing to memory. rw does not: mount(8) gives it to every mount that is not ro",
    "ro, rw": "ro contradicts writable; without writable both say the same, as nothing can be written",
    "allow_other": "let other users in; it lends them the daemon's rights, past the rules of ptrace(2)",
    "os=PLUGIN[:...]": "the OS layer on TARGET; os= and connector= may alternate, in the order written",
    "connector=PLUGIN[:...]": "a source of memory on the OS layer before it, such as a guest in a guest",
    "uid=N, gid=N": "owner and group of what has none of its own",
    "fsname=NAME": "what df(1) and findmnt(8) show as the source",
    "timeout=SECONDS": "no request waits for longer (30)",
    "spin=MICROSECONDS": "poll so long before sleeping (0)",
    "log_file=FILE": "append the log of the daemon to FILE",
    "nonempty": "mount over a directory that has something in it",
    "nofail": "where TARGET does not exist, nothing is mounted, nothing is said, and the exit code is 0",
    "atime, noatime, relatime, strictatime, sync, noauto_unmount": "as for every FUSE file system",
    "auto, noauto, user, users, owner, group, _netdev, defaults, x-*, comment=": (
        "read by mount(8) and systemd; here they change nothing"
    ),
    "nosuid, nodev, noexec, auto_unmount, default_permissions": "on anyway",
})
"""The mount options there are, and what they do."""

_PASSED_ON = frozenset("allow_other atime noatime noauto_unmount nonempty relatime ro strictatime sync".split())
_VALUES_PASSED_ON = frozenset("uid gid fsname".split())
_LONG_OPTIONS = frozenset("connector log_file os spin timeout".split())
_IGNORED = frozenset(
    "async auto auto_unmount default_permissions defaults group noauto nodev noexec nogroup noowner nosuid nouser "
    "nousers owner rw user users _netdev _rnetdev".split()
)
_IGNORED_VALUES = frozenset({"comment", "user", "subtype"})
_WORD = re.compile(r'(?:[^,"\\]|"(?:[^"\\]|\\.)*"|\\.)+', re.DOTALL)


class HelperUsageError(Exception):
    """What mount(8) has given cannot be carried out."""


@dataclass(slots=True)
class Request:
    """What mount(8) asks for."""

    words: list[str] = field(default_factory=list)
    """Of `cloudfs`."""
    fake: bool = False
    nofail: bool = False
    verbose: bool = False
    """Else nothing is printed where all goes well, as for every mount."""


def split_options(text: str) -> list[str]:
    """The options in a comma-separated list; in `"..."` and behind a backslash a comma is a plain character."""
    words, at = [], 0
    for found in _WORD.finditer(text):
        if text[at : found.start()].strip(","):
            break
        words.append(found[0])
        at = found.end()
    if text[at:].strip(","):
        raise HelperUsageError(f"-o {text}: a quote is not closed, or a backslash stands last")
    return words


def read_request(arguments: Sequence[str]) -> Request:
    """What the words of mount(8) ask for. Raises HelperUsageError."""
    request = Request(["mount", "--daemon"])
    places: list[str] = []
    options: list[str] = []
    sloppy = False
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            places += rest
            break
        if not word.startswith("-") or word == "-":
            places.append(word)
            continue
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter in "otN":
                if not letters and not rest:
                    raise HelperUsageError(f"-{letter} wants a value: {USAGE}")
                value, letters = letters or rest.pop(0), ""
                options += split_options(value) if letter == "o" else []
            elif letter in "fsnvrw":
                request.fake |= letter == "f"
                sloppy |= letter == "s"
                request.verbose |= letter == "v"
                options += ["ro"] if letter == "r" else []
            else:
                raise HelperUsageError(f"there is no option -{letter}: {USAGE}")
    if len(places) != 2:
        raise HelperUsageError(f"want one TARGET and one MOUNTPOINT: {USAGE}")
    for option in options:
        _add_option(request, option, sloppy)
    request.words += ["-v"] if request.verbose else []
    request.words += ["--", *places]
    return request


def _add_option(request: Request, option: str, sloppy: bool) -> None:
    name, equals, value = option.partition("=")
    if option == "nofail":
        request.nofail = True
    elif option == "writable":
        request.words.append("--writable")
    elif equals and name in _LONG_OPTIONS:
        request.words.append(f"--{name.replace('_', '-')}={value}")
    elif option in _PASSED_ON or (equals and name in _VALUES_PASSED_ON):
        request.words += ["-o", option]
    elif not _is_ignored(option, name) and not sloppy:
        names = "; ".join(OPTIONS)
        raise HelperUsageError(f"{option!r} is no mount option; there are {names}")


def _is_ignored(option: str, name: str) -> bool:
    return option in _IGNORED or name in _IGNORED_VALUES or option.lower().startswith("x-")


def main(arguments: Sequence[str] | None = None, *, loaded: Callable[[], None] = lambda: None) -> int:
    """Mount as mount(8) asks, and give one of its exit codes; never raises. `loaded`: see `cli.main`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) in (["--version"], ["-V"], ["--help"], ["-h"]):
        cli.main(["--version"]) if arguments[0].lower() in ("--version", "-v") else put(help_text())
        return MountExit.DONE
    try:
        request = read_request(arguments)
    except HelperUsageError as error:
        sys.stderr.write(f"{NAME}: {ascii(str(error))[1:-1]}\n")
        return MountExit.USAGE
    if request.fake:
        return MountExit.DONE
    here = os.getpid()
    with contextlib.nullcontext() if request.verbose else contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(request.words, forgive=is_absent if request.nofail else None, loaded=loaded)
    return exit_code(code) if os.getpid() == here else code  # the daemon's code goes through its parent


def is_absent(error: BaseException) -> bool:
    """Whether an error says that the target does not exist."""
    from engine.errors import NotFoundError

    return isinstance(error, NotFoundError)


def exit_code(code: int) -> MountExit:
    """What an exit code of `cloudfs mount` is to mount(8)."""
    known = {Exit.DONE: MountExit.DONE, Exit.USAGE: MountExit.USAGE, Exit.INTERRUPTED: MountExit.INTERRUPTED}
    return known.get(Exit(code), MountExit.FAILED)


def help_text() -> str:
    """What --help prints."""
    lines = [f"usage: {USAGE}", "", "mount options:"]
    lines += [f"  {name}\n      {text}" for name, text in OPTIONS.items()]
    return "\n".join(lines) + "\n"
