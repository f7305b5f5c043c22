"""The tour of scripts/demo: mounts this machine read-only, shows what to try with real output, waits for Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from cloudfs.mountpoint import is_mounted, unmount

HERE = Path(sys.executable).parent
START_SECONDS = 20
SECRET = "the-secret-of-this-tour"
LINES = 16


def fail(sentence: str) -> int:
    """Say what went wrong; the exit status."""
    print(f"cloudfs: {sentence}", file=sys.stderr)
    return 1


@contextlib.contextmanager
def mountpoint(wanted: str | None) -> Iterator[Path]:
    """The folder to mount at: the one asked for, or one of our own in /tmp, removed afterwards."""
    if wanted is not None:
        path = Path(wanted)
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
    else:
        path = Path("/tmp") / f"cloudfs-{pwd.getpwuid(os.getuid()).pw_name}"
        made = True
        if is_mounted(str(path)):
            unmount(str(path))
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            if path.is_symlink() or path.stat().st_uid != os.getuid() or any(path.iterdir()):
                path = Path(tempfile.mkdtemp(prefix="cloudfs-"))
    try:
        yield path
    finally:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`cloudfs mount PATH`, unmounted at the end whatever happens."""
    # A session of its own: Ctrl-C reaches this program alone, which then unmounts in order.
    daemon = subprocess.Popen(
        [str(HERE / "cloudfs"), "mount", "--daemon", str(path)], start_new_session=True, stdin=subprocess.DEVNULL
    )
    try:
        if daemon.wait(START_SECONDS) != 0:
            raise ChildProcessError("the mount did not start; the sentence above says why")
        yield daemon
    finally:
        with contextlib.suppress(Exception):
            unmount(str(path))


@contextlib.contextmanager
def target() -> Iterator[tuple[int, int]]:
    """A running program and the address of the secret in it."""
    program = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("tour_target.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert program.stdout is not None
        yield program.pid, int(program.stdout.readline())
    finally:
        program.kill()
        program.wait()


def show(explanation: str, command: str, folder: Path) -> None:
    """Explain a command, print it as one would type it, and run it in the mount."""
    bold, dim, plain = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")
    print(f"\n{dim}# {explanation}{plain}\n{bold}$ {command}{plain}", flush=True)
    environment = {**os.environ, "PATH": f"{HERE}:{os.environ.get('PATH', '')}", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, timeout=60, check=False, env=environment
    )
    lines = (done.stdout + done.stderr).decode(errors="replace").splitlines()
    width = shutil.get_terminal_size((120, 24)).columns
    for line in lines[:LINES]:
        print(line if len(line) <= width else line[: width - 1] + "…")
    if len(lines) > LINES:
        print(f"… ({len(lines) - LINES} more lines)")
    sys.stdout.flush()


def tour(folder: Path, pid: int, address: int) -> None:
    """What to try, each with its real output."""
    process = f"os/processes/{pid}"
    tools = [
        ("The memory of this machine, as files.", "ls -F ."),
        ("What is open: this machine, called native, and links into it.", "ls -F os"),
        ("Every process is a directory. This tour has started one that holds a secret:", f"ls -F {process}"),
        ("What it is:", f"cat {process}/info"),
        ("Its address space, as /proc prints it:", f"head -4 {process}/maps"),
        ("Its memory is a file, the offset is the address; here lies the secret:",
         f"xxd -s {address:#x} -l 48 {process}/mem"),
        ("One file per mapped range: grep finds the secret.", f"grep -rla {SECRET} {process}/regions/"),
        ("The libraries in it, each with its symbols:", f"ls {process}/modules | head -5"),
        ("… one of them, read back from memory:", f"readelf -h {process}/modules/libc.so.6/image | head -4"),
        ("The same without a mount, on the command line:", f"cloudfs info {pid}"),
    ]  # fmt: skip
    for explanation, command in tools:
        if not command.startswith("readelf") or (shutil.which("readelf") and _has_libc(folder / process)):
            show(explanation, command, folder)


def _has_libc(process: Path) -> bool:
    return (process / "modules" / "libc.so.6").is_dir()


def main(arguments: list[str]) -> int:
    """Mount, show, wait."""
    if len(arguments) > 1:
        return fail("usage: ./scripts/demo [MOUNTPOINT]")
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with mountpoint(arguments[0] if arguments else None) as folder, mounted(folder), target() as (pid, address):
            print(f"This machine is mounted at {folder}, read-only.")
            tour(folder, pid, address)
            print(
                textwrap.dedent(f"""
                Now you. In another terminal:
                    cd {shlex.quote(str(folder))} && cat README
                The process of this tour is {pid}; with root's rights every process can be read.
                Ctrl-C here unmounts and ends the tour.""")
            )
            sys.stdout.flush()
            try:
                while is_mounted(str(folder)):
                    time.sleep(1)
            except KeyboardInterrupt:
                print("\nunmounting")
                return 0
            print("It was unmounted.")
            return 0
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, ChildProcessError, subprocess.TimeoutExpired) as error:
        return fail(str(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
