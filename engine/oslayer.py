"""OS layers: what an operating system makes of memory — processes, modules, kernel objects.

To add an OS layer:

1. Write `engine/oslayers/NAME.py` (or a package) with a subclass of `OsLayer`; `open` gets a `Base`
   (memory and hints, never a connector) and raises NotRecognisedError with a reason where it is not its OS.
   Beside it: `kind`, `summary`, `info`, `pids`, `process`, `close`.
2. Subclass `Process` (and `Module`): `info`, `memory`, `regions`, `modules`. What cannot be known is None.
3. Offer what else there is as capabilities: small abstract classes below, or your own.
4. Name it in `engine/registry.py`, or in your own package as an entry point of the group `cloudfs.oslayers`.
5. Run `engine.testing.check_oslayer` on it; the suite in `tests/engine` picks it up from the registry.

Freshness has one owner: where `Base.live` is true nothing read outlives the operation that read it; the
lists of processes are kept for a second by `Instance`, not here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import field
from typing import ClassVar, Self, TypeVar

from engine.errors import NotFoundError
from engine.leases import Lease
from engine.memory import Memory
from engine.records import dataclass
from engine.types import (
    CachedFileInfo,
    ExportInfo,
    ImportInfo,
    LogRecord,
    ModuleInfo,
    OpenFileInfo,
    OsInfo,
    PhysicalMap,
    ProcessInfo,
    Region,
    SectionInfo,
    SocketInfo,
    SymbolInfo,
    TargetHints,
    ThreadInfo,
)

C = TypeVar("C")
Options = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Base:
    """What an OS layer stands on: memory and hints, or, for a layer without a connector, a target."""

    memory: Memory | None = None
    hints: TargetHints = field(default_factory=TargetHints)
    target: str = ""
    writable: bool = False
    live: bool = False
    """Whether it may change while the layer is open; said too of what only a lease keeps from changing."""
    lease: Lease | None = None
    """Nothing changes for as long as it is held."""
    ask_hints: Callable[[], TargetHints] | None = None
    """What is known of the machine now, where that changes and can be asked for again."""
    ask: Callable[[], TargetHints | None] = field(default=lambda: None, compare=False)
    """The same where that neither stops the machine nor takes long, whether it runs among it; None where it would."""

    @property
    def may_cache(self) -> bool:
        """Whether what was read is still true; over a lease that ends it turns false, and stays so: ask each time."""
        return not self.live or (self.lease is not None and self.lease.held)


class Capable:
    """Something that may offer more than its class says; a capability is asked for by its abstract class."""

    def capability(self, kind: type[C]) -> C | None:
        """The object that does `kind` here, or None where this target cannot; never reads memory."""
        return self if isinstance(self, kind) else None


class Module(ABC):
    """An image in an address space: an executable, a library, a kernel module."""

    @property
    @abstractmethod
    def info(self) -> ModuleInfo:
        """Name, path, base, size, architecture, build-id."""

    @property
    @abstractmethod
    def memory(self) -> Memory | None:
        """The module's bytes, addressed from its base; None where its address is not known."""

    @property
    def cached_file(self) -> Memory | None:
        """Its file as it is on disk, as far as the target's memory holds it; None where that is not known.

        What is not held is a fault.
        """
        return None

    def sections(self) -> Iterator[SectionInfo]:
        """Its sections (where a section table is at hand) or loaded segments."""
        return iter(())

    def exports(self) -> Iterator[ExportInfo]:
        """The symbols it offers to others."""
        return iter(())

    def imports(self) -> Iterator[ImportInfo]:
        """The symbols it takes from others."""
        return iter(())


