"""The records of the engine: frozen, without I/O, told apart by type and never by Boolean flags."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from engine.records import dataclass

ADDRESS_SPACE = 1 << 64
"""Exclusive bound of every 64-bit address space."""


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """A half-open range of addresses: `start`, `size` bytes, `stop` exclusive."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        """First address behind the extent; 2^64 for the one that ends with the last byte."""
        return self.start + self.size

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.start + self.size


@dataclass(frozen=True, slots=True)
class Shortcut:
    """How bytes of a memory are had by pread(2) alone, offset = `base` + address, until `until`.

    Whoever uses it keeps `keeper` meanwhile, which holds the descriptors, and leaves to the memory's own methods
    every read that does not give all of its bytes at once.
    """

    keeper: object
    descriptor: int
    until: float = float("inf")
    """Seconds of time.monotonic()."""
    base: int = 0
    """Address 0 is this offset of the descriptor; where negative, addresses below its amount are none."""
    size: int = (1 << 63) - 1
    """No address from here on is read: the most that off_t can say where the descriptor knows its own end."""
    writable: bool = False
    """pwrite(2) stores too, below the file's end as lseek(2) tells it."""
    nowait: bool = False
    """By preadv2(2) with RWF_NOWAIT: anything else might have to wait."""
    mapping: int = 0
    """Where in this program the bytes from 0 to `mapped` stand; 0: nowhere. For system calls alone, and while fstat(2)
    says that the file is as long and has no hole, or mincore(2) that there is none, see `FileMemory.borrow`.
    """
    mapped: int = 0
    tells_holes: bool = False
    """mincore(2) of the mapping says which pages the file has in memory; else it may say so of all."""
    pagemap: int = -1
    """Of a process: a piece is read only where the entries of this file say that all of its pages are present."""
    pid: int = 0
    """Long pieces are read by process_vm_readv(2), and count if `pidfd` and `pagemap` still answer; 0: they are not."""
    pidfd: int = -1


class Rights(enum.Flag):
    """What an access may do."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXECUTE = 4
    USER = 8
    USER_EXECUTE = 16


class PageFlags(enum.Flag):
    """What a page-table entry says of its page beside rights."""

    NONE = 0
    GLOBAL = 1
    """Kept over changes of the address space."""
    ACCESSED = 2
    DIRTY = 4
    INACCESSIBLE = 8
    """Resident, but every access of the target faults (PROT_NONE, NUMA balancing): translated and read here."""
    TRANSITION = 16
    """Resident though on its way out (a Windows transition page)."""


@dataclass(frozen=True, slots=True)
class PhysicalMap:
    """A run of pages that follow one another in virtual and in physical memory, with equal rights and page size."""

    start: int
    size: int
    physical: int
    page_size: int
    rights: Rights
    flags: PageFlags

    @property
    def stop(self) -> int:
        """First virtual address behind the run."""
        return self.start + self.size


PAGE_TABLES = "page tables"
"""`Region.source` of what the page tables alone tell."""


@dataclass(frozen=True, slots=True)
class Region:
    """One mapped range of a process, as a line of /proc/PID/maps tells it (proc_pid_maps(5))."""

    start: int
    size: int
    rights: Rights
    shared: bool | None = False
    """None where it is not known."""
    offset: int = 0
    device: tuple[int, int] = (0, 0)
    inode: int = 0
    path: str = ""
    source: str | None = None
    """Where it is known from, if not from the OS's own list: `PAGE_TABLES`. Then `offset`, `device` and `inode` say
    nothing, pages that are not in memory are in no region, and one may be part of a mapping, or of several."""

    @property
    def stop(self) -> int:
        """First address behind the region."""
        return self.start + self.size

    @property
    def permissions(self) -> str:
        """Four characters as /proc/PID/maps prints them: `rw-p`; the last is `?` where it is not known."""
        return (
            ("r" if self.rights & Rights.READ else "-")
            + ("w" if self.rights & Rights.WRITE else "-")
            + ("x" if self.rights & Rights.EXECUTE else "-")
            + ("?" if self.shared is None else "s" if self.shared else "p")
        )

    @property
    def shown_path(self) -> str:
        """The path as lists for people have it: `[page tables]` where nothing else tells of it."""
        return self.path or (f"[{self.source}]" if self.source else "")

    @property
    def device_text(self) -> str:
        """`major:minor` in hexadecimal, at least two digits each."""
        return f"{self.device[0]:02x}:{self.device[1]:02x}"


@dataclass(frozen=True, slots=True)
class TargetHints:
    """What a source of memory knows of the machine in it; everything may be unknown."""

    architecture: str | None = None
    dtb: int | None = None
    kernel_base: int | None = None
    registers: tuple[Mapping[str, int], ...] = field(default=(), hash=False)
    vmcoreinfo: bytes | None = None
    state: str | None = None
    """Whether the machine runs, as QMP's RunState has it: running, paused, postmigrate …"""


NARROW = {"x86_64": "i386", "aarch64": "arm", "riscv64": "riscv32", "ppc64": "ppc", "ppc64le": "ppcle",
          "s390x": "s390", "mips64": "mips", "loongarch64": "loongarch32"}
