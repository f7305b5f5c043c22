"""VMCOREINFO: what a Linux kernel writes down for whoever reads its memory after a crash.

    for info in find_vmcoreinfo(memory):       every text in physical memory; each says what a kernel claims, no more
        info.text("OSRELEASE"), info.symbol("swapper_pg_dir"), info.number("phys_base")

The kernel keeps the text in a page of its own and, once more, in an ELF note: so both begin at a page, and one
comparison per page finds them. A guest inside of a guest, a kernel that ran before and whoever plants a copy leave
further texts: which of them is true only the memory it describes can prove.

Sources: Linux Documentation/admin-guide/kdump/vmcoreinfo.rst, kernel/vmcore_info.c (kernel/crash_core.c before 6.9).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from engine.errors import NotRecognisedError
from engine.memory import Memory
from engine.records import dataclass

PAGE = 4096
"""Both forms begin at a multiple; the pages of some kernels are larger, never smaller."""
TEXT_LIMIT = 1 << 16
"""Bytes of a text; Linux keeps it within one page of its own, which is 64 KiB at the most."""
HIT_LIMIT = 4096
"""Texts that are looked at."""

_START = b"OSRELEASE="
_NAME = b"VMCOREINFO\0"
_NOTE_HEAD = 24
"""Three words, and the name padded to 12 bytes."""
_PAGES_AT_ONCE = 1 << 16
_SHORTEST = 32
_KEY = re.compile(r"[A-Za-z0-9_.()\-]{1,128}")
_NUMBER = re.compile(r"-?[0-9]{1,20}|-?0x[0-9a-fA-F]{1,16}")
_HEX = re.compile(r"(?:0x)?[0-9a-fA-F]{1,16}")


@dataclass(frozen=True)
class Vmcoreinfo:
    """One text, and where it was found: `pages` as the text itself, `notes` as an ELF note."""

    raw: bytes
    pages: tuple[int, ...] = ()
    notes: tuple[int, ...] = field(default=())

    @staticmethod
    def parse(raw: bytes) -> Vmcoreinfo:
        """A text, up to its first NUL. Raises NotRecognisedError where it does not begin as one."""
        text = raw[:TEXT_LIMIT].partition(b"\0")[0]
        if not text.startswith(_START):
            raise NotRecognisedError("VMCOREINFO begins with OSRELEASE=")
        return Vmcoreinfo(text)

    @staticmethod
    def parse_note(raw: bytes) -> Vmcoreinfo:
        """A text in an ELF note, of either byte order. Raises NotRecognisedError where it is none."""
        for order in "<>" if len(raw) >= _NOTE_HEAD else "":
            name_size, size, _ = struct.unpack_from(order + "3I", raw)
            inside = _SHORTEST <= size <= min(TEXT_LIMIT, len(raw) - _NOTE_HEAD)
            if name_size == len(_NAME) and inside and raw[12:].startswith(_NAME):
                return Vmcoreinfo.parse(raw[_NOTE_HEAD : _NOTE_HEAD + size])
        raise NotRecognisedError("there is no whole ELF note of VMCOREINFO here")

    @cached_property
    def values(self) -> Mapping[str, str]:
        """Every line KEY=VALUE, in their order; of a key that comes twice the first, lines that are none left out."""
        found: dict[str, str] = {}
        for line in self.raw.decode("ascii", "replace").split("\n"):
            key, separator, value = line.partition("=")
            if separator and _KEY.fullmatch(key) and value.isprintable():
                found.setdefault(key, value)
        return found

    def text(self, key: str) -> str | None:
        """The value of a line as it stands; None where there is none."""
        return self.values.get(key)

    def number(self, name: str) -> int | None:
        """NUMBER(name), or the line `name`: signed decimal, or hexadecimal after 0x. None where absent or bad."""
        value = self.values.get(f"NUMBER({name})", self.values.get(name, ""))
        return int(value, 16 if "0x" in value else 10) if _NUMBER.fullmatch(value) else None

    def symbol(self, name: str) -> int | None:
        """SYMBOL(name), a virtual address (of vmemmap and mem_section: their value). None where absent or bad."""
        return self._hex(f"SYMBOL({name})")

    def _hex(self, key: str) -> int | None:
        value = self.values.get(key, "")
        return int(value, 16) if _HEX.fullmatch(value) else None

    def size(self, name: str) -> int | None:
        """SIZE(name): the size of a structure. None where absent or bad."""
        return self._count(f"SIZE({name})")

    def offset(self, path: str) -> int | None:
        """OFFSET(structure.member). None where absent or bad."""
        return self._count(f"OFFSET({path})")

    def length(self, path: str) -> int | None:
        """LENGTH(name): the elements of an array. None where absent or bad."""
        return self._count(f"LENGTH({path})")

    def _count(self, key: str) -> int | None:
        value = self.values.get(key, "")
        return int(value) if value.isdecimal() and len(value) <= 20 else None

    @cached_property
    def symbols(self) -> Mapping[str, int]:
        """Every SYMBOL with its value."""
        names = (key[7:-1] for key in self.values if key.startswith("SYMBOL(") and key.endswith(")"))
        found = ((name, self.symbol(name)) for name in names)
        return {name: value for name, value in found if value is not None}

    @property
    def release(self) -> str:
        """The kernel's release, as `uname -r` prints it."""
        return self.values.get("OSRELEASE", "")

    def release_number(self) -> tuple[int, int]:
        """Major and minor number of the release; (0, 0) where it does not begin with them."""
        match = re.match(r"(\d{1,4})\.(\d{1,4})", self.release)
        return (int(match[1]), int(match[2])) if match else (0, 0)

    @property
    def build_id(self) -> str | None:
        """The build-id of the kernel, hexadecimal (since Linux 5.10); None where absent or bad."""
        value = self.values.get("BUILD-ID", "")
        return value.lower() if re.fullmatch(r"(?:[0-9a-fA-F]{2}){8,64}", value) else None

    @property
    def page_size(self) -> int:
        """The size of the kernel's pages; 4096 where it is not said, or cannot be."""
        size = self.number("PAGESIZE") or PAGE
        return size if size in (4096, 8192, 16384, 32768, 65536) else PAGE

    @property
    def kernel_offset(self) -> int | None:
        """How far KASLR moved the kernel; None on 32-bit kernels, which do not say."""
        return self._hex("KERNELOFFSET")


