"""Dynamic symbols as columns: what an image exports and imports.

A table of 100,000 symbols is read in one piece and sorted out by numpy; Python sees only what is given out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError, FaultError
from engine.formats.elf.dynamic import DT_SYMTAB, DT_VERSYM, Dynamic
from engine.formats.elf.view import NAME_LIMIT
from engine.types import ExportInfo, ImportInfo

SHN_UNDEF, SHN_ABS, SHN_COMMON = 0, 0xFFF1, 0xFFF2
STB_GLOBAL, STB_WEAK, STB_GNU_UNIQUE = 1, 2, 10
STT_TLS = 6
_KINDS = {1: "object", 2: "function", 5: "object", 6: "tls", 10: "ifunc"}
_KIND_NAMES: list[str | None] = [_KINDS.get(kind) for kind in range(16)]
_NO_NAMES = np.array([kind in (3, 4) for kind in range(16)])
"""STT_SECTION and STT_FILE: not symbols that anyone can ask for."""

HIDDEN = 0x8000
"""In DT_VERSYM: not the version that a plain name means."""
NAMES_FACTOR, NAMES_SPARE = 4, 1 << 20
"""All names of an image together have so many times the bytes of their table, and so many more, at the most: they
may overlap in it, in good faith a little."""
_STEP = 4096

_SYMBOL_64 = [("name", "u4"), ("info", "u1"), ("other", "u1"), ("section", "u2"), ("value", "u8"), ("size", "u8")]
_SYMBOL_32 = [("name", "u4"), ("value", "u4"), ("size", "u4"), ("info", "u1"), ("other", "u1"), ("section", "u2")]

Column = npt.NDArray[Any]


class Symbols:
    """The dynamic symbols of an image, read once.

    `skipped` counts symbols that were left out since their name or their place cannot be.
    """

    def __init__(self, dynamic: Dynamic) -> None:
        """Read the table. Raises BadDataError (a FaultError) where it cannot be read."""
        self.dynamic = dynamic
        self.skipped = 0
        header, count = dynamic.view.header, dynamic.symbol_count
        address = dynamic.linked(DT_SYMTAB)
        size = count * dynamic.symbol_size
        data = dynamic.view.read_linked(address, size, "the symbols") if address is not None and count else b""
        layout = _SYMBOL_64 if header.bits == 64 else _SYMBOL_32
        self._table = np.frombuffer(data, np.dtype([(name, header.order + kind) for name, kind in layout]))
        self._versions = self._read_versions(count)
        strings = dynamic.strings
        self._plain = strings.isascii()
        self._text = strings.decode("latin-1")
        self._given = 0
        self._limit = NAMES_FACTOR * len(strings) + NAMES_SPARE

    def _read_versions(self, count: int) -> Column | None:
        """The version number of every symbol; None where the image has none, or a table that cannot be."""
        dynamic = self.dynamic
        address = dynamic.linked(DT_VERSYM)
        if address is None or not count:
            return None
        try:
            data = dynamic.view.read_linked(address, 2 * count, "the versions of symbols")
        except FaultError:
            self.skipped += 1
            return None
        return np.frombuffer(data, dynamic.order + "u2")

    def _binding_rows(self) -> tuple[Column, Column]:
        """(type of each symbol, whether others may bind to it)."""
        info = self._table["info"]
        binding, kind = info >> 4, info & 15
        bound = (binding == STB_GLOBAL) | (binding == STB_WEAK) | (binding == STB_GNU_UNIQUE)
        bound &= ~_NO_NAMES[kind] & (self._table["name"] != 0)
        bound[:1] = False
        return kind, bound

    def exports(self) -> Iterator[ExportInfo]:
        """The defined symbols that others may bind to, in the order of the table.

        Of several versions of a name the default one is given, or, where none is, the latest. Absolute
        symbols are left out: their value is a number, not a place (the names of versions are such). The
        offset of a `tls` symbol counts from the thread's copy of the image's TLS block.
        """
        self._given = 0
        kind, bound = self._binding_rows()
        section, visibility = self._table["section"], self._table["other"] & 3
        bound &= (section != SHN_UNDEF) & (section != SHN_ABS) & (section != SHN_COMMON)
        bound &= (visibility == 0) | (visibility == 3)
        rows = np.flatnonzero(bound)
        view = self.dynamic.view
        places = self._table["value"][rows].astype(np.uint64)
        thread = kind[rows] == STT_TLS
        offsets = np.where(thread, places, places - np.uint64(view.link_base))
        good = thread | (offsets <= np.uint64(min(view.load_size, (1 << 64) - 1)))
        self.skipped += len(rows) - int(np.count_nonzero(good))
        rows, offsets = self._only_default(rows[good], offsets[good])
        self._given = 0  # those names are not kept
        sizes, kinds = self._table["size"][rows], kind[rows]
        for start in range(0, len(rows), _STEP):
            step = slice(start, start + _STEP)
            for name, offset, size, number in zip(
                self._names(rows[step]), offsets[step].tolist(), sizes[step].tolist(), kinds[step].tolist(),
                strict=True,
            ):  # fmt: skip
                if name is not None:
                    yield ExportInfo(name, offset, size or None, _KIND_NAMES[number])

    def _only_default(self, rows: Column, offsets: Column) -> tuple[Column, Column]:
        """`rows` without those of a version that a plain name does not mean."""
        if self._versions is None:
            return rows, offsets
        versions = self._versions[rows]
        hidden = np.flatnonzero(versions & HIDDEN)
        if not len(hidden):
            return rows, offsets
        keep = np.ones(len(rows), bool)
        keep[hidden] = False
        taken = set(self._names(rows[keep], count=False))
        latest: dict[str | None, int] = {}
        for index, name in zip(hidden.tolist(), self._names(rows[hidden], count=False), strict=True):
            if name not in taken and versions[index] >= versions[latest.get(name, index)]:
                latest[name] = index
        keep[list(latest.values())] = True
        return rows[keep], offsets[keep]

    def imports(self) -> Iterator[ImportInfo]:
        """The undefined symbols, in the order of the table, with library and version where they are known."""
        self._given = 0
        _, bound = self._binding_rows()
        rows = np.flatnonzero(bound & (self._table["section"] == SHN_UNDEF))
        numbers = [0] * len(rows) if self._versions is None else (self._versions[rows] & 0x7FFF).tolist()
        try:
            wanted = self.dynamic.needed_versions()
        except FaultError:
            self.skipped += 1
            wanted = {}
        for start in range(0, len(rows), _STEP):
            names = self._names(rows[start : start + _STEP])
            for name, number in zip(names, numbers[start : start + _STEP], strict=True):
                if name is not None:
                    library, version = wanted.get(number, (None, None))
                    yield ImportInfo(name, library, version)

    def _names(self, rows: Column, count: bool = True) -> list[str | None]:
        """The name of each row, None for those that have none; those are counted as skipped."""
        text, limit, given = self._text, NAME_LIMIT, self._given
        find = text.find
        names: list[str | None] = []
        add = names.append
        for start in self._table["name"][rows].tolist():
            stop = find("\0", start, start + limit)
            add(text[start:stop] if stop > start else None)
            given += stop - start if stop > start else 0
            if given > self._limit:
                raise BadDataError(self.dynamic.address, detail="the names of the symbols overlap too much")
        self._given = given
        if count:
            self.skipped += names.count(None)
        if self._plain:
            return names
        return [name and name.encode("latin-1").decode("utf-8", "surrogateescape") for name in names]
