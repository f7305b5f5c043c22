"""System.map: the symbols of a kernel as nm(1) lists them when it is linked, a line for each: address, letter, name."""

from __future__ import annotations

import re
from collections.abc import Iterator

from engine.errors import NotRecognisedError
from engine.formats.symbol_table import SymbolTable

LINE = re.compile(rb"([0-9a-fA-F]{8}|[0-9a-fA-F]{16}) ([A-Za-z?]) ([!-~]{1,512})(?:\t.*)?\r?$")
COUNT_LIMIT = 1 << 22
"""Symbols; the largest kernels have a quarter of a million."""


def parse_system_map(data: bytes) -> SymbolTable:
    """The symbols of a System.map, or of what /proc/kallsyms has shown to root.

    Raises NotRecognisedError where its first line is no symbol, or it holds no addresses.
    """
    if LINE.match(data[: data.find(b"\n") if b"\n" in data[:1024] else 1024]) is None:
        raise NotRecognisedError("its first line is not ADDRESS LETTER NAME, as in a System.map")
    table = SymbolTable.of(_symbols(data))
    if not len(table) or not int(table.addresses[-1]):
        raise NotRecognisedError("all its addresses are zero")
    return table


def _symbols(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    for count, line in enumerate(data.split(b"\n")):
        found = LINE.match(line)
        if found is not None and count < COUNT_LIMIT:
            if line.endswith(b"]") and b"\t[" in line:
                continue  # a module's: those lie elsewhere in each boot
            yield int(found[1], 16), found[2], found[3]
