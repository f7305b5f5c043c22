"""A package of somebody else: an OS layer `toy` that stands on a connector, and a connector `tar-pit` that hangs.

    with mounted("tar-pit", "-o", "toy", environment=installed(folder)) as mount: ...
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Self

from fake_os import KERNEL, FakeLayer, FakeProcess, Files, Life, Pieces

from engine.connectors.dummy import DummyConnector
from engine.errors import BadDataError
from engine.memory import Memory
from engine.middleware import MeteredMemory
from engine.oslayer import Base, Options, OsLayer, Process
from engine.types import ConnectorInfo, ProcessInfo

NAMES = {10: "init", 11: "a/b\nc", 12: "\x1b[31mred", 13: "..", 14: "long" * 2000, 15: "nul\0", 16: "twin", 17: "twin",
         18: "\udcff\udcfe", 20: ""}  # fmt: skip
"""PID → name. Process 19 has a structure that cannot be read."""
BROKEN = 19
KERNEL_BYTES = b"kernel bytes at their address".ljust(4096, b"k")
PIT = 1 << 20
"""Reads of the connector that go beyond wait for ever."""


class Toy(FakeLayer):
    """Processes with names that no file can have, one that is broken, and a kernel."""

    kind = "toy"
    needs_memory = True

    @classmethod
    def open(cls, base: Base, options: Options) -> Self:
        layer = cls(writable=base.writable, live=True)
        layer.table = {pid: Life(name=name) for pid, name in NAMES.items()}
        layer.table[10].files = {"cmdline": b"init\0", "comm": b"init\n"}
        layer.table[10].links = {"exe": "/sbin/init", "cwd": "/", "root": "/", "fd/0": "/etc/passwd"}
        layer.table[BROKEN] = Life()
        layer.kernel = Pieces({KERNEL: KERNEL_BYTES}, writable=base.writable)
        return layer

    def process(self, pid: int) -> Process:
        return Broken(self, pid) if pid == BROKEN else super().process(pid)


class Broken(FakeProcess):
    """A process of which nothing but the PID is known."""

    @property
    def info(self) -> ProcessInfo:
        raise BadDataError("the structure of the process is garbage")

    @property
    def memory(self) -> Memory:
        raise BadDataError("the structure of the process is garbage")

    def regions(self):
        raise BadDataError("the structure of the process is garbage")

    modules = threads = regions

    def capability(self, kind):
        return Files(self) if kind is Files else None


class PitMemory(MeteredMemory):
    """Memory of which all beyond PIT never answers."""

    @property
    def may_block(self) -> bool:
        return True

    def readinto(self, address: int, buffer: memoryview) -> None:
        if address + len(buffer) > PIT:
            threading.Event().wait()
        super().readinto(address, buffer)

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        return False


class TarPit(DummyConnector):
    """`dummy` over memory that hangs."""

    kind = "tar-pit"

    @classmethod
    def open(cls, target: str, options: Options, *, parent: OsLayer | None, writable: bool) -> Self:
        made = super().open(target, {"size": "4M", **options}, parent=parent, writable=writable)
        made.pit = PitMemory(made._memory)
        return made

    @property
    def info(self) -> ConnectorInfo:
        return replace(super().info, live=True)  # of what is cached, the kernel makes readers wait for one another

    @property
    def memory(self) -> Memory:
        return self.pit


def installed(folder: Path) -> dict[str, str]:
    """Make the package known to programs that run in this environment."""
    about = folder / "toy-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[cloudfs.oslayers]\ntoy = toy_package:Toy\n[cloudfs.connectors]\ntar-pit = toy_package:TarPit\n"
    )
    tests = Path(__file__).parent
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(tests), str(tests.parent)])}