class Process(Capable):
    """One process. It may end at any moment: every method may raise ProcessExitedError then."""

    @property
    @abstractmethod
    def info(self) -> ProcessInfo:
        """The record of the process as it is now (live) or was (dump)."""

    @property
    def name(self) -> str:
        """Its name, as in `info`; overridden where the whole record is dearer or may have to wait."""
        return self.info.name

    @property
    def identity(self) -> Hashable:
        """What tells it from another process that gets the same PID."""
        info = self.info
        return info.pid, info.start_ticks, info.object

    def check(self) -> None:
        """Raise ProcessExitedError where it has ended: else its memory was its own until now.

        Overridden where that can be told at less cost than by its name.
        """
        _ = self.name

    def again(self) -> Process | None:
        """Another object for it, as it is now; None where that costs no less than by its PID.

        Raises ProcessExitedError.
        """
        return None

    @property
    @abstractmethod
    def memory(self) -> Memory:
        """Its virtual memory; offset = address.

        What comes of a read was the process's: where its pages may be another's by the end of it, the memory looks
        then whether the process is the same still, and raises ProcessExitedError where it is not.
        """

    @abstractmethod
    def regions(self) -> Iterator[Region]:
        """Its mapped ranges, ascending."""

    @property
    def tells_modules(self) -> bool:
        """Whether `modules` knows what is mapped into it; else nothing is to be shown of them. Reads no memory."""
        return True

    def modules(self) -> Iterator[Module]:
        """The images mapped into it, the executable first."""
        return iter(())

    def threads(self) -> Iterator[ThreadInfo]:
        """Its threads, ascending by id."""
        return iter(())

    def close(self) -> None:
        """Give back what this object holds of the host (descriptors); it may be used again after."""


class OsLayer(Capable):
    """An operating system: its processes, its modules, its memory."""

    kind: ClassVar[str]
    """The plugin's name."""
    summary: ClassVar[str] = ""
    """One line for lists of plugins."""
    needs_memory: ClassVar[bool] = True
    """False for a layer that stands on nothing, as `native`."""
    options_help: ClassVar[Mapping[str, str]] = {}
    """Option key → one line of help; other keys are refused before `open` is called."""

    @classmethod
    @abstractmethod
    def open(cls, base: Base, options: Options) -> Self:
        """Recognise the OS. Raises NotRecognisedError with the reason where it is another one."""

    @property
    @abstractmethod
    def info(self) -> OsInfo:
        """Kind, version, architecture, page size, what was skipped."""

    @property
    def physical_memory(self) -> Memory | None:
        """Physical memory where there is any to be seen."""
        return None

    @property
    def kernel_memory(self) -> Memory | None:
        """Kernel virtual memory where there is any to be seen."""
        return None

    @abstractmethod
    def pids(self) -> list[int]:
        """The PIDs there are, ascending: the cheapest listing."""

    def listing(self) -> Mapping[int, Process] | None:
        """All processes by PID, ascending, as of one listing; None where that costs more than `pids`."""
        return None

    @abstractmethod
    def process(self, pid: int) -> Process:
        """The process with that PID. Raises ProcessExitedError where there is none."""

    def processes(self) -> Iterator[Process]:
        """All processes, ascending by PID; those that end meanwhile are left out."""
        for pid in self.pids():
            try:
                process = self.process(pid)
            except NotFoundError:
                continue
            yield process

    @property
    def tells_modules(self) -> bool:
        """Whether `modules` knows the kernel's; else nothing is to be shown of them. Reads no memory."""
        return True

    def modules(self) -> Iterator[Module]:
        """The kernel's modules (drivers)."""
        return iter(())

    @abstractmethod
    def close(self) -> None:
        """Drop what it holds; readers that still hold a Process or Memory keep what they have."""


# -- capabilities: small, each for one kind of fact ------------------------------------------------


