"""What a stub of a process tells of it: which it is, and what it has mapped.

Sources: «Debugging with GDB», appendix «GDB Remote Serial Protocol» (GDB 13): qC, qXfer:exec-file, «File-I/O» (vFile);
proc_pid_maps(5).
"""

from __future__ import annotations

import contextlib
import re

from engine.connectors.gdb.wire import Wire
from engine.errors import EngineError, InvalidArgumentError
from engine.memory_map import MapRange, MemoryMap
from engine.records import dataclass
from engine.types import ADDRESS_SPACE

MAPS_MOST = 16 << 20
"""Bytes of /proc/PID/maps."""
RANGES_MOST = 1 << 16
READ_AT_ONCE = 1 << 10
PATH_MOST = 4096
_LINE = re.compile(rb"([0-9a-f]{1,16})-([0-9a-f]{1,16}) (r)?")
_DEVICES = (b"[vvar]", b"[vsyscall]", b"[vvar_vclock]")
"""What only its own process can read."""


@dataclass(frozen=True, slots=True)
class DebuggedProcess:
    """A process behind a stub; None is what the stub does not tell."""

    pid: int | None
    path: str | None

    def __str__(self) -> str:
        words = [word for word in (f"PID {self.pid}" if self.pid else None, self.path) if word]
        return f"a process ({', '.join(words)})" if words else "a process"


def told_process(wire: Wire) -> DebuggedProcess:
    """Which process it is, as far as the stub tells."""
    reply = re.fullmatch(rb"QC(?:p([0-9a-f]{1,8})\.[0-9a-f]+|([0-9a-f]{1,8}))", wire.ask(b"qC"))
    pid = int(reply[1] or reply[2], 16) if reply else None
    path = wire.document("exec-file", "", PATH_MOST)
    return DebuggedProcess(pid, path.decode(errors="backslashreplace") if path else None)


def told_maps(wire: Wire, process: DebuggedProcess) -> MemoryMap | None:
    """What it has mapped and may read, where the stub reads files for its clients; None where it does not."""
    if process.pid is None:
        return None
    text = _file(wire, f"/proc/{process.pid}/maps")
    ranges = []
    for line in text.splitlines()[:RANGES_MOST]:
        found = _LINE.match(line)
        if found and found[3] and not line.endswith(_DEVICES):
            start, stop = int(found[1], 16), int(found[2], 16)
            if start < stop <= ADDRESS_SPACE:
                ranges.append(MapRange(start, stop - start, start))
    with contextlib.suppress(InvalidArgumentError):  # ranges that overlap are of no process
        return MemoryMap(ranges) if ranges else None
    return None


def _file(wire: Wire, path: str) -> bytes:
    """A file as the stub sees it; nothing where it reads none."""
    opened = _number(wire.ask(b"vFile:open:" + path.encode().hex().encode() + b",0,0"))
    if opened is None:
        return b""
    data = bytearray()
    try:
        while len(data) < MAPS_MOST:
            reply = wire.ask(b"vFile:pread:%x,%x,%x" % (opened, READ_AT_ONCE, len(data)))
            size, _, part = reply.partition(b";")
            if not _number(size) or not part:
                break
            data += part
    finally:
        with contextlib.suppress(EngineError):
            wire.ask(b"vFile:close:%x" % opened)
    return bytes(data)


def _number(reply: bytes) -> int | None:
    """The result of a call; None where it failed, or is not known."""
    found = re.fullmatch(rb"F([0-9a-fA-F]{1,8})", reply)
    return int(found[1], 16) if found else None
