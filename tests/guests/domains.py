"""Domains of libvirt: of the daemon that runs on this machine, or else of one that is started for the tests.

The one that we start has its configuration, its images and its logs in a mount namespace of its own, and its guests
with them: nothing of this machine changes but the sockets in /run/libvirt, which go when it does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ending import ends_with_us
from guests.living import wait_until
from support import require

URI = "qemu:///system"
SOCKETS = Path("/run/libvirt")
SETTINGS = """user = "root"
group = "root"
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
"""
"""Of QEMU's driver (/etc/libvirt/qemu.conf). It looks for a user of its own before it reads that it needs none."""
_PRIVATE = """set -e
for place in etc var/lib var/log var/cache; do
    mkdir -p "/$place/libvirt"
    mount -t tmpfs tests "/$place/libvirt"
done
printf %s "$0" > /etc/libvirt/qemu.conf
for list in passwd group; do
    grep -v ^libvirt-qemu: "/etc/$list" > "/etc/libvirt/$list"
    echo libvirt-qemu:x:0:0::/:/bin/false >> "/etc/libvirt/$list"
    mount --bind "/etc/libvirt/$list" "/etc/$list"
done
mkdir /etc/libvirt/bin
ln -s "$(command -v qemu-system-x86_64)" /etc/libvirt/bin
PATH=/etc/libvirt/bin exec "$@"
"""
"""It asks each emulator in its PATH what it can do, which takes two seconds: it finds one."""
_LIMIT = 60.0


def virsh(*words: str) -> str:
    """What virsh prints. Raises CalledProcessError."""
    done = subprocess.run(
        ["virsh", "--connect", URI, *words], capture_output=True, text=True, timeout=_LIMIT, check=False
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
    return done.stdout


def _answers() -> bool:
    with contextlib.suppress(subprocess.CalledProcessError):
        return bool(virsh("version"))
    return False


@contextlib.contextmanager
def libvirt() -> Iterator[None]:
    """libvirt's system daemon, at its usual place; skips the test where there is none to be had."""
    require(shutil.which("virsh"), "there is no virsh (libvirt-clients)")
    if _answers():
        yield
        return
    daemon = shutil.which("libvirtd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    require(os.geteuid() == 0 and daemon, "no libvirt answers here, and only root can start libvirtd (libvirt-daemon)")
    require(shutil.which("qemu-system-x86_64"), "qemu-system-x86_64 is missing")
    SOCKETS.mkdir(exist_ok=True)
    with contextlib.ExitStack() as held:
        lock = held.enter_context(open(SOCKETS / "cloudfs-tests", "w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs of the tests cannot have the one place
        log = held.enter_context(tempfile.TemporaryFile())
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _PRIVATE, SETTINGS, str(daemon)]
        process = subprocess.Popen([*ends_with_us("TERM"), *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        held.callback(_end, process)
        wait_until(lambda: _answers() or process.poll() is not None, _LIMIT, "libvirtd")
        if process.poll() is not None:
            log.seek(0)
            require(False, f"libvirtd does not run here: {log.read().decode(errors='replace')[-500:]}")
        yield


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(20)


@contextlib.contextmanager
def domain(name: str, description: str) -> Iterator[int]:
    """A domain that runs until the end, by its XML; gives the PID of its QEMU."""
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(description)
        file.flush()
        virsh("create", file.name)
    try:
        yield next(int(pid) for pid in os.listdir("/proc") if pid.isdecimal() and _is_of(pid, name))
    finally:
        virsh("destroy", name)


def _is_of(pid: str, name: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"guest={name.replace(',', ',,')},debug-threads=on".encode() in words
