"""The dynamic section: what a loader reads of an image — tables by address, names, symbol count, versions.

Layouts: System V ABI, chapter 5 (DT_…, DT_HASH); the LSB core specification 5.0, chapter 10 (symbol versions);
DT_GNU_HASH as glibc 2.36 reads it (elf/dl-setup_hash.c).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError, FaultError
from engine.formats.elf.machines import ALPHA, S390
from engine.formats.elf.records import SHT_DYNSYM
from engine.formats.elf.view import View, name_at

DT_NEEDED, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_SONAME = 1, 4, 5, 6, 10, 11, 14
DT_GNU_HASH, DT_VERSYM, DT_VERNEED, DT_VERNEEDNUM = 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFE, 0x6FFFFFFF
DT_MIPS_SYMTABNO = 0x70000011
_TABLES = (3, 4, 5, 7, 12, 13, 17, 23, 25, 26, 32, 36, DT_GNU_HASH, DT_VERSYM, 0x6FFFFFFC, DT_VERNEED)
"""Tags whose values are addresses of tables: what may follow the symbols."""

ENTRY_LIMIT = 16384
PATH_LIMIT = 4096
"""Bytes of the name of a library or a version; PATH_MAX of <linux/limits.h>."""
STRINGS_LIMIT = 64 << 20
SYMBOL_LIMIT = 1 << 21
VERSIONS_LIMIT = 64 << 10
"""Bytes of the table of needed versions; a version takes 16, a library as much."""
_CHAIN_STEP = 4096


class Dynamic:
    """The dynamic section of an image, read once."""

    def __init__(self, view: View, address: int, size: int) -> None:
        """Read the entries at `address` of the memory, `size` bytes at the most, up to DT_NULL."""
        self.view = view
        self.order = view.header.order
        word = view.header.bits // 8
        data = view.read(address, min(size, ENTRY_LIMIT * 2 * word) // (2 * word) * 2 * word, "the dynamic section")
        self.address = address
        self.values: dict[int, int] = {}
        """Tag → its first value, as it stands in the image."""
        self.needed_names: list[int] = []
        for tag, value in struct.iter_unpack(self.order + ("QQ" if word == 8 else "II"), data):
            if not tag:
                break
            if tag == DT_NEEDED:
                self.needed_names.append(value)
            self.values.setdefault(tag, value)

    def linked(self, tag: int) -> int | None:
        """The linked address in an entry, whether a loader has relocated it or not; None where it is absent."""
        value = self.values.get(tag)
        return None if value is None else self.view.unrelocated(value)

    def _table(self, tag: int, what: str) -> int:
        address = self.linked(tag)
        if address is None:
            raise BadDataError(self.address, detail=f"the dynamic section names no {what}")
        return address

    @cached_property
    def strings(self) -> bytes:
        """The string table, empty where there is none. Raises BadDataError for an impossible one."""
        size = self.values.get(DT_STRSZ, 0)
        if not size or DT_STRTAB not in self.values:
            return b""
        if size > STRINGS_LIMIT:
            raise BadDataError(self.address, detail=f"a string table of {size} bytes")
        return self.view.read_linked(self._table(DT_STRTAB, "string table"), size, "the string table")

    def string(self, offset: int) -> str | None:
        """The string at an offset of the string table, None where there is none."""
        return name_at(self.strings, offset, PATH_LIMIT)

    @property
    def symbol_size(self) -> int:
        """Bytes of one symbol."""
        return 24 if self.view.header.bits == 64 else 16

    # -- how many symbols -----------------------------------------------------------------------------

    @cached_property
    def symbol_count(self) -> int:
        """The number of dynamic symbols, 0 where there is no table. Raises BadDataError for an impossible one.

        Only DT_HASH says it. DT_GNU_HASH leads to the last symbol that can be found by name; where it
        leads to none (a program that exports nothing) the table reaches up to what follows it.
        """
        address = self.linked(DT_SYMTAB)
        if address is None:
            return 0
        if self.values.get(DT_SYMENT, self.symbol_size) != self.symbol_size:
            raise BadDataError(self.address, detail=f"symbols of {self.values[DT_SYMENT]} bytes")
        count = self._stated_count(address)
        if count > SYMBOL_LIMIT or count * self.symbol_size > self.view.room(address):
            raise BadDataError(self.view.locate(address, "the symbols"), detail=f"{count} dynamic symbols")
        return count

    def _stated_count(self, symbols: int) -> int:
        if DT_HASH in self.values:
            return self._hash_count(self._table(DT_HASH, "hash table"))
        if DT_MIPS_SYMTABNO in self.values and self.view.header.architecture.startswith("mips"):
            return self.values[DT_MIPS_SYMTABNO]
        least = 0
        if DT_GNU_HASH in self.values:
            least, hashed = self._gnu_hash_count(self._table(DT_GNU_HASH, "hash table"))
            if hashed:
                return least
        return max(least, self._count_up_to_next(symbols))

    def _hash_count(self, address: int) -> int:
        # The entries are words of 64 bits on two machines (binutils, elf64-alpha.c and elf64-s390.c).
        wide = self.view.header.bits == 64 and self.view.header.machine in (ALPHA, S390)
        data = self.view.read_linked(address, 16 if wide else 8, "the hash table")
        return int(struct.unpack(self.order + ("QQ" if wide else "II"), data)[1])

    def _gnu_hash_count(self, address: int) -> tuple[int, bool]:
        """(symbols up to the last one in a chain, whether any is in one)."""
        view = self.view
        buckets, first, blooms, _ = struct.unpack(self.order + "4I", view.read_linked(address, 16, "the hash table"))
        start = address + 16 + blooms * (view.header.bits // 8)
        if buckets > SYMBOL_LIMIT:
            raise BadDataError(view.locate(address, "the hash table"), detail=f"{buckets} hash buckets")
        last = int(self._words(start, buckets).max()) if buckets else 0
        if last < first or not last:
            return first, False
        if last > SYMBOL_LIMIT:
            raise BadDataError(view.locate(address, "the hash table"), detail=f"a chain from symbol {last} on")
        at = start + 4 * buckets + 4 * (last - first)
        while last <= SYMBOL_LIMIT:
            words = self._some_words(at)
            stops = np.flatnonzero(words & 1)
            if len(stops):
                return last + int(stops[0]) + 1, True
            if not len(words):
                break
            last, at = last + len(words), at + 4 * len(words)
        raise BadDataError(view.locate(address, "the hash table"), detail="a hash chain without an end")

    def _words(self, address: int, count: int) -> npt.NDArray[np.uint32]:
        return np.frombuffer(self.view.read_linked(address, 4 * count, "the hash table"), self.order + "u4")

    def _some_words(self, address: int) -> npt.NDArray[np.uint32]:
        data = self.view.read_linked_up_to(address, 4 * _CHAIN_STEP, "the hash table")
        return np.frombuffer(data, self.order + "u4", len(data) // 4)

    def _count_up_to_next(self, symbols: int) -> int:
        """The symbols from `symbols` on up to the next table, cut at the first that cannot be one."""
        try:
            sections = self.view.sections
        except FaultError:
            sections = ()
        for section in sections:
            if section.kind == SHT_DYNSYM and section.address == symbols:
                return section.size // self.symbol_size
        tables = [address for tag in _TABLES if (address := self.linked(tag)) is not None and address > symbols]
        if not tables:
            return 0
        size = min(min(tables) - symbols, self.view.room(symbols), SYMBOL_LIMIT * self.symbol_size)
        count = size // self.symbol_size
        data = self.view.read_linked(symbols, count * self.symbol_size, "the symbols")
        names = np.frombuffer(data, self.order + "u4")[:: self.symbol_size // 4]
        bad = np.flatnonzero(names >= self.values.get(DT_STRSZ, 0))
        return int(bad[0]) if len(bad) else count

    # -- versions -------------------------------------------------------------------------------------

    def needed_versions(self) -> Mapping[int, tuple[str | None, str | None]]:
        """Version number, as DT_VERSYM uses them → (library, version) that an undefined symbol wants.

        Raises BadDataError where the table cannot be.
        """
        if DT_VERNEED not in self.values:
            return {}
        address = self._table(DT_VERNEED, "versions")
        data = self.view.read_linked_up_to(address, VERSIONS_LIMIT, "the needed versions")
        found: dict[int, tuple[str | None, str | None]] = {}
        records = 0
        for library in self._chain(data, 0, self.values.get(DT_VERNEEDNUM, 0)):
            _, count, name, first = struct.unpack_from(self.order + "HHII", data, library)
            library_name = self.string(name)
            for at in self._chain(data, library + first, count):
                number, version = struct.unpack_from(self.order + "HI", data, at + 6)
                found[number & 0x7FFF] = (library_name, self.string(version))
                records += 1
                if records * 16 > len(data):
                    raise BadDataError(self.address, detail="versions that overlap")
        return found

    def _chain(self, data: bytes, start: int, count: int) -> Iterator[int]:
        """The offsets of records of 16 bytes; the last four of each are the step to the next, upwards."""
        for _ in range(count):
            if start + 16 > len(data):
                raise BadDataError(self.address, detail="a version outside of its table")
            yield start
            (step,) = struct.unpack_from(self.order + "I", data, start + 12)
            if not step:
                return
            start += step
