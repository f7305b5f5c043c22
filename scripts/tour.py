"""The tour of scripts/demo: mounts this machine read-only, shows what to try with real output, waits for Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import pwd
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

from cloudfs.mountpoint import is_dead, is_mounted, unmount
from engine.errors import EngineError

HERE = Path(sys.executable).parent
START_SECONDS = 20
STOP_SECONDS = 15
SECRET = "the-secret-of-this-tour"
LINES = 16
PR_SET_PDEATHSIG = 1
"""prctl(2)."""
libc = ctypes.CDLL(None)


def fail(sentence: str) -> int:
    """Say what went wrong; the exit status."""
    print(f"cloudfs: {sentence}", file=sys.stderr)
    return 1


@contextlib.contextmanager
def mountpoint(wanted: str | None) -> Iterator[Path]:
    """The folder to mount at: the one asked for, or one of our own in /tmp, removed afterwards."""
    if wanted is not None:
        path = Path(wanted).absolute()
        made = not is_mounted(path) and not os.path.lexists(path)
        if made:
            path.mkdir(parents=True)
    else:
        path, made = _folder_of_our_own(), True
    try:
        yield path
    finally:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _folder_of_our_own() -> Path:
    """/tmp/cloudfs-USER, cleared of a dead mount; another one where that is in use, or is not ours."""
    path = Path("/tmp") / f"cloudfs-{_user()}"
    with contextlib.suppress(OSError, EngineError):
        if is_mounted(path) and is_dead(str(path)):
            unmount(path)
            print(f"A mount was cleared away from {path}: its daemon is gone.")
        if not os.path.lexists(path):
            path.mkdir(mode=0o700)
        found = path.lstat()
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        if ours and not is_mounted(path) and not any(path.iterdir()):
            return path
    return Path(tempfile.mkdtemp(prefix="cloudfs-"))


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run as a user that it does not know
        return str(os.getuid())


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[subprocess.Popen[str]]:
    """`cloudfs mount PATH`, unmounted at the end whatever happens."""
    here = os.getpid()

    def end_with_this_program() -> None:
        """In the child: a SIGTERM, at which it unmounts, also where this program is killed and can see to nothing."""
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != here:
            os._exit(1)

    # A session of its own: Ctrl-C reaches this program alone, which then unmounts in order.
    server = subprocess.Popen(
        [str(HERE / "cloudfs"), "mount", "--json", str(path)],
        preexec_fn=end_with_this_program,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        if not select.select([server.stdout], [], [], START_SECONDS)[0]:
            raise ChildProcessError(f"the mount did not start within {START_SECONDS} s")
        if not server.stdout.readline():
            raise ChildProcessError("the mount did not start; the sentence above says why")
        yield server
    finally:
        _end(server, path)


def _end(server: subprocess.Popen[str], path: Path) -> None:
    """Have it unmount, though somebody be in it; say so where it could not."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient Ctrl-C must not leave the mount behind
    try:
        server.terminate()
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    finally:
        try:
            if is_mounted(path):
                unmount(path)
        except (OSError, EngineError) as error:
            fail(f"{error}; later, `{HERE / 'cloudfs'} umount {shlex.quote(str(path))}` may end it")
        signal.signal(signal.SIGINT, before)


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


def main() -> int:
    """Mount, show, wait."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mountpoint", nargs="?", metavar="MOUNTPOINT", help="an empty directory (one of its own)")
    wanted = parser.parse_args().mountpoint
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with mountpoint(wanted) as folder, mounted(folder) as server, target() as (pid, address):
            print(f"This machine is mounted at {folder}, read-only.")
            tour(folder, pid, address)
            print(
                textwrap.dedent(f"""
                Now you. In another terminal:
                    cd {shlex.quote(str(folder))} && cat README
                The process of this tour is {pid}; with root's rights you see all others too.
                Ctrl-C here unmounts and ends the tour.""")
            )
            sys.stdout.flush()
            try:
                server.wait()
            except KeyboardInterrupt:
                print("\nunmounting")
                return 0
            if server.returncode:
                return fail(f"the mount has ended by itself (exit status {server.returncode})")
            print("It was unmounted.")
            return 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (EngineError, ValueError, subprocess.TimeoutExpired) as error:
        return fail(str(error))


if __name__ == "__main__":
    sys.exit(main())
