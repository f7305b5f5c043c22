"""Connector `gdb`: memory through a debug stub that speaks GDB's remote serial protocol.

    gdb:1234                            the stub at this port of this machine
    gdb:build-box:3333:size=64K,base=0x20000000
    gdb:/run/vm/gdb.sock:stop=hold      a Unix socket; stopped until it is closed

QEMU's stub (`-gdb tcp::1234`) gives physical memory and, by its monitor, the memory map: no option is needed. Of other
stubs of machines (OpenOCD and its like) the map is what they tell (qXfer:memory-map) or what the options say, and
addresses are what the processor sees. kgdb gives a kernel's virtual addresses: `direct=` says where that kernel maps
all physical memory (page_offset_base of x86-64: 0xffff888000000000 without KASLR). Through its serial line come some
10 KiB a second: a word is there at once, a list of processes after minutes. A stub of one process (gdbserver,
qemu-x86_64 -g, valgrind) is read with `physical=no`: its addresses are that process's, and there is no operating
system to be seen in it.

A stub answers only while its target stands still. With `stop=brief` it is stopped when something is read, and
runs on 20 ms after the last question; with `stop=hold` it stands still until the connector is closed. How it was found
it is left, also where the connection is lost and found again, or this program is killed. kgdb answers only a kernel
that stands still already, and it is left so. Code that is patched through the stub is translated anew by QEMU, which
writing to a guest's memory from outside does not do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

from engine.connector import Connector
from engine.connectors.gdb.documents import parsed
from engine.connectors.gdb.memory import StubMemory
from engine.connectors.gdb.process_map import told_maps, told_process
from engine.connectors.gdb.registers import Description, describe, read_registers
from engine.connectors.gdb.session import Session
from engine.connectors.gdb.stub import Kind
from engine.connectors.gdb.wire import Wire, endpoint
from engine.errors import EngineError, InvalidArgumentError, UnusableTargetError
from engine.formats.qemu_monitor import memory_backends, ram_views
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap, read_map_file
from engine.middleware import truth
from engine.numbers import parse_number
from engine.oslayer import Options, OsLayer
from engine.types import ADDRESS_SPACE, ConnectorInfo, TargetHints

TIMEOUT = 5.0
TIMEOUT_MOST = 600.0
RANGES_MOST = 1 << 12
_ARCHITECTURES = {
    "i386:x86-64": "x86-64",
    "i386": "i386",
    "aarch64": "aarch64",
    "arm": "arm",
    "riscv:rv64": "riscv64",
    "riscv:rv32": "riscv32",
}
_ADDRESSES = {
    Kind.QEMU: "addresses are what the processor sees: physical ones are left out, as physical=no says",
    Kind.PROCESS: "addresses are those of the process that the stub debugs; no operating system is to be seen in it",
    Kind.KERNEL: "addresses are what the processor sees: kgdb has no physical ones",
    Kind.TARGET: "addresses are what the processor sees: this stub has no physical ones",
}
_TOP_TABLE = 0x000F_FFFF_FFFF_F000
"""Bits of CR3 that are the address of the top table (Intel SDM vol. 3, 4.5)."""


class GdbConnector(Connector):
    """Memory behind a debug stub."""

    kind = "gdb"
    summary = "memory through a debug stub (QEMU's -gdb, kgdb, OpenOCD, gdbserver)"
    options_help = {
        "stop": "brief: stopped while one reads; hold: until it is closed (brief)",
        "physical": "no: addresses as the processor sees them (yes where the stub has both)",
        "map": "a TOML file of ranges: base, length",
        "base": "first address, where the stub tells no map (0)",
        "size": "bytes of memory, where the stub tells no map",
        "direct": "where a kernel maps all physical memory, for stubs without physical addresses (kgdb)",
        "timeout": "seconds for an answer (5)",
    }

    def __init__(
        self, target: str, session: Session, memory: Memory, description: Description, notes: tuple[str, ...]
    ) -> None:
        self._target = target
        self._session = session
        self._memory = memory
        self._description = description
        self._notes = notes

    @classmethod
    def open(cls, target: str, options: Options, *, parent: OsLayer | None, writable: bool) -> Self:
        """Connect to the stub. Raises NotFoundError, TargetTimeoutError, UnsupportedError, InvalidArgumentError."""
        if parent is not None:
            raise InvalidArgumentError("gdb stands on a stub's address, not on an OS layer: leave -c out")
        where = endpoint(target)
        stop = options.get("stop", "brief")
        if stop not in ("brief", "hold"):
            raise InvalidArgumentError(f"stop={stop}: want brief or hold")
        given, direct = _given_map(options), _direct(options)
        physical = truth("physical", options["physical"]) if "physical" in options else None
        if direct is not None:
            if physical:
                raise InvalidArgumentError("gdb: direct= is for stubs without physical addresses: leave physical= out")
            physical = False
        session = Session(where, _seconds(options.get("timeout")), hold=stop == "hold", physical=physical)
        try:
            memory_map, origin = (given, "the options") if given else _map_of(session, told=physical is False)
            if direct is None:
                memory: Memory = StubMemory(session, memory_map, writable=writable)
            else:
                beneath = [replace(one, base=one.base + direct) for one in memory_map.ranges]
                stub = StubMemory(session, MemoryMap(beneath), writable=writable)
                moved = [replace(one, real_base=one.base + direct) for one in memory_map.ranges]
                memory = MappedMemory(stub, MemoryMap(moved))
                origin += f"; physical memory as a kernel maps it from {direct:#x} on"
            return cls(target, session, memory, session.use(describe), (f"memory map: by {origin}",))
        except BaseException:
            session.close()
            raise

    @property
    def memory(self) -> Memory:
        """See `Connector.memory`."""
        return self._memory

    @property
    def memory_map(self) -> MemoryMap:
        """See `Connector.memory_map`."""
        memory = self._memory
        return memory.memory_map if isinstance(memory, (StubMemory, MappedMemory)) else MemoryMap([])

    @property
    def info(self) -> ConnectorInfo:
        """See `Connector.info`."""
        session = self._session
        how = "until this is closed" if session.hold else "whenever something is read; it runs on 20 ms later"
        if session.was_running:
            notes = [*self._notes, f"the target is stopped {how} ({session.stops} times so far)"]
        else:
            notes = [*self._notes, "the target stood still when it was found, and is left so"]
        if not session.stub.physical:
            notes.append(_ADDRESSES[session.stub.kind])
        return ConnectorInfo(
            kind=self.kind,
            target=self._target,
            size=self._memory.size,
            real_size=self.memory_map.real_size,
            live=True,
            writable=self._memory.writable,
            notes=tuple(notes),
        )

    def hints(self) -> TargetHints:
        """See `Connector.hints`: the registers of all processors; nothing where the stub does not answer."""
        architecture = self._description.architecture
        try:
            registers = self._session.use(lambda wire: read_registers(wire, self._description))
        except EngineError:
            registers = []
        cr3 = next((values["cr3"] for values in registers if "cr3" in values), None)
        return TargetHints(
            architecture=_ARCHITECTURES.get(architecture or "", architecture),
            dtb=cr3 & _TOP_TABLE if cr3 else None,
            registers=tuple(registers),
        )

    def pause(self) -> None:
        """See `Connector.pause`."""
        self._session.pause()

    def resume(self) -> None:
        """See `Connector.resume`."""
        self._session.resume()

    def close(self) -> None:
        """See `Connector.close`: the target is left as it was found."""
        self._session.close()


def _seconds(word: str | None) -> float:
    try:
        seconds = TIMEOUT if word is None else float(word)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= TIMEOUT_MOST:
        raise InvalidArgumentError(f"timeout={word}: want seconds up to {TIMEOUT_MOST:g}")
    return seconds


def _given_map(options: Options) -> MemoryMap | None:
    if "map" in options:
        if "size" in options or "base" in options:
            raise InvalidArgumentError("gdb: map= and base=, size= exclude each other: a map says every base")
        return read_map_file(options["map"])
    if "size" not in options:
        if "base" in options:
            raise InvalidArgumentError("gdb: base= wants size=")
        return None
    base, size = parse_number(options.get("base", "0"), "base="), parse_number(options["size"], "size=")
    if not 0 < size <= ADDRESS_SPACE - base:
        raise InvalidArgumentError(f"size={options['size']} at base={base:#x} leaves the 64-bit address space")
    return MemoryMap([MapRange(base, size, base)])


def _direct(options: Options) -> int | None:
    if "direct" not in options:
        return None
    if "size" not in options and "map" not in options:
        raise InvalidArgumentError("gdb: direct= wants size= or map=: how much physical memory is mapped there")
    return parse_number(options["direct"], "direct=")


def _map_of(session: Session, *, told: bool) -> tuple[MemoryMap, str]:
    """The memory map that the stub tells, and how; `told`: virtual addresses are what was asked for.

    Raises UnusableTargetError where the stub tells none, or what is wanted has to be said first.
    """
    kind = session.stub.kind
    if kind is Kind.PROCESS:
        process = session.use(told_process)
        if not told:
            raise UnusableTargetError(
                f"the stub at {session.name} debugs {process}, not a machine: with physical=no its memory is read"
            )
        found = session.use(lambda wire: told_maps(wire, process))
        if found is not None:
            return found, f"what is mapped into {process}"
    elif kind is Kind.KERNEL:
        raise UnusableTargetError(
            f"the stub at {session.name} is kgdb, which gives a kernel's virtual addresses and tells no map: say where "
            "that kernel maps all physical memory (direct=, size=), or which addresses to read (base=, size=)"
        )
    elif session.stub.physical and (views := session.use(_views)) is not None:
        return views, "QEMU's monitor"
    elif kind is not Kind.QEMU and (ranges := session.use(_told_ranges)):
        return MemoryMap(ranges), "the stub's memory map"
    raise UnusableTargetError(f"the stub at {session.name} tells no memory map: say size= (and base=) or map=")


def _views(wire: Wire) -> MemoryMap | None:
    backends = memory_backends(wire.monitor("info memdev") or "")
    views = ram_views(wire.monitor("info mtree -f") or "", backends)
    return MemoryMap([MapRange(view.address, view.size, view.address) for view in views]) if views else None


def _told_ranges(wire: Wire) -> list[MapRange]:
    text = wire.document("memory-map", "")
    return [] if text is None else _ranges_of(text)


def _ranges_of(text: bytes) -> list[MapRange]:
    """RAM, ROM and flash of a document memory-map («Debugging with GDB», Memory Map Format)."""
    root = parsed(text)
    found: list[MapRange] = []
    for node in [] if root is None else list(root.iter("memory"))[:RANGES_MOST]:
        try:
            base, length = int(node.get("start", ""), 0), int(node.get("length", ""), 0)
        except ValueError:
            continue
        if length > 0 and 0 <= base <= ADDRESS_SPACE - length:
            found.append(MapRange(base, length, base))
    return found
