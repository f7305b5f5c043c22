"""A small OS layer whose every fact is known: processes with memory in pieces, files of /proc, modules, a kernel.

    with fake_machine(monkeypatch, writable=True) as machine: ...    machine.default_os.layer is a FakeLayer

Real code over real bytes (BytesMemory behind a MemoryMap); tests change `layer.table` to let things happen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import pytest

from engine import registry
from engine.bytes_memory import BytesMemory
from engine.chain import Spec
from engine.errors import NotFoundError, ProcessExitedError, ReadOnlyError
from engine.machine import Machine
from engine.memory import Data, Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.oslayer import Base, HostOwned, Module, Options, OsLayer, Process, ProcFiles
from engine.types import (
    ExportInfo,
    ImportInfo,
    ModuleInfo,
    OsInfo,
    ProcessInfo,
    Region,
    Rights,
    SectionInfo,
    ThreadInfo,
)

READ, READ_WRITE = Rights.READ, Rights.READ | Rights.WRITE
KERNEL = 0xFFFF_8880_0000_0000


class Pieces(MappedMemory):
    """Bytes at addresses, holes between them; 4 KiB pages."""

    def __init__(self, pieces: dict[int, bytes], *, writable: bool = False) -> None:
        data = bytearray(b"".join(pieces.values()))
        ranges, at = [], 0
        for address, part in pieces.items():
            assert not (address | len(part)) % 4096, "pieces are whole pages"
            ranges.append(MapRange(address, len(part), at))
            at += len(part)
        super().__init__(BytesMemory(data), MemoryMap(ranges))
        self.page_size = 4096
        self.data = data
        self.writable = writable

    def write(self, address: int, data: Data) -> None:
        if not self.writable:
            raise ReadOnlyError
        super().write(address, data)


class FakeModule(Module):
    """A module with what it is told to have."""

    def __init__(
        self,
        info: ModuleInfo,
        memory: Memory | None = None,
        *,
        sections: list[SectionInfo] | None = None,
        exports: list[ExportInfo] | None = None,
        imports: list[ImportInfo] | None = None,
    ) -> None:
        self._info = info
        self._memory = memory
        self.section_list = sections or []
        self.export_list = exports or []
        self.import_list = imports or []

    @property
    def info(self) -> ModuleInfo:
        return self._info

    @property
    def memory(self) -> Memory | None:
        return self._memory

    def sections(self) -> Iterator[SectionInfo]:
        return iter(self.section_list)

    def exports(self) -> Iterator[ExportInfo]:
        return iter(self.export_list)

    def imports(self) -> Iterator[ImportInfo]:
        return iter(self.import_list)


@dataclass
class Life:
    """One life of a PID: what the process with it is while it lives."""

    name: str = "program"
    start: int = 1
    pieces: dict[int, bytes] = field(default_factory=lambda: {0x1000: b"one page".ljust(4096, b".")})
    regions: list[Region] | None = None
    files: dict[str, bytes] | None = None
    links: dict[str, str] = field(default_factory=dict)
    modules: list[FakeModule] = field(default_factory=list)
    threads: list[ThreadInfo] = field(default_factory=list)
    owner: tuple[int, int] | None = None
    memory: Pieces | None = None
    opened: int = 0
    """Process objects that were handed out and not closed."""


class Files(ProcFiles):
    """Files and links out of dicts."""

    def __init__(self, process: FakeProcess, prefix: str = "") -> None:
        self.process = process
        self.prefix = prefix

    def names(self) -> tuple[str, ...]:
        return tuple(self.process.life().files or ())

    def read(self, name: str) -> bytes:
        files = self.process.life().files or {}
        if self.prefix + name not in files:
            raise NotFoundError(f"no file {name}")
        return files[self.prefix + name]

    def link(self, name: str) -> str:
        links = self.process.life().links
        if name not in links:
            raise NotFoundError(f"no link {name}")
        return links[name]

    def descriptors(self) -> list[int]:
        return sorted(int(name[3:]) for name in self.process.life().links if name.startswith("fd/"))

    def thread(self, tid: int) -> ProcFiles:
        if tid not in [thread.tid for thread in self.process.life().threads]:
            raise NotFoundError(f"no thread {tid}")
        return Files(self.process, f"{tid}/")


class Owned(HostOwned):
    def __init__(self, process: FakeProcess) -> None:
        self.process = process

    def owner(self) -> tuple[int, int]:
        owner = self.process.life().owner
        assert owner is not None
        return owner


class FakeProcess(Process):
    """A process as it was met; what it tells is of that life."""

    def __init__(self, layer: FakeLayer, pid: int) -> None:
        self.layer = layer
        self.pid = pid
        self.met = layer.table[pid]
        self.met.opened += 1

    def life(self) -> Life:
        if self.layer.table.get(self.pid) is not self.met:
            raise ProcessExitedError(self.pid)
        return self.met

    @property
    def identity(self) -> tuple[int, int]:
        return self.pid, self.met.start

    @property
    def info(self) -> ProcessInfo:
        life = self.life()
        return ProcessInfo(self.pid, life.name, start_ticks=life.start)

    @property
    def memory(self) -> Memory:
        life = self.life()
        if life.memory is None:
            life.memory = Living(self, life.pieces, writable=self.layer.writable)
        return life.memory

    def regions(self) -> Iterator[Region]:
        life = self.life()
        self.layer.listed_regions += 1
        if life.regions is not None:
            return iter(life.regions)
        return (Region(start, len(part), READ_WRITE) for start, part in life.pieces.items())

    def modules(self) -> Iterator[Module]:
        return iter(self.life().modules)

    def threads(self) -> Iterator[ThreadInfo]:
        return iter(self.life().threads)

    def capability(self, kind):
        life = self.life()
        if kind is ProcFiles:
            return None if life.files is None else Files(self)
        if kind is HostOwned:
            return None if life.owner is None else Owned(self)
        return super().capability(kind)

    def close(self) -> None:
        self.met.opened -= 1


class Living(Pieces):
    """Memory that is gone when its process is."""

    def __init__(self, process: FakeProcess, pieces: dict[int, bytes], *, writable: bool) -> None:
        super().__init__(pieces, writable=writable)
        self.process = process

    def readinto(self, address: int, buffer: memoryview) -> None:
        self.process.life()
        super().readinto(address, buffer)

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        self.process.life()
        return super().readinto_nowait(address, buffer)


class FakeLayer(OsLayer):
    """See the module."""

    kind = "fake"
    summary = "an OS for tests"
    needs_memory = False
    options_help = {"live": "no: nothing changes"}

    def __init__(self, *, writable: bool, live: bool) -> None:
        self.table: dict[int, Life] = {}
        self.writable = writable
        self.live = live
        self.kernel_modules: list[FakeModule] = []
        self.kernel: Pieces | None = None
        self.physical: Memory | None = None
        self.listed_regions = 0

    @classmethod
    def open(cls, base: Base, options: Options) -> Self:
        return cls(writable=base.writable, live=options.get("live") != "no")

    @property
    def info(self) -> OsInfo:
        return OsInfo("fake", version="1", live=self.live, writable=self.writable)

    @property
    def physical_memory(self) -> Memory | None:
        return self.physical

    @property
    def kernel_memory(self) -> Memory | None:
        return self.kernel

    def pids(self) -> list[int]:
        return sorted(self.table)

    def process(self, pid: int) -> Process:
        if pid not in self.table:
            raise ProcessExitedError(pid)
        return FakeProcess(self, pid)

    def modules(self) -> Iterator[Module]:
        return iter(self.kernel_modules)

    def close(self) -> None:
        pass


@contextlib.contextmanager
def fake_machine(
    monkeypatch: pytest.MonkeyPatch, *, writable: bool = False, live: bool = True
) -> Iterator[tuple[Machine, FakeLayer]]:
    """A Machine with the fake OS layer open as `fake`, and that layer."""
    monkeypatch.setitem(registry._BUILT_IN["oslayer"], "fake", "fake_os:FakeLayer")
    with Machine(writable=writable) as machine:
        instance = machine.open("oslayer", Spec("fake", "", {} if live else {"live": "no"}))
        layer = instance.layer
        assert isinstance(layer, FakeLayer)
        yield machine, layer
