"""Recorded guests as opened OS layers: as they are, and over copies in which something was changed."""

from __future__ import annotations

import functools
from collections.abc import Callable

from guests.recording import Recording

from engine.file_memory import FileMemory
from engine.oslayer import Base
from engine.oslayers.linux import LinuxLayer
from engine.overlay import OverlayMemory
from engine.types import TargetHints

WORD = 8


@functools.lru_cache(maxsize=2)
def _opened(image: str) -> LinuxLayer:
    return LinuxLayer.open(Base(FileMemory(image, immutable=True)), {})


def opened(recording: Recording) -> LinuxLayer:
    """The layer over a recording's RAM; the last two are kept."""
    return _opened(str(recording.image))


class Copy:
    """A copy of a recording's RAM, of which only what is changed takes memory."""

    def __init__(self, recording: Recording) -> None:
        self.original = opened(recording)
        self.keeper = recording.truth.keeper
        self._extents = recording.extents
        self.memory = OverlayMemory(FileMemory(str(recording.image), immutable=True))

    def place(self, address: int) -> int:
        """Where in the image the byte at an address of the kernel lies."""
        physical = self.original.kernel.found.memory.virt_to_phys(address)
        for start, length, offset in self._extents:
            if start <= physical < start + length:
                return offset + physical - start
        raise ValueError(f"no RAM at {physical:#x}")

    def word(self, address: int) -> int:
        """The word at an address of the kernel."""
        return self.memory.u64(self.place(address))

    def set_word(self, address: int, value: int) -> None:
        """Change a word of the kernel."""
        self.memory.write(self.place(address), value.to_bytes(WORD, "little"))

    def set_bytes(self, address: int, data: bytes) -> None:
        """Change some bytes of the kernel, within a page."""
        self.memory.write(self.place(address), data)

    def layer(
        self,
        change: Callable[[Copy], None],
        *,
        live: bool = False,
        ask: Callable[[], TargetHints | None] = lambda: None,
    ) -> LinuxLayer:
        """The layer over the copy once it was changed."""
        change(self)
        return LinuxLayer.open(Base(self.memory, live=live, ask=ask), {})
