"""A machine without an operating system in QEMU, with known bytes in its memory: to try connectors on."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ending import ends_with_us
from support import require

PLACE = 0x20_0000
"""Physical address of the known bytes."""
RAM = 64 << 20
LIMIT = 30.0


@dataclass
class BareMachine:
    """A running QEMU."""

    folder: Path
    process: subprocess.Popen[bytes]
    known: bytes

    @property
    def stub(self) -> str:
        """The socket of its debug stub."""
        return f"{self.folder}/gdb"

    def monitor(self, command: str) -> str:
        """What the human monitor prints."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(LIMIT)
            connection.connect(f"{self.folder}/monitor")
            prompt = b"(qemu) "
            text = _until(connection, prompt)
            connection.sendall(command.encode() + b"\n")
            text = _until(connection, prompt)
        return text.decode(errors="replace").replace("\r", "").partition("\n")[2]

    def status(self) -> str:
        """running, or why not."""
        return self.monitor("info status").split(":", 1)[1].split("\n")[0].strip()

    def wait_until(self, status: str) -> None:
        """Until it has that status."""
        deadline = time.monotonic() + LIMIT
        while self.status() != status:
            assert time.monotonic() < deadline, f"the machine is {self.status()}, never {status}"
            time.sleep(0.02)


def _listens(place: Path) -> bool:
    """Whether somebody listens at the socket: it is there somewhat sooner (unix(7): __SO_ACCEPTCON)."""
    rows = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return any(row[-1] == str(place) and int(row[3], 16) & 0x10000 for row in rows)


def _until(connection: socket.socket, end: bytes) -> bytes:
    text = b""
    while not text.endswith(end):
        part = connection.recv(1 << 16)
        assert part, "QEMU hung up"
        text += part
    return text


@contextlib.contextmanager
def bare_machine(*words: str, known: bytes | None = None) -> Iterator[BareMachine]:
    """A PC that spins in its firmware; `words` are more of QEMU's command line. It is killed in the end."""
    binary = shutil.which("qemu-system-x86_64")
    require(binary is not None, "qemu-system-x86_64 is missing")
    assert binary is not None
    known = os.urandom(1 << 20) if known is None else known
    with tempfile.TemporaryDirectory(prefix="cloudfs-bare-") as name:
        folder = Path(name)
        (folder / "known").write_bytes(known)
        process = subprocess.Popen(
            [
                *ends_with_us(), binary, "-accel", "tcg", "-m", f"{RAM >> 20}M", "-nodefaults", "-no-user-config",
                "-display", "none", "-gdb", f"unix:{name}/gdb,server=on,wait=off",
                "-monitor", f"unix:{name}/monitor,server=on,wait=off",
                "-device", f"loader,file={name}/known,addr={PLACE:#x},force-raw=on", *words,
            ],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            machine = BareMachine(folder, process, known)
            deadline = time.monotonic() + LIMIT
            while not (_listens(folder / "monitor") and _listens(folder / "gdb")):
                assert process.poll() is None, "QEMU ended at once"
                assert time.monotonic() < deadline, "QEMU does not start"
                time.sleep(0.02)
            yield machine
        finally:
            process.kill()
            process.wait(LIMIT)