"""Machine → what its 32-bit programs are written for."""


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """One process as its OS layer knows it; None is «not known», never a made-up value."""

    pid: int
    name: str
    ppid: int | None = None
    state: str | None = None
    """One letter as ps(1) prints it: R S D Z T t X I."""
    uid: int | None = None
    gid: int | None = None
    threads: int | None = None
    start_ticks: int | None = None
    """Start since boot in the OS's own unit: with `pid` the identity of a process."""
    start_time: float | None = None
    """Seconds since 1970 UTC."""
    command_line: tuple[str, ...] | None = None
    executable: str | None = None
    architecture: str | None = None
    kernel_thread: bool | None = None
    dtb: int | None = None
    object: int | None = None
    """Address of the kernel's record of the process."""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Keys that only some OS layers know: namespaces, cgroup, container, executable_deleted, sources."""


@dataclass(frozen=True, slots=True)
class ThreadInfo:
    """One thread of a process."""

    tid: int
    name: str
    state: str | None = None
    start_ticks: int | None = None


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One image (executable, library, kernel module) in an address space."""

    name: str
    path: str | None
    base: int | None
    size: int | None
    architecture: str | None = None
    build_id: str | None = None
    """Hexadecimal, as readelf(1) prints it."""


@dataclass(frozen=True, slots=True)
class SectionInfo:
    """One section of a module; `base` is an address in the module's address space."""

    name: str
    base: int
    size: int


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """One symbol that a module offers; `offset` counts from the module's base."""

    name: str
    offset: int
    size: int | None = None
    kind: str | None = None
    """`function`, `object`, `tls`, `ifunc` or None."""


@dataclass(frozen=True, slots=True)
class ImportInfo:
    """One symbol that a module wants of others."""

    name: str
    library: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One record of a kernel's log, of one or several lines."""

    sequence: int
    time_ns: int
    """Nanoseconds since boot."""
    level: int
    """0 (emergency) to 7 (debug), as syslog(2) counts."""
    facility: int
    caller: int
    """The thread that wrote it, or, with bit 31 set, the CPU; 0 where the kernel does not say."""
    text: str


@dataclass(frozen=True, slots=True)
class SocketInfo:
    """One socket; None is «not known», or «has none»."""

    family: str
    """`inet`, `inet6`, `unix`, `netlink`, `packet`, or the number."""
    kind: str
    """`stream`, `dgram`, `raw`, `seqpacket`, or the number."""
    protocol: str
    """`tcp`, `udp`, `icmp` …, or the number."""
    state: str | None
    """As ss(8) calls it, in capitals: LISTEN, ESTABLISHED, CLOSE …"""
    local: str | None
    """Address of its own: `127.0.0.1:80`, `[::1]:80`, a path, `@name`, a netlink port."""
    remote: str | None
    inode: int | None
    uid: int | None
    pid: int | None
    descriptor: int | None
    object: int | None
    """Address of the kernel's record."""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class OpenFileInfo:
    """One open descriptor of a process."""

    descriptor: int
    path: str | None
    """As a link in /proc/PID/fd reads."""
    kind: str | None
    """`file`, `directory`, `device`, `pipe`, `socket`, `anonymous`, `link`."""
    flags: int | None
    """As open(2) took them."""
    position: int | None
    inode: int | None
    device: tuple[int, int] | None
    size: int | None


@dataclass(frozen=True, slots=True)
class CachedFileInfo:
    """A file that a process has open or mapped, of which the target's memory may hold pages."""

    name: str
    """The number of a descriptor, or `START-STOP` in hexadecimal of the first mapping, as in /proc/PID/map_files."""
    path: str | None
    size: int
    """Bytes of the file, whether they are in memory or not."""


@dataclass(frozen=True, slots=True)
class SymbolInfo:
    """One symbol of a kernel."""

    name: str
    kind: str
    """The letter that nm(1) prints."""
    address: int
    module: str | None = None


@dataclass(frozen=True, slots=True)
class ConnectorInfo:
    """What a connector says of what it has opened."""

    kind: str
    """The plugin's name."""
    target: str
    size: int
    """First physical address behind all memory."""
    real_size: int
    """Bytes of physical memory there really are."""
    live: bool
    writable: bool
    notes: tuple[str, ...] = ()
    """Sentences for a person: what was guessed, what is missing."""
    state: str | None = None
    """Of a live machine whether it runs, as far as that was told a moment ago: running, paused, ended, postmigrate …"""
    freshness: str | None = None
    """Why it is taken for live or immutable, where that was not plain: a clause for a person."""


@dataclass(frozen=True, slots=True)
class OsInfo:
    """What an OS layer says of the system it has recognised."""

    kind: str
    """The plugin's name."""
    version: str | None = None
    architecture: str | None = None
    page_size: int | None = None
    kernel_base: int | None = None
    dtb: int | None = None
    boot_time: float | None = None
    """Seconds since 1970 UTC, by the target's own clock."""
    time: float | None = None
    """What that clock says, seconds since 1970 UTC; of a dump when it was made."""
    uptime: float | None = None
    """Seconds since boot, suspended time included."""
    hostname: str | None = None
    command_line: str | None = None
    """What the kernel was started with."""
    live: bool = False
    writable: bool = False
    state: str | None = None
    """Of a live machine whether it runs: running, paused, restarting, ended, postmigrate …; None where nobody knows."""
    skipped: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Entries left out since they could not be read, by kind."""
    retried: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Entries, and lists, that were read again since they had changed meanwhile, by kind."""
    listed: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Entries of all lists that were given so far over a live target, by kind: what `skipped` is a share of."""
    notes: tuple[str, ...] = ()