def find_vmcoreinfo(memory: Memory, start: int = 0, stop: int | None = None) -> list[Vmcoreinfo]:
    """Every text that begins at a page of [start, stop), each once.

    Those found both as a page and as a note come first, then those found oftener, then the longer.
    """
    return _read(memory, _hits(memory, _batches(memory, start, stop)))


def vmcoreinfo_at(memory: Memory, addresses: npt.NDArray[np.uint64]) -> list[Vmcoreinfo]:
    """Every text that begins at one of the addresses, each once, in the order of `find_vmcoreinfo`."""
    return _read(memory, _hits(memory, iter([addresses])))


def _read(memory: Memory, hits: Iterator[int]) -> list[Vmcoreinfo]:
    pages: dict[bytes, list[int]] = {}
    notes: dict[bytes, list[int]] = {}
    for count, address in enumerate(hits):
        if count == HIT_LIMIT:
            break
        head = memory.read_padded(address, min(PAGE, memory.size - address))
        if not head.startswith(_START) and _NAME not in head[:_NOTE_HEAD]:
            continue
        try:
            if head.startswith(_START):
                pages.setdefault(Vmcoreinfo.parse(_whole(memory, address, head)).raw, []).append(address)
            else:
                note = Vmcoreinfo.parse_note(_whole(memory, address, head))
                notes.setdefault(note.raw, []).append(address)
        except NotRecognisedError:
            continue
    found = [
        Vmcoreinfo(raw, tuple(pages.get(raw, ())), tuple(notes.get(raw, ()))) for raw in dict.fromkeys([*pages, *notes])
    ]
    found = [each for each in found if len(each.values) > 1]
    return sorted(found, key=_rank)


def _rank(text: Vmcoreinfo) -> tuple[bool, int, int]:
    return not (text.pages and text.notes), -len(text.pages + text.notes), -len(text.raw)


def _whole(memory: Memory, address: int, head: bytes) -> bytes:
    """The bytes from an address on that a text may have: one page, more where its end is not in it."""
    if b"\0" in head[_NOTE_HEAD:]:
        return head
    return memory.read_padded(address, min(TEXT_LIMIT, memory.size - address))


def _hits(memory: Memory, batches: Iterator[npt.NDArray[np.uint64]]) -> Iterator[int]:
    """The addresses whose first eight bytes begin one of the forms."""
    for addresses in batches:
        for row in np.flatnonzero(_begins(memory, addresses)).tolist():
            yield int(addresses[row])


def _batches(memory: Memory, start: int, stop: int | None) -> Iterator[npt.NDArray[np.uint64]]:
    """The addresses of the pages that hold data, many at once: a sparse image has hundreds of small extents."""
    waiting: list[npt.NDArray[np.uint64]] = []
    count = 0
    for extent in memory.extents(start, stop):
        first = -(-extent.start // PAGE) * PAGE
        for piece in range(first, extent.stop - 7, PAGE * _PAGES_AT_ONCE):
            waiting.append(np.arange(piece, min(piece + PAGE * _PAGES_AT_ONCE, extent.stop - 7), PAGE, dtype=np.uint64))
            count += len(waiting[-1])
            if count >= _PAGES_AT_ONCE:
                yield np.concatenate(waiting)
                waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _begins(memory: Memory, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    words, _ = memory.words(addresses, "<u8")
    low, high = words.astype(np.uint32), (words >> np.uint64(32)).astype(np.uint32)
    text = words == np.uint64(int.from_bytes(_START[:8], "little"))
    little = (low == len(_NAME)) & (high >= _SHORTEST) & (high <= TEXT_LIMIT)
    swapped = high.byteswap()
    big = (low == len(_NAME) << 24) & (swapped >= _SHORTEST) & (swapped <= TEXT_LIMIT)
    found: npt.NDArray[np.bool_] = text | little | big
    return found