class ProcFiles(ABC):
    """Of a Process: its files in the format of Linux's /proc/PID, byte for byte (proc(5))."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Which files there are: maps, cmdline, environ, comm, stat, status."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole of one file. Raises AccessDeniedError, ProcessExitedError."""

    def links(self) -> tuple[str, ...]:
        """Which links are told, of exe, cwd and root; and `fd` where `descriptors` are. Reads no memory."""
        return "exe", "cwd", "root", "fd"

    @abstractmethod
    def link(self, name: str) -> str:
        """The text of one link: exe, cwd, root, fd/N. Raises NotFoundError, AccessDeniedError."""

    @abstractmethod
    def descriptors(self) -> list[int]:
        """The numbers of its open descriptors, ascending."""

    @abstractmethod
    def thread(self, tid: int) -> ProcFiles:
        """The same files of one of its threads (/proc/PID/task/TID)."""


class SystemFiles(ABC):
    """Of an OsLayer: files of the whole system in the format of Linux's /proc (proc(5))."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Which files there are, as paths below /proc: version, uptime, sys/kernel/hostname and others."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole of one file. Raises NotFoundError where it is none of `names`, or cannot be read."""


class KernelConfig(ABC):
    """Of an OsLayer: the configuration that its kernel was built with."""

    @abstractmethod
    def config(self) -> bytes:
        """The text of the configuration. Raises NotFoundError where the kernel does not carry it."""


class Containers(ABC):
    """Of an OsLayer: the containers that its processes are in."""

    @abstractmethod
    def containers(self) -> Mapping[str, tuple[int, ...]]:
        """Identifier of each container → the PIDs in it, ascending."""


class PhysicalMaps(ABC):
    """Of a Process: where its pages lie in physical memory."""

    @abstractmethod
    def physical_maps(self) -> Iterator[PhysicalMap]:
        """Runs of pages that follow one another in both address spaces, ascending. Raises ProcessExitedError."""


class Sockets(ABC):
    """Of an OsLayer: the sockets of all processes."""

    @abstractmethod
    def sockets(self) -> Iterator[SocketInfo]:
        """Each socket once for each descriptor that leads to it, by PID and descriptor; then those of the kernel."""


class OpenFiles(ABC):
    """Of a Process: what it has open."""

    @abstractmethod
    def open_files(self) -> Iterator[OpenFileInfo]:
        """Its open descriptors, ascending. Raises ProcessExitedError."""


class CachedFiles(ABC):
    """Of a Process: the contents of files that it has open or mapped, as far as the target's memory holds them."""

    @abstractmethod
    def cached_files(self) -> Iterator[CachedFileInfo]:
        """Those that it has open, by descriptor, then those that it only maps. Raises ProcessExitedError."""

    @abstractmethod
    def cached_file(self, name: str) -> Memory:
        """The contents of one, by its `CachedFileInfo.name`; what is not held is a fault. Raises NotFoundError."""


class ThreadRegisters(ABC):
    """Of a Process: the registers of its threads, as they were when each entered the kernel."""

    @abstractmethod
    def registers(self, tid: int) -> Mapping[str, int]:
        """Registers of user mode by the names that gdb uses.

        Raises NotFoundError where there is no such thread, or memory does not have them (it was running).
        """


class KernelLog(ABC):
    """Of an OsLayer: what the kernel has logged (dmesg)."""

    @abstractmethod
    def records(self) -> Iterator[LogRecord]:
        """The records that are still there, oldest first. Raises FaultError where the log cannot be read."""


class Symbols(ABC):
    """Of an OsLayer: the symbols of its kernel."""

    @abstractmethod
    def symbols(self) -> Iterator[SymbolInfo]:
        """All of them, ascending by address, those of modules last."""

    @abstractmethod
    def find(self, name: str) -> list[int]:
        """The addresses of all symbols of that name: names repeat."""

    @abstractmethod
    def at(self, address: int) -> SymbolInfo | None:
        """The symbol at or below an address; None where all lie above."""


class HostOwned(ABC):
    """Of a Process: which user and group its files belong to on this host, as /proc shows them."""

    @abstractmethod
    def owner(self) -> tuple[int, int]:
        """Numeric uid and gid of /proc/PID. Raises ProcessExitedError."""
