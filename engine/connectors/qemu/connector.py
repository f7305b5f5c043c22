"""Connector `qemu`: the memory of a guest that QEMU runs, with TCG or KVM.

    qemu                       the only guest that runs here
    qemu:web-01                by its name (-name), or by the PID of its QEMU
    qemu:web-01:qmp=no         without asking QEMU's monitor
    qemu:4711:base=0x7f0000000000,size=2G     where its RAM lies in the process, where that is not found

It stands on an OS layer, by default `native`, this host: over another one it finds guests in a guest. RAM in a file or
in shared memory is mapped, private RAM read from the process. Other programs that hold a guest (cloud-hypervisor,
Firecracker, crosvm) can be opened by PID with base=, size= and map=; that is untested.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Self

from engine.connector import Connector, Target
from engine.connectors.qemu.asking import ask, is_stopped
from engine.connectors.qemu.finding import Guest, find, guests, stranger
from engine.connectors.qemu.layout_sources import Placed, by_machine, by_monitor, by_options
from engine.connectors.qemu.mapped import Mapped
from engine.connectors.qemu.presence import Presence
from engine.connectors.qemu.ram import Run, runs
from engine.connectors.qemu.sources import RamMemory
from engine.errors import (
    AccessDeniedError,
    EngineError,
    InvalidArgumentError,
    NotFoundError,
    TargetGoneError,
    UnsupportedError,
)
from engine.formats.qemu_monitor import registers, status
from engine.machine_states import ENDED, SENTENCES, STOPPED
from engine.memory import Memory
from engine.memory_map import MapRange, MemoryMap, read_map_file
from engine.middleware import truth
from engine.numbers import parse_number
from engine.oslayer import Options, OsLayer
from engine.types import ConnectorInfo, TargetHints

TRANSLATED = (
    "its code is translated (TCG): a write from outside is seen by what reads memory, but code that was translated "
    "already goes on as it was; patch code through QEMU's gdb stub"
)


LIFETIME, BELIEVED = 1.0, 10.0
"""Seconds for which a state that was told is not asked for again, and for which it is shown."""
PATIENCE = 10.0
"""Seconds for which a monitor that did not answer is not asked for registers again: every OS layer wants them."""
PATIENCE_MOST = 120.0
"""It is doubled each time, up to so many."""


class QemuConnector(Connector):
    """A guest's physical memory, in its QEMU."""

    kind = "qemu"
    summary = "a running QEMU/KVM guest, by name or PID"
    default_parent = "native"
    options_help = {
        "qmp": "no: ask no monitor of QEMU for the layout of RAM, registers, state (yes: where one answers)",
        "base": "address in QEMU's process where RAM begins, where it is not found",
        "size": "bytes of RAM (as the command line says)",
        "map": "a TOML file of ranges: base (physical), length, real_base (offset in RAM)",
    }

    def __init__(self, guest: Guest, placed: Placed, mapped: Mapped, presence: Presence, *, live: bool) -> None:
        self._guest = guest
        self._mapped = mapped
        self._live = live
        self._ask_again = 0.0
        self._patience = PATIENCE
        self.asks = True
        """Whether its monitor may be asked for what it knows."""
        self._told: tuple[float, TargetHints] | None = None
        memory, self._memory_map = mapped.physical(placed.ranges)
        self._memory = RamMemory(memory, presence, mapped.looker(presence))
        self._notes = placed.notes
        self._memory.read_padded(placed.ranges[0].base, 1)  # a lack of rights is said now

    @classmethod
    def open(cls, target: str, options: Options, *, parent: OsLayer | None, writable: bool) -> Self:
        """Find the guest and its RAM.

        Raises NotFoundError or InvalidArgumentError with the guests that there are, UnusableTargetError where its RAM
        or layout is not known, with what to pass, UnsupportedError where its memory is encrypted, AccessDeniedError.
        """
        if parent is None:
            raise InvalidArgumentError("qemu stands on an OS layer, whose processes it looks at: name one with -o")
        base, size = (parse_number(options[key], f"{key}=") if key in options else None for key in ("base", "size"))
        memory_map = read_map_file(options["map"]) if "map" in options else None
        guest = _guest(parent, target, foreign=base is not None)
        if guest.line.encryption:
            raise UnsupportedError(
                f"the memory of {guest} is encrypted ({guest.line.encryption}): its host cannot read it"
            )
        if guest.line.holds_nothing:
            raise UnsupportedError(f"{guest} is a domain of Xen: its memory is Xen's, and not in QEMU")
        live = parent.info.live
        presence = Presence(guest.process, f"the QEMU of {guest}", on_host=guest.on_host, live=live)
        with contextlib.ExitStack() as failed:
            found = _mappings(guest)
            mapped = Mapped(guest, found, writable=writable)
            failed.callback(mapped.close)
            placed = by_options(guest, base, size, memory_map)
            reason = ""
            if placed is None and memory_map is None and size is None and live and _wants_qmp(options):
                try:
                    placed = by_monitor(guest, found)
                except UnsupportedError as error:
                    reason = str(error) if guest.line.monitors else ""
            if placed is None:
                if size is not None:
                    guest = guest.resized(size)

                def view(ranges: Sequence[MapRange]) -> Memory:
                    return mapped.physical(ranges)[0]

                placed = by_machine(guest, found, memory_map, view)
            opened = cls(guest, placed, mapped, presence, live=live)
            opened._notes += (reason,) if reason else ()
            opened.asks = _wants_qmp(options)
            failed.pop_all()
        return opened

    @classmethod
    def targets(cls, parent: OsLayer | None) -> Iterator[Target]:
        """The guests that run on the parent, by name where it is theirs alone and can be typed, else by PID."""
        if parent is None:
            return
        found = list(guests(parent))
        names = [guest.line.name for guest in found]
        for guest in found:
            told = guest.line.name is not None and names.count(guest.line.name) == 1 and guest.line.name.isprintable()
            yield Target(guest.name if told else str(guest.pid), guest.description)

    @property
    def memory(self) -> Memory:
        """See `Connector.memory`."""
        return self._memory

    @property
    def memory_map(self) -> MemoryMap:
        """See `Connector.memory_map`: addresses in the file that is RAM, or else in QEMU's process."""
        return self._memory_map

    @property
    def info(self) -> ConnectorInfo:
        """See `Connector.info`."""
        notes = [*self._notes, *self._mapped.notes]
        if self._memory.writable and self._guest.line.translates:
            notes.append(TRANSLATED)
        state = self._state()
        if state is not None and state in SENTENCES:
            notes.append(SENTENCES[state])
        return ConnectorInfo(
            kind=self.kind,
            state=state,
            target=str(self._guest),
            size=self._memory.size,
            real_size=self._memory_map.real_size,
            live=self._live,
            writable=self._memory.writable,
            notes=tuple(notes),
        )

    def hints(self) -> TargetHints:
        """See `Connector.hints`: registers too, where QEMU's monitor answers now."""
        architecture = self._guest.architecture
        if not self.asks or not self._live or time.monotonic() < self._ask_again:
            return TargetHints(architecture=architecture, state=self._stopped())
        try:
            state, found = self._ask("info status", "info registers -a")
        except (EngineError, OSError):
            self._ask_again = time.monotonic() + self._patience
            self._patience = min(2 * self._patience, PATIENCE_MOST)
            return TargetHints(architecture=architecture, state=self._stopped())
        self._patience = PATIENCE
        return TargetHints(architecture=architecture, registers=tuple(registers(found)), state=status(state))

    def ask(self) -> TargetHints | None:
        """See `Connector.ask`: by QEMU's monitor, at most once in a second."""
        if not self._live:
            return None
        if self._told is None or time.monotonic() > self._told[0]:
            found = self.hints()
            self._told = time.monotonic() + LIFETIME, found
        return self._told[1]

    def _state(self) -> str | None:
        """What is known of whether it runs without asking a monitor, or walking through another guest."""
        if not self._live:
            return None
        if self._guest.on_host:
            try:
                self._memory.presence.check()
            except TargetGoneError:
                return ENDED
        told = self._told
        return told[1].state if told is not None and time.monotonic() < told[0] + BELIEVED else self._stopped()

    def _stopped(self) -> str | None:
        """`stopped` where QEMU itself is, which no monitor can tell."""
        return STOPPED if self._live and is_stopped(self._guest) else None

    def _ask(self, *lines: str) -> list[str]:
        """What the first monitor that answers prints. Raises UnsupportedError that says why none does."""
        if not self._live:
            raise UnsupportedError(f"{self._guest} is part of a dump: nothing in it runs")
        self._memory.presence.check()
        return ask(self._guest, lambda human, _: [human(line) for line in lines])

    def pause(self) -> None:
        """See `Connector.pause`: by QEMU's monitor."""
        self._ask("stop")

    def resume(self) -> None:
        """See `Connector.resume`: by QEMU's monitor."""
        self._ask("cont")

    def close(self) -> None:
        """See `Connector.close`."""
        self._mapped.close()
        self._guest.process.close()


def _mappings(guest: Guest) -> list[Run]:
    """What its QEMU maps that can be RAM. Raises AccessDeniedError that names the guest."""
    try:
        return runs(guest.process.regions())
    except AccessDeniedError as error:
        raise AccessDeniedError(f"this user may not look into the guest {guest}: {error}") from None


def _wants_qmp(options: Options) -> bool:
    return truth("qmp", options.get("qmp", "yes"))


def _guest(parent: OsLayer, target: str, *, foreign: bool) -> Guest:
    try:
        return find(parent, target)
    except NotFoundError:
        other = stranger(parent, target) if foreign else None
        if other is None:
            raise
        return other
