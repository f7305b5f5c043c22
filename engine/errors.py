"""The errors of the engine: one tree, every class with a stable `code`.

An error carries facts (an address, a name, a reason); its text is made when it is asked for, since a fault
is raised far oftener than it is printed. What an error means to a file system stands in one table of
`cloudfs`, found along the class's MRO: a new class needs a row only where it differs from its parent.
"""

from __future__ import annotations

import enum


class FaultKind(enum.IntEnum):
    """Why an address cannot be read or written."""

    ABSENT = 1
    """Nothing is mapped there."""
    PAGED_OUT = 2
    """The page lies in swap or in a page file."""
    COMPRESSED = 3
    """The page lies in a compressed store that was not opened."""
    SOURCE = 4
    """The source of the bytes failed: an I/O error, a file that was cut."""
    READ_ONLY = 5
    """The page may be read, not written."""
    LEFT_OUT = 6
    """Whoever made the dump left the page out."""
    MIGRATING = 7
    """The page is being moved to another frame."""
    TABLE = 8
    """A page table on the way to it cannot be read."""
    MALFORMED = 9
    """Its page-table entry is none that the paging mode knows."""
    NOT_WALKED = 10
    """Of a listing of page tables: not looked into, since they repeat or exceed all bounds."""
    GUARD = 11
    """A guard: no access of the target is let through, and none finds a page."""


class EngineError(Exception):
    """Anything that the engine raises on purpose."""

    code = "engine"


class FaultError(EngineError):
    """The byte at `address` cannot be read (or written); everything asked for before it was done."""

    code = "fault"
    default_kind = FaultKind.ABSENT

    def __init__(self, address: int, kind: FaultKind | None = None, detail: str = "") -> None:
        super().__init__(address, kind, detail)
        self.address = address
        self.kind = self.default_kind if kind is None else kind
        self.detail = detail

    def __repr__(self) -> str:
        detail = f", {self.detail!r}" if self.detail else ""
        return f"{type(self).__name__}({self.address:#x}, {self.kind.name}{detail})"

    def moved(self, delta: int) -> FaultError:
        """The same fault seen from an address space whose addresses are `delta` higher."""
        return type(self)(self.address + delta, self.kind, self.detail)

    def __str__(self) -> str:
        why = {
            FaultKind.ABSENT: "nothing is mapped there",
            FaultKind.PAGED_OUT: "the page is paged out",
            FaultKind.COMPRESSED: "the page is in a compressed store",
            FaultKind.SOURCE: "its source failed",
            FaultKind.READ_ONLY: "the page is read-only",
            FaultKind.LEFT_OUT: "the page was left out of the dump",
            FaultKind.MIGRATING: "the page is being migrated",
            FaultKind.TABLE: "its page table cannot be read",
            FaultKind.MALFORMED: "its page-table entry is malformed",
            FaultKind.NOT_WALKED: "its page tables were not walked",
            FaultKind.GUARD: "it lies in a guard page",
        }[self.kind]
        return f"address {self.address:#x} cannot be accessed: {self.detail or why}"


class PagedOutError(FaultError):
    """The page at `address` lies in swap, zram or a page file."""

    code = "paged_out"
    default_kind = FaultKind.PAGED_OUT


class SourceFaultError(FaultError):
    """The source of the bytes failed at `address`, for instance a file that was truncated."""

    code = "source_fault"
    default_kind = FaultKind.SOURCE


class ReadOnlyFaultError(FaultError):
    """The page at `address` can be read, not written."""

    code = "read_only_fault"
    default_kind = FaultKind.READ_ONLY


class BadDataError(FaultError):
    """What stands at `address` cannot be: an impossible length, a list that never ends."""

    code = "bad_data"

    def __str__(self) -> str:
        return f"impossible data at {self.address:#x}" + (f": {self.detail}" if self.detail else "")


class NotFoundError(EngineError):
    """What was asked for by name or number does not exist."""

    code = "not_found"


class ProcessExitedError(NotFoundError):
    """The process has ended, or its PID now belongs to another one."""

    code = "process_exited"

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self.pid = pid

    def __str__(self) -> str:
        return f"process {self.pid} has ended"


class ReadOnlyError(EngineError):
    """A write was refused: the target was not opened for writing."""

    code = "read_only"

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "opened read-only; --writable (API: writable=True) allows writes"


class InvalidArgumentError(EngineError):
    """An argument, an option or a line of text is wrong."""

    code = "invalid_argument"


class UnusableTargetError(InvalidArgumentError):
    """What is to be opened is there, but nothing can be opened in it: an empty file, a pipe."""

    code = "unusable_target"


class NotRecognisedError(EngineError):
    """The memory or the file is not of the kind that was tried; the text says why."""

    code = "not_recognised"


class AlreadyExistsError(EngineError):
    """A name is taken."""

    code = "already_exists"


class UnsupportedError(EngineError):
    """The target cannot do this at all."""

    code = "unsupported"


class ConnectorClosedError(EngineError):
    """The connector or OS layer was closed."""

    code = "closed"


class TargetGoneError(EngineError):
    """The target ended: a guest was shut down, a dump was unmounted."""

    code = "target_gone"


class TargetBusyError(EngineError):
    """Something still stands on the instance."""

    code = "target_busy"


class AccessDeniedError(EngineError):
    """The host does not let this user look at the target."""

    code = "access_denied"


class TargetTimeoutError(EngineError):
    """The target did not answer in time."""

    code = "target_timeout"


class PluginError(EngineError):
    """A plugin is unknown, broken or lacks what it needs; `hint` says what to do."""

    code = "plugin"

    def __init__(self, name: str, hint: str) -> None:
        super().__init__(name, hint)
        self.name = name
        self.hint = hint

    def __str__(self) -> str:
        return f"plugin {self.name!r}: {self.hint}"
