"""Mounts a machine's memory as files: this machine, a guest, an image.

In the foreground until Ctrl-C, or with --daemon in the background until `cloudfs umount`. Nothing can be written
unless --writable allows it, and only the user who mounts gets in unless --allow-other lets others.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cloudfs import daemon
from cloudfs.commands._arguments import Exit, Parser, Shape, UsageError, Words, add_chain_options, assign
from cloudfs.commands._streams import OutputError, ReaderGoneError, flush, put, say
from engine.records import dataclass

if TYPE_CHECKING:
    from cloudfs.commands._opening import Opened
    from cloudfs.commands._output import Output
    from cloudfs.commands._status import StatusLine
    from cloudfs.mount import Counters, MountOptions

EXAMPLES = """\
  cloudfs mount /tmp/machine                      this machine, until Ctrl-C
  cloudfs mount --daemon /tmp/machine             in the background; cloudfs umount /tmp/machine ends it
  cloudfs mount memory.raw /tmp/image             an image of a machine's memory
  cloudfs mount --writable memory.raw /tmp/image  the same; what is written there changes the file
  cloudfs mount -o ro,allow_other native /tmp/machine
"""
SHAPE = Shape(rest=("MOUNTPOINT",))

FLAGS = frozenset(
    "allow_other atime auto_unmount debug default_permissions defaults noatime noauto_unmount nodev noexec nonempty "
    "nosuid relatime ro rw strictatime sync".split()
)
VALUES = frozenset({"fsname", "gid", "uid"})
"""Mount options that FUSE users know (mount.fuse3(8)); any other word behind -o is an OS layer."""
IMPLIED = frozenset({"default_permissions", "defaults", "nodev", "noexec", "nosuid", "auto_unmount"})
"""Those that are on anyway."""
SPIN_LIMIT = 10_000.0
"""Microseconds of polling; more is no polling but a busy loop."""
NOBODY = (1 << 32) - 1
"""Stands for no user and no group: (uid_t)-1 of chown(2)."""

log = logging.getLogger("cloudfs.mount")


class _MountOption(argparse.Action):
    """-o: mount options as every FUSE file system takes them, else an OS layer."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        words = values.split(",")
        known = [word for word in words if word in FLAGS or word.partition("=")[0] in VALUES]
        if not known:
            namespace.chain = [*namespace.chain, ("oslayer", values)]
            return
        for word in words:
            if word not in known:
                names = ", ".join(sorted(FLAGS | {f"{name}=" for name in VALUES}))
                raise UsageError(f"-o {values}: {word!r} is no mount option; there are {names}")
        namespace.mount_options = [*namespace.mount_options, *words]


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs mount`."""
    parser.usage = f"cloudfs mount [OPTIONS] {SHAPE}"
    add = parser.add_argument
    add("--daemon", action="store_true", help="return when the mount stands, or with its error")
    add("--writable", action="store_true", help="allow writing to memory")
    add(
        "--allow-other",
        action="store_true",
        help="let other users in; it lends them the daemon's rights, past the rules of ptrace(2)",
    )
    add("--nonempty", action="store_true", help="mount over a directory that has something in it")
    add("--timeout", type=float, default=30.0, metavar="SECONDS", help="no request waits for longer (30)")
    add(
        "--spin",
        type=float,
        default=0.0,
        metavar="MICROSECONDS",
        help="after a request, poll so long for the next: faster from another CPU, for a CPU kept busy meanwhile (0)",
    )
    add("--stock-loop", action="store_true", help="trio's own primitives instead of faster ones")
    add("--no-shim", action="store_true", help="do without C: slower, holes are read as zeros (also: CLOUDFS_SHIM=0)")
    add("--self-check", action="store_true", help="check the table of inodes at the end")
    add_chain_options(parser, os_option="--os")
    help_text = "ro, rw (= --writable), allow_other, uid=N, gid=N, fsname=NAME …; any other word: as --os"
    add("-o", action=_MountOption, dest="chain", metavar="OPTION[,…]", help=help_text)
    parser.set_defaults(mount_options=[])


def run(arguments: argparse.Namespace) -> int:
    """Mount, serve, unmount."""
    words = assign(arguments.words, SHAPE, file=arguments.file)
    settings = _settings(arguments)
    if not arguments.daemon:
        return _Session(arguments, words, settings).run(None)
    # Before anything is imported that starts threads or takes time.
    side = daemon.begin()
    if isinstance(side, daemon.Outcome):
        try:
            put(side.said)
            flush()
        except ReaderGoneError:
            raise
        except OutputError as error:  # the exit code tells whether it is mounted
            say("mount", f"it is mounted, but {error}", no_color=arguments.no_color)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed
        return side.code
    return _Session(arguments, words, settings).run(side)


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the options come to."""

    writable: bool
    allow_other: bool
    nonempty: bool
    uid: int | None
    gid: int | None
    source: str | None
    extra: tuple[str, ...]


def _settings(arguments: argparse.Namespace) -> _Settings:
    """What options and mount options come to together. Raises UsageError where they contradict one another."""
    options: set[str] = set(arguments.mount_options)
    values = dict(word.split("=", 1) for word in options if "=" in word)
    flags = {word for word in options if "=" not in word}
    writable = arguments.writable or "rw" in flags
    if writable and "ro" in flags:
        raise UsageError(f"-o ro contradicts {'--writable' if arguments.writable else '-o rw'}")
    if not 0 < arguments.timeout < float("inf"):
        raise UsageError(f"--timeout {arguments.timeout:g}: want a number of seconds above 0")
    if not 0 <= arguments.spin <= SPIN_LIMIT:
        raise UsageError(f"--spin {arguments.spin:g}: want microseconds from 0 to {SPIN_LIMIT:g}")
    return _Settings(
        writable=writable,
        allow_other=arguments.allow_other or "allow_other" in flags,
        nonempty=arguments.nonempty or "nonempty" in flags,
        uid=_identifier("uid", values.get("uid")),
        gid=_identifier("gid", values.get("gid")),
        source=values.get("fsname"),
        extra=tuple(sorted(flags - IMPLIED - {"ro", "rw", "allow_other", "nonempty"})),
    )


def _identifier(name: str, text: str | None) -> int | None:
    """The number of a user or group."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 10 or int(text) >= NOBODY:
        raise UsageError(f"-o {name}={text}: want a number below {NOBODY}")
    return int(text)


class _Session:
    """One mount, from opening the target to unmounting."""

    def __init__(self, arguments: argparse.Namespace, words: Words, settings: _Settings) -> None:
        from cloudfs.mountpoint import absolute  # after the fork

        self.arguments = arguments
        self.words = words
        self.settings = settings
        self.mountpoint = absolute(words.rest[0])

    def run(self, background: daemon.Background | None) -> int:
        """Open, mount, serve until the end."""
        # pyfuse3 and trio take 0.2 s: after the fork, and for no other command.
        from cloudfs import shim
        from cloudfs.commands._opening import opened
        from cloudfs.commands._output import Output

        shim.load(wanted=not self.arguments.no_shim)  # before pyfuse3 is imported
        from cloudfs.mount import Counters, mount
        from cloudfs.nodes.root import build_root

        output = Output("mount", json=self.arguments.json, no_color=self.arguments.no_color)
        with (
            opened(
                self.arguments, self.words, need="any", writable=self.settings.writable,
                patience=self.arguments.timeout,
            ) as target,
            contextlib.ExitStack() as stack,
        ):
            counters = Counters()
            status = _status_line(counters, output) if background is None else None

            def ready() -> None:
                if target.instance.kind != "oslayer":
                    output.say(f"{target.instance.last_error}; its connector is mounted alone")
                log.info("%s", self._title(target))
                daemon.tell_service_manager("READY=1")
                if background is not None:
                    background.started(self._report(target, output))
                elif output.json:
                    output.text(self._report(target, output))
                    output.flush()
                elif status is not None:
                    output.text(self._report(target, output))
                    stack.enter_context(_shown(status))

            ended = mount(
                build_root(target.machine),
                self.mountpoint,
                self._options(target),
                ready=ready,
                counters=counters,
                activity=None if status is None else status.wake,
            )
        return Exit.INTERRUPTED if ended is signal.SIGINT else Exit.DONE

    def _options(self, target: Opened) -> MountOptions:
        from cloudfs.mount import MountOptions

        settings, arguments = self.settings, self.arguments
        return MountOptions(
            source=settings.source or "+".join(str(spec) for _, spec in target.asked),
            allow_other=settings.allow_other,
            nonempty=settings.nonempty,
            auto_unmount="noauto_unmount" not in settings.extra,
            fast_loop=not arguments.stock_loop,
            spin=arguments.spin / 1e6,
            timeout=arguments.timeout,
            extra=tuple(word for word in settings.extra if word != "noauto_unmount"),
            uid=settings.uid,
            gid=settings.gid,
            self_check=arguments.self_check,
        )

    def _title(self, target: Opened) -> str:
        return f"{target.name} is mounted at {self.mountpoint}"

    def _report(self, target: Opened, output: Output) -> str:
        """What is printed when the mount stands."""
        from cloudfs.render import escape_terminal, to_json

        if output.json:
            record = {"mountpoint": self.mountpoint, "target": target.name, "pid": os.getpid()}
            return to_json({**record, "writable": self.settings.writable})
        how = "writable" if self.settings.writable else "read-only"
        if not self.settings.writable and target.connector is not None and target.connector.writable:
            how = "read-only but for what its overlay takes"
        until = "; `cloudfs umount` ends it" if self.arguments.daemon else ""
        return escape_terminal(f"{self._title(target)}, {how}{until}") + "\n"


def _status_line(counters: Counters, output: Output) -> StatusLine | None:
    """The status line, where there is a terminal to show it."""
    from cloudfs.commands._status import StatusLine

    if output.json or not output.terminal:
        return None
    return StatusLine(sys.stdout, sys.stderr, counters, lambda: output.width)


@contextlib.contextmanager
def _shown(status: StatusLine) -> Iterator[None]:
    """The status line, and the log above it."""
    handlers = [handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]
    with status:
        for handler in handlers:
            handler.setStream(status)
        try:
            yield
        finally:
            for handler in handlers:
                handler.setStream(sys.stderr)
