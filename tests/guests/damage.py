"""Damaged copies of recorded images: what a kernel carries of itself taken away, or false copies of it planted.

Each is a file of its own, a sparse copy; what lies where is asked of the OS layer over the sound image.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from guests.recording import Recording

from engine.file_memory import FileMemory
from engine.formats.btf import load_btf
from engine.formats.kallsyms import load_kallsyms
from engine.formats.kallsyms.finding import tokens_of
from engine.formats.vmcoreinfo import find_vmcoreinfo
from engine.oslayer import Base
from engine.oslayers.linux import LinuxLayer

PAGE = 4096


class Damage:
    """A copy of a recording's image that can be damaged; each method does it in place and gives the copy back."""

    def __init__(self, recording: Recording, folder: Path) -> None:
        self.recording = recording
        self.path = folder / f"{recording.guest.name}.raw"
        subprocess.run(
            ["cp", "--sparse=always", "--reflink=auto", recording.image, self.path], check=True, timeout=120
        )
        self._sound = LinuxLayer.open(Base(FileMemory(str(recording.image), immutable=True)), {"cache": "no"})
        found = self._sound.kernel.found
        self._memory, self._image = found.memory, found.memory.window(found.image.start, found.image.size)

    # -- places --------------------------------------------------------------------------------------------

    def _pieces(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """(offset in the file, size) of a part of the kernel's image."""
        at = self._image.start + offset
        stop = at + size
        while at < stop:
            step = min(stop, (at | PAGE - 1) + 1) - at
            place = self._memory.virt_to_phys(at)
            for start, length, file_offset in self.recording.extents:
                if start <= place < start + length:
                    yield file_offset + place - start, step
            at += step

    def write(self, offset: int, data: bytes) -> None:
        """Put bytes into the file."""
        with open(self.path, "r+b") as file:
            file.seek(offset)
            file.write(data)

    def wipe(self, offset: int, size: int) -> None:
        """Zero a part of the kernel's image."""
        for place, length in self._pieces(offset, size):
            self.write(place, bytes(length))

    def free_pages(self, count: int) -> list[int]:
        """Offsets of pages in a row that hold nothing, ahead of the kernel and of most of what it has."""
        wanted = bytes(count * PAGE)
        with open(self.path, "rb") as file:
            for start in range(1 << 20, os.path.getsize(self.path), count * PAGE):
                file.seek(start)
                if file.read(count * PAGE) == wanted:
                    return [start + number * PAGE for number in range(count)]
        raise AssertionError(f"no {count} pages in a row are free")

    # -- damage --------------------------------------------------------------------------------------------

    def without_vmcoreinfo(self) -> Damage:
        """The text and the note zeroed."""
        for text in find_vmcoreinfo(FileMemory(str(self.recording.image), immutable=True)):
            for place in (*text.pages, *text.notes):
                self.write(place, bytes(PAGE))
        return self

    def without_kallsyms(self) -> Damage:
        """The names and the tokens zeroed."""
        tables = load_kallsyms(self._image, self._image.start).tables
        self.wipe(tables.names, tables.markers - tables.names)
        self.wipe(tables.token_table, tables.behind - tables.token_table)
        return self

    def without_data_symbols(self) -> Damage:
        """The names of all symbols but functions made into a row of one letter."""
        symbols = load_kallsyms(self._image, self._image.start)
        tables = symbols.tables
        tokens = tokens_of(self._image, tables)
        letter = next(number for number, token in enumerate(tokens) if len(token) == 1 and token.isalpha())
        names = bytearray(self._image.read(tables.names, tables.markers - tables.names))
        kinds = np.array([symbol.kind in "tTwWV" for symbol in symbols])
        for row, wide, function in zip(
            tables.starts.rows.tolist(), tables.starts.wide.tolist(), kinds.tolist(), strict=True
        ):
            if not function:
                length = (names[row] & 0x7F) | names[row + 1] << 7 if wide else names[row]
                start = row + 1 + wide
                names[start : start + length] = bytes([letter]) * length
        done = 0
        for place, length in self._pieces(tables.names, len(names)):
            self.write(place, names[done : done + length])
            done += length
        return self

    def without_types(self) -> Damage:
        """The BTF zeroed."""
        place = load_btf(self._image)[1]
        self.wipe(place.address, place.header.size)
        return self
