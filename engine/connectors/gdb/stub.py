"""What a stub is, and how it is greeted and left: QEMU's, one of a process, kgdb, a probe's.

    stub = greet(wire, physical=None)
    stub.kind, stub.was_running, stub.physical
    leave(wire, stub)

Sources: «Debugging with GDB», appendix «GDB Remote Serial Protocol» (GDB 13); QEMU gdbstub.c, 7.2 and 8.1; Linux
kernel/debug/gdbstub.c (6.1: `qThreadExtraInfo` of what stands for a processor says shadowCPU).
"""

from __future__ import annotations

import enum
import re
from dataclasses import field

from engine.connectors.gdb.wire import PACKET_MOST, Wire
from engine.errors import TargetGoneError
from engine.records import dataclass

DEFAULT_PACKET = 400
"""Bytes of a packet where the stub announces no PacketSize."""
CHUNK_MOST = 1 << 14
STRAY_ANSWERS = 16
"""Answers that were meant for whoever was connected before: on a serial line they arrive at the next one's."""
TELLS_STOPS_BEFORE = (8, 1)
"""QEMU up to here says by itself that connecting has stopped it (gdbstub: «unsolicited stop replies»)."""
_FEATURES = re.compile(rb"[A-Za-z][A-Za-z0-9.:_-]*(?:=[^;]*|[-+?])(?:;.*)?", re.DOTALL)
_OF_PROCESS = ("qXfer:auxv:read+", "qXfer:exec-file:read+")
_DETACH, _DETACH_FIRST, _VIRTUAL = b"D", b"D;1", b"Qqemu.PhyMemMode:0"


class Kind(enum.Enum):
    """What stands behind a stub, as far as it shows."""

    QEMU = "QEMU"
    PROCESS = "a process"
    KERNEL = "kgdb"
    TARGET = "a target"


@dataclass(frozen=True, slots=True)
class Stub:
    """What a stub has told of itself."""

    kind: Kind
    physical: bool = False
    """Whether addresses are physical ones."""
    was_running: bool = True
    """Whether its target ran before somebody connected, as far as that can be known."""
    features: dict[str, str] = field(default_factory=dict)

    @property
    def chunk(self) -> int:
        """Bytes of one read or write: half a packet, for they travel in hexadecimal."""
        try:
            size = int(self.features.get("PacketSize", ""), 16)
        except ValueError:
            size = DEFAULT_PACKET
        half = max(16, min(size, 2 * CHUNK_MOST, PACKET_MOST) // 2)
        return 1 << half.bit_length() - 1


def greet(wire: Wire, *, physical: bool | None) -> Stub:
    """Learn what the stub is, and have it give physical addresses where it can, unless `physical` is False.

    Raises TargetGoneError where its target has ended.
    """
    reply = _features(wire)
    features = dict(word.partition("=")[::2] for word in reply.split(";") if word)
    if "QStartNoAckMode+" in features and wire.ask(b"QStartNoAckMode") == b"OK":
        wire.acknowledges = False
    kind = _kind(wire, features)
    if kind is Kind.QEMU:
        was_running = _ran(wire)
        wire.checks_order = False
    else:
        was_running = kind is not Kind.KERNEL  # which answers only once it stands still
        wire.status()  # some name no target before they are asked this, and then detach from none
    has_physical = kind is Kind.QEMU and physical is not False and wire.ask(b"Qqemu.PhyMemMode:1") == b"OK"
    return Stub(kind, has_physical, was_running, features)


def _features(wire: Wire) -> str:
    """The answer to qSupported; what was meant for another is passed over."""
    reply = wire.ask(b"qSupported:xmlRegisters=i386")
    for _ in range(STRAY_ANSWERS):
        if not reply or _FEATURES.fullmatch(reply):
            break
        reply = wire.answer()
    return reply.decode(errors="replace")


def _kind(wire: Wire, features: dict[str, str]) -> Kind:
    if wire.ask(b"qqemu.PhyMemMode") in (b"0", b"1"):
        return Kind.QEMU
    if any(name in features for name in _OF_PROCESS):
        return Kind.PROCESS
    first = wire.ask(b"qfThreadInfo").partition(b",")[0]
    if first[:1] == b"m" and wire.ask(b"qThreadExtraInfo," + first[1:]).startswith(b"shadowCPU".hex().encode()):
        return Kind.KERNEL
    return Kind.TARGET


def _ran(wire: Wire) -> bool:
    """Whether the machine in QEMU ran before."""
    if wire.stray:
        return True
    status, version = wire.monitor("info status") or "", wire.monitor("info version") or ""
    if re.search(r"paused \(|: running|prelaunch|shutdown|inmigrate|postmigrate", status):
        return ": running" in status
    told = re.match(r"\s*([0-9]+)\.([0-9]+)", version)
    return told is None or (int(told[1]), int(told[2])) >= TELLS_STOPS_BEFORE


def leave(wire: Wire, stub: Stub, *, runs_on: bool) -> None:
    """Undo what `greet` did, and let the target go where it is to run on: it stands still."""
    if stub.physical:
        wire.ask(_VIRTUAL)
    if not runs_on:
        return
    try:
        # Once a client has asked for several processes QEMU wants to be told which, for all clients after.
        if wire.ask(_DETACH) != b"OK" and wire.ask(_DETACH_FIRST) != b"OK":
            wire.tell(b"c")
    except TargetGoneError:
        return  # some hang up by themselves


def last_words(stub: Stub) -> tuple[bytes, ...]:
    """What lets the target run on in the mouth of somebody who can but speak, and does not hear whether it was right.

    QEMU is told to continue, since it may want to hear of which process a client detaches; of others some kill what
    they run when a client that has not detached hangs up.
    """
    if stub.kind is Kind.QEMU:
        return (*([_VIRTUAL] if stub.physical else []), b"c")
    return (_DETACH,)


__all__ = ["Kind", "Stub", "greet", "last_words", "leave"]
