"""Contract suites: what every Memory, Connector and OsLayer must hold, whoever wrote it.

Each function raises AssertionError that names what does not hold. They are plain asserts, so that a test is
one line; they write only where `check_writes` is called, and put back what they changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field
from functools import partial
from itertools import islice

import numpy as np

from engine.connector import Connector
from engine.errors import EngineError, FaultError, NotFoundError, ReadOnlyError
from engine.memory import Memory
from engine.oslayer import Module, OsLayer, Process
from engine.records import dataclass
from engine.types import ConnectorInfo, Extent, ModuleInfo, OsInfo, ProcessInfo, Region

_WIDTHS = (1, 2, 3, 4, 7, 8, 16, 60, 4096)
_THREADS = 8


@dataclass(frozen=True, slots=True)
class Truth:
    """What is known of a memory before it is asked: bytes at addresses, and ranges that cannot be read."""

    known: Sequence[tuple[int, bytes]]
    holes: Sequence[Extent] = field(default_factory=tuple)


def check_memory(make: Callable[[], Memory], truth: Truth) -> None:
    """All that reading promises, against the truth."""
    memory = make()
    for address, data in truth.known:
        _check_known(memory, address, data)
        _check_columns(memory, address, data)
    for hole in truth.holes:
        _check_hole(memory, hole)
    for address, data in truth.known:
        _check_border(memory, address, data, truth.holes)
    _check_extents(memory, truth)
    _check_outside(memory)
    _check_concurrent(memory, truth)
    if not memory.writable:
        address, data = truth.known[0]
        _raises(ReadOnlyError, lambda: memory.write(address, data[:1]))


def _raises(kind: type[EngineError], act: Callable[[], object]) -> EngineError:
    try:
        act()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} was raised")


def _check_known(memory: Memory, address: int, data: bytes) -> None:
    assert memory.read(address, len(data)) == data, f"read({address:#x}, {len(data)})"
    assert memory.read(address, 0) == b"", "reading nothing gives nothing"
    assert memory.read_padded(address, len(data)) == data, "read_padded of what is there"
    for width in _WIDTHS:
        for offset in {0, 1, len(data) // 2, len(data) - width}:
            if 0 <= offset <= len(data) - width:
                expected = data[offset : offset + width]
                assert memory.read(address + offset, width) == expected, f"read({address + offset:#x}, {width})"
    buffer = memoryview(bytearray(len(data)))
    assert memory.read_available(address, buffer) == len(data), "read_available of what is there"
    assert buffer == data, "read_available"
    buffer = memoryview(bytearray(len(data)))
    if memory.readinto_nowait(address, buffer):
        assert buffer == data, "readinto_nowait"
    if len(data) >= 16:
        for size, door in ((1, memory.u8), (2, memory.u16), (4, memory.u32), (8, memory.u64), (16, memory.u128)):
            assert door(address) == int.from_bytes(data[:size], "little"), f"u{8 * size}({address:#x})"
    view = memory.borrow(address, len(data))
    assert view is None or (view.readonly and bytes(view) == data), "borrow gives the bytes, read-only, or None"
    window = memory.window(address, len(data))
    assert window.read(0, len(data)) == data, "a window on it"
    assert isinstance(_raises(FaultError, lambda: window.read(0, len(data) + 1)), FaultError), "a window ends"
    nul = data.find(0)
    if 0 <= nul < 4096:
        assert memory.cstring(address) == data[:nul], "cstring"
    assert memory.cstring(address, min(3, len(data))) == data[:3].split(b"\0")[0], "cstring with a limit"


def _check_columns(memory: Memory, address: int, data: bytes) -> None:
    generator = np.random.default_rng(len(data))
    for width in _WIDTHS:
        if width > len(data):
            continue
        for count in (0, 1, 3, 100):
            offsets = generator.integers(0, len(data) - width + 1, count)
            addresses = offsets.astype(np.uint64) + np.uint64(address)
            out = np.full((count, width), 0xAA, np.uint8)
            assert not memory.gather(addresses, out), f"gather of {count} rows of {width} met faults"
            for row, offset in enumerate(offsets.tolist()):
                assert out[row].tobytes() == data[offset : offset + width], f"gather row {row} of width {width}"
    if len(data) >= 8:
        offsets = generator.integers(0, len(data) - 7, 50)
        values, faults = memory.words(offsets.astype(np.uint64) + np.uint64(address))
        assert not faults, "words met faults"
        expected = [int.from_bytes(data[o : o + 8], "little") for o in offsets.tolist()]
        assert values.tolist() == expected, "words"
    requests = [(address + i % len(data), 1) for i in range(40)]
    assert memory.read_many(requests) == [data[i % len(data) : i % len(data) + 1] for i in range(40)], "read_many"


def _check_hole(memory: Memory, hole: Extent) -> None:
    for address in {hole.start, hole.start + hole.size // 2, hole.stop - 1}:
        error = _raises(FaultError, partial(memory.read, address, 1))
        assert isinstance(error, FaultError)
        assert error.address == address, f"a fault at {address:#x} says {error.address:#x}"
        out = np.full((2, 1), 0xAA, np.uint8)
        faults = memory.gather(np.array([address, address], np.uint64), out)
        assert faults.rows.tolist() == [0, 1], "gather tells each failed row"
        assert faults.addresses.tolist() == [address, address], "gather tells the first bad address"
        assert not out.any(), "what gather cannot read is zeros"
    size = min(hole.size, 8192)
    assert memory.read_padded(hole.start, size) == bytes(size), "a hole is padded with zeros"
    result = memory.read_many([(hole.start, 1)])[0]
    assert isinstance(result, FaultError), "read_many gives the fault"


def _check_border(memory: Memory, address: int, data: bytes, holes: Sequence[Extent]) -> None:
    """Known bytes in front of a hole: those before it are delivered, the fault is exact."""
    stop = address + len(data)
    hole = next((hole for hole in holes if hole.start == stop), None)
    if hole is None:
        return
    have = min(len(data), 64)
    want = have + min(hole.size, 64)
    buffer = memoryview(bytearray(want))
    error = _raises(FaultError, lambda: memory.readinto(stop - have, buffer))
    assert isinstance(error, FaultError)
    assert error.address == stop, f"the first bad address is {stop:#x}, not {error.address:#x}"
    assert buffer[:have] == data[-have:], "the bytes before a fault are delivered"
    assert memory.read_available(stop - have, buffer) == have, "read_available stops at the hole"
    assert memory.read_padded(stop - have, want) == data[-have:] + bytes(want - have), "read_padded over the border"
    out = np.full((1, want), 0xAA, np.uint8)
    faults = memory.gather(np.array([stop - have], np.uint64), out)
    assert faults.addresses.tolist() == [stop], "gather over the border"
    assert out[0].tobytes() == data[-have:] + bytes(want - have), "gather: bytes before the fault, then zeros"


def _check_extents(memory: Memory, truth: Truth) -> None:
    for address, data in truth.known:
        covered = bytearray(len(data))
        last = -1
        for extent in memory.extents(address, address + len(data)):
            assert extent.size > 0, "extents are never empty"
            assert extent.start > last, "extents ascend and are disjoint"
            assert address <= extent.start, "extents begin where they were asked for"
            assert extent.stop <= address + len(data), "extents stop where they were asked to"
            covered[extent.start - address : extent.stop - address] = b"\1" * extent.size
            last = extent.stop - 1
        outside = bytes(byte for byte, inside in zip(data, covered, strict=True) if not inside)
        assert not any(outside), "what lies outside of all extents reads as zeros"
    for hole in truth.holes:
        assert not list(memory.extents(hole.start, hole.stop)), f"no extent lies in the hole at {hole.start:#x}"


def _check_outside(memory: Memory) -> None:
    size = memory.size
    for address in (size, size + 1, 1 << 64, (1 << 64) + 4096, -1):
        error = _raises(FaultError, partial(memory.read, address, 1))
        assert isinstance(error, FaultError), f"{address:#x} lies outside"


def _check_concurrent(memory: Memory, truth: Truth) -> None:
    wrong: list[str] = []

    def read(seed: int) -> None:
        generator = np.random.default_rng(seed)
        try:
            for _ in range(60):
                address, data = truth.known[int(generator.integers(len(truth.known)))]
                low, high = sorted(int(x) for x in generator.integers(0, len(data) + 1, 2))
                if memory.read(address + low, high - low) != data[low:high]:
                    wrong.append(f"a concurrent reader saw wrong bytes at {address + low:#x}")
        except EngineError as error:
            wrong.append(f"a concurrent reader met {error!r}")

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


def check_writes(memory: Memory, truth: Truth) -> None:
    """All that writing promises; what was written is put back."""
    assert memory.writable, "opened for writing, it says so"
    for address, data in truth.known:
        other = bytes(byte ^ 0xFF for byte in data)
        memory.write(address, other)
        assert memory.read(address, len(data)) == other, "what was written is read"
        memory.write(address + len(data) // 2, memoryview(data)[len(data) // 2 :])
        half = other[: len(data) // 2] + data[len(data) // 2 :]
        assert memory.read(address, len(data)) == half, "a write changes nothing around it"
        memory.write(address, bytearray(data))
        if len(data) >= 64:
            rows = np.arange(24, dtype=np.uint8).reshape(3, 8) + np.uint8(1)
            addresses = np.array([address, address + 16, address + 40], np.uint64)
            assert not memory.scatter(addresses, rows), "scatter met faults"
            out = np.zeros_like(rows)
            memory.gather(addresses, out)
            assert (out == rows).all(), "what was scattered is gathered"
            memory.write(address, data)
        assert memory.read(address, len(data)) == data, "put back"
    for hole in truth.holes:
        error = _raises(FaultError, partial(memory.write, hole.start, b"x"))
        assert isinstance(error, FaultError)
        assert error.address == hole.start, "a write into a hole says where"
        assert len(memory.scatter(np.array([hole.start], np.uint64), np.ones((1, 1), np.uint8))) == 1


def check_connector(connector: Connector, truth: Truth) -> None:
    """All that a connector promises: its memory, its map, its facts; then it is closed."""
    info = connector.info
    assert isinstance(info, ConnectorInfo)
    assert info.kind == connector.kind, "info names the plugin"
    assert info.size == connector.memory.size, "info and memory agree on the size"
    assert info.real_size <= info.size, "there is no more memory than addresses"
    assert info.writable == connector.memory.writable, "info and memory agree on writing"
    assert connector.memory_map.size <= info.size, "the map stays inside"
    assert connector.lease is None or info.live is not connector.lease.held, "it is live once its lease has ended"
    assert type(connector.memory_map).from_toml(connector.memory_map.to_toml()) == connector.memory_map, "map as TOML"
    assert connector.summary, "a connector has a summary"
    connector.hints()
    check_memory(lambda: connector.memory, truth)
    if info.writable:
        check_writes(connector.memory, truth)
    connector.close()
    connector.close()


def check_oslayer(layer: OsLayer, *, alive: Iterable[int] = (), absent: Iterable[int] = (1 << 30,)) -> None:
    """All that an OS layer promises of its lists; `alive` are PIDs that must be there, `absent` ones that must not."""
    info = layer.info
    assert isinstance(info, OsInfo)
    assert info.kind == layer.kind, "info names the plugin"
    pids = layer.pids()
    assert pids == sorted(set(pids)), "PIDs ascend, each once"
    for pid in alive:
        assert pid in pids, f"process {pid} is listed"
        _check_process(layer.process(pid), pid)
    for pid in absent:
        _raises(NotFoundError, partial(layer.process, pid))
    for process in layer.processes():
        assert isinstance(process, Process)
    for module in layer.modules():
        _check_module(module)


def _check_process(process: Process, pid: int) -> None:
    info = process.info
    assert isinstance(info, ProcessInfo)
    assert info.pid == pid, "a process knows its PID"
    assert process.identity == process.identity, "identity is stable"
    hash(process.identity)
    last = 0
    for region in process.regions():
        assert isinstance(region, Region)
        assert region.size > 0, "regions are never empty"
        assert region.start >= last, "regions ascend and are disjoint"
        last = region.stop
    for module in process.modules():
        _check_module(module)
    tids = [thread.tid for thread in process.threads()]
    assert tids == sorted(set(tids)), "threads ascend"
    process.close()
    assert process.info.pid == pid, "a closed process may be used again"


def _check_module(module: Module) -> None:
    info = module.info
    assert isinstance(info, ModuleInfo)
    assert info.name, "a module has a name"
    memory = module.memory
    assert memory is None or info.size is None or memory.size == info.size, "a module's memory is as large as it says"
    names = [entry.name for entry in islice(module.sections(), 50)]
    names += [entry.name for entry in islice(module.exports(), 50)]
    names += [entry.name for entry in islice(module.imports(), 50)]
    assert all(isinstance(name, str) for name in names), "names are text"
