"""Connectors: sources of physical memory.

To add a connector:

1. Write `engine/connectors/NAME.py` with a subclass of `Connector`: `kind`, `summary`, `open`, `memory`,
   `memory_map`, `info`, `close`.
2. Fill `options_help`: keys that are not in it are refused before `open` is called.
3. Implement `targets()` if what could be opened can be listed, `hints()` if the source knows registers or
   the like, `pause`/`resume` if it can.
4. Name it in `engine/registry.py`, or in your own package as an entry point of the group `cloudfs.connectors`. If
   its files begin with a magic, add a row to `engine/recognition.py`, or an entry point as it says, and open them by
   `engine/image_source.py`: split and packed ones then open too.
5. Run `engine.testing.check_connector` on it; the suite in `tests/engine` picks it up from the registry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, Self

from engine.errors import UnsupportedError
from engine.leases import Lease
from engine.memory import Memory
from engine.memory_map import MemoryMap
from engine.oslayer import Options, OsLayer
from engine.records import dataclass
from engine.types import ConnectorInfo, TargetHints


@dataclass(frozen=True, slots=True)
class Target:
    """Something that a connector could open here."""

    name: str
    """The word to pass as target."""
    description: str


class Connector(ABC):
    """One opened source of physical memory."""

    kind: ClassVar[str]
    """The plugin's name."""
    summary: ClassVar[str]
    """One line for lists of plugins."""
    default_parent: ClassVar[str | None] = None
    """The OS layer that is opened as parent where none is named; None: it needs no parent."""
    options_help: ClassVar[Mapping[str, str]] = {}
    """Option key → one line of help."""
    opens_packed: ClassVar[bool] = False
    """Whether its target may be a file that is packed or split: it opens it by `engine.image_source`."""

    @classmethod
    @abstractmethod
    def open(cls, target: str, options: Options, *, parent: OsLayer | None, writable: bool) -> Self:
        """Open the target. Raises the EngineError that says what failed and what to do."""

    @property
    @abstractmethod
    def memory(self) -> Memory:
        """Physical memory; offset = physical address."""

    @property
    @abstractmethod
    def memory_map(self) -> MemoryMap:
        """Where in the physical address space there is memory, and where its bytes lie in the source."""

    @property
    @abstractmethod
    def info(self) -> ConnectorInfo:
        """Kind, target, sizes, live, writable, notes."""

    @property
    def lease(self) -> Lease | None:
        """What `info.live` being false hangs on: it turns true when this ends. None: it never changes."""
        return None

    def hints(self) -> TargetHints:
        """What the source knows now of the machine in it."""
        return TargetHints()

    def ask(self) -> TargetHints | None:
        """`hints` of a live machine asked anew, where that neither stops it nor takes long; None where it cannot be."""
        return None

    @classmethod
    def targets(cls, parent: OsLayer | None) -> Iterator[Target]:
        """What could be opened here, where that can be listed."""
        return iter(())

    def pause(self) -> None:
        """Stop the target. Raises UnsupportedError where it cannot be stopped."""
        raise UnsupportedError(f"a {self.kind} target cannot be paused")

    def resume(self) -> None:
        """Let a paused target run on."""
        raise UnsupportedError(f"a {self.kind} target cannot be resumed")

    @abstractmethod
    def close(self) -> None:
        """Drop references; the last reader's reference closes a descriptor or mapping (never by number)."""
