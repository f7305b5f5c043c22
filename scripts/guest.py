"""Test guests by hand: records them ahead of the tests, or runs one for a person.

    .venv/bin/python scripts/guest.py list               the guests, and which are recorded
    .venv/bin/python scripts/guest.py record [NAME …]     record these, or those of CI, or with --all every one
    .venv/bin/python scripts/guest.py run NAME            boot one and keep it until Ctrl-C: a shell on this terminal
                                                           (`exit` goes on to where the recordings are made)
    .venv/bin/python scripts/guest.py update              forget the kernels: the newest are fetched at next use

All is kept below $CLOUDFS_GUESTS, or cloudfs/guests in the user's cache folder; that folder may be deleted at any time.
Recordings are described at the top of tests/guests/recording.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from guests import kernels, recorder
from guests.catalogue import GUESTS, selected
from guests.kernels import GuestError
from guests.machine import RunningGuest, started


def show_list() -> None:
    """A line for each guest."""
    for guest in GUESTS.values():
        made = sorted((kernels.cache_root() / "recordings").glob(f"{guest.name}-{'[0-9a-f]' * 16}"))
        print(f"{guest.name:18} {guest.paging:24} {'CI ' if guest.in_ci else '   '} {made[-1] if made else '-'}")


def record(names: list[str]) -> int:
    """Record guests, and say of each what came out."""
    failed = 0
    kernels.provide(GUESTS[name].kernel for name in names)
    for name in names:
        clock = time.monotonic()
        try:
            print(f"{recorder.describe(recorder.recorded(name))} ({time.monotonic() - clock:.1f} s)", flush=True)
        except GuestError as error:
            failed += 1
            print(f"{name}: {error}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str) -> int:
    """Boot a guest and join this terminal with its shell."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # what was begun is ended on the way
    with started(GUESTS[name]) as running:
        running.start()
        running.fetch_truth()
        print(f"{name} runs as pid {running.process.pid}; its RAM is {running.ram}, QMP of it is at")
        print(f"{running.folder}/qmp (taken by us), its debugger stub at {running.folder}/gdb. Ctrl-C ends it.")
        running.finish("shell")
        with contextlib.suppress(KeyboardInterrupt), _without_echo():
            _join(running)
    return 0


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    """The guest echoes what is typed; Ctrl-C stays ours."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _join(running: RunningGuest) -> None:
    """Bytes from the terminal to the guest and back, until it ends."""
    serial = running.serial.socket
    serial.settimeout(None)
    while running.process.poll() is None:
        ready, _, _ = select.select([serial, sys.stdin], [], [], 1.0)
        if serial in ready:
            got = serial.recv(4096)
            os.write(sys.stdout.fileno(), got)
            if b"@cloudfs ready" in got:
                print("the keeper has the processor: this is where recordings are made")
        if sys.stdin in ready:
            typed = os.read(sys.stdin.fileno(), 4096)
            if not typed:
                return
            serial.sendall(typed)


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    commands.add_parser("update")
    recording = commands.add_parser("record")
    recording.add_argument("names", nargs="*", metavar="NAME", choices=[[], *GUESTS])
    recording.add_argument("--all", action="store_true")
    commands.add_parser("run").add_argument("name", choices=GUESTS)
    arguments = parser.parse_args()
    try:
        if arguments.command == "record":
            return record(arguments.names or selected(arguments.all))
        if arguments.command == "run":
            return run(arguments.name)
        kernels.forget() if arguments.command == "update" else show_list()
    except GuestError as error:
        print(f"guests: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
