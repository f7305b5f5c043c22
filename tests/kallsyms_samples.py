"""Kallsyms tables for tests, written from the description of the format alone, in every layout that kernels had."""

from __future__ import annotations

import collections
import functools
import random
import string
import struct
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

Symbol = tuple[int, str, str]
"""Address, nm's letter, name."""


MERGES = 30
"""Tokens of more than one byte; a kernel has as many as there are bytes that occur in no name."""


@dataclass(frozen=True)
class Shape:
    """How a kernel lays its tables out."""

    order: str = "<"
    word: int = 8
    mode: str = "relative"
    """absolute, relative, percpu, pcrel"""
    addresses_first: bool = False
    """As before Linux 6.4."""
    count_size: int = 8
    """Bytes from the number of symbols to the names."""
    marker_size: int = 4
    sequences: str = ""
    """Where seqs_of_names stands: `markers` (6.2, 6.3: in front of the token table), `end`, or nowhere."""
    table_start: int = 0x4000
    base: int = 0xFFFFFFFF81000000
    """Virtual address of the image's first byte."""


LAYOUTS = {
    "x86-64 5.10": Shape(mode="percpu", addresses_first=True),
    "x86-64 6.2": Shape(mode="percpu", addresses_first=True, sequences="markers"),
    "x86-64 6.12": Shape(mode="percpu", sequences="end"),
    "x86-64 6.18": Shape(mode="relative", sequences="end"),
    "x86-64 7.3": Shape(mode="pcrel", count_size=4, sequences="end"),
    "x86-64 4.19": Shape(mode="percpu", addresses_first=True, marker_size=8),
    "x86-64 4.4": Shape(mode="absolute", addresses_first=True, marker_size=8),
    "i386 6.1": Shape(word=4, count_size=4, addresses_first=True, base=0xC1000000),
    "i386 6.5": Shape(word=4, count_size=4, sequences="end", base=0xC1000000),
    "i386 4.4": Shape(word=4, count_size=4, mode="absolute", addresses_first=True, base=0xC1000000),
    "arm 7.3": Shape(word=4, count_size=4, mode="absolute", sequences="end", base=0xC0008000),
    "s390x 6.1": Shape(order=">", addresses_first=True, base=0x100000),
    "s390x 6.12": Shape(order=">", sequences="end", base=0x3FFE0000000),
    "s390x 7.3": Shape(order=">", mode="pcrel", count_size=4, sequences="end", base=0x3FFE0000000),
    "ppc64 4.4": Shape(order=">", mode="absolute", addresses_first=True, marker_size=8, base=0xC000000000000000),
    "ppc 6.12": Shape(order=">", word=4, count_size=4, sequences="end", base=0xC0000000),
}


def symbols_of(shape: Shape, count: int = 800, seed: int = 1) -> list[Symbol]:
    """Made-up symbols in the order of their addresses, some of one name, one of a name with a length of two bytes."""
    chance = random.Random(seed)
    words = ["get", "put", "task", "mm", "__x64_sys", "page", "init", "do", "vfs", "tcp", "inode", "lock", "cpu", "irq"]
    found: list[Symbol] = []
    if shape.mode == "percpu":
        found += [(8 * number, "A", f"per_cpu_{number}") for number in range(10)]
    address = shape.base
    for number in range(count - len(found)):
        name = "_".join(chance.choices(words, k=chance.randint(1, 4))) + (str(number) if chance.random() < 0.8 else "")
        found.append((address, chance.choice("tTdDrRbB"), name))
        address += chance.choice([0, 2, 16, 48, 112])
    address, kind, _ = found[40]
    found[40] = address, kind, "".join(chance.choices(string.ascii_letters, k=300))
    address, kind, _ = found[20]
    found[20] = shape.base, "T", "_text"
    return sorted(found, key=lambda each: each[0])


@functools.cache
def compress(symbols: tuple[Symbol, ...]) -> tuple[list[bytes], list[list[int]]]:
    """256 tokens, bytes that occur standing for themselves, and each symbol as a list of tokens."""
    rows = [list((kind + name).encode()) for _, kind, name in symbols]
    used = {byte for row in rows for byte in row} | set(b"0123456789")
    tokens = [bytes([code]) if code in used else b"" for code in range(256)]
    free = [code for code in range(255, -1, -1) if code not in used]
    for code in free[:MERGES]:
        pairs = collections.Counter(pair for row in rows for pair in pairwise(row))
        if not pairs:
            break
        first, second = pairs.most_common(1)[0][0]
        tokens[code] = tokens[first] + tokens[second]
        rows = [_merged(row, first, second, code) for row in rows]
    return tokens, rows


def _merged(row: list[int], first: int, second: int, code: int) -> list[int]:
    out: list[int] = []
    at = 0
    while at < len(row):
        pair = at + 1 < len(row) and row[at] == first and row[at + 1] == second
        out.append(code if pair else row[at])
        at += 2 if pair else 1
    return out


class Image:
    """A kernel's image with tables of some shape in it, junk around them."""

    def __init__(self, symbols: list[Symbol], shape: Shape, size: int = 1 << 17) -> None:
        self.symbols = symbols
        self.shape = shape
        self.at: dict[str, int] = {}
        self.data = bytearray(random.Random(7).randbytes(size))
        self.data[::5] = bytes(len(self.data[::5]))
        self._place = shape.table_start
        self._write()

    def _put(self, name: str, content: bytes, alignment: int | None = None) -> None:
        align = self.shape.word if alignment is None else alignment
        start = -(-self._place // align) * align
        self.data[self._place : start] = bytes(start - self._place)
        self.data[start : start + len(content)] = content
        self.at[name] = start
        self._place = start + len(content)

    def _write(self) -> None:
        shape = self.shape
        tokens, rows = compress(tuple(self.symbols))
        names = bytearray()
        markers = []
        for number, row in enumerate(rows):
            if number % 256 == 0:
                markers.append(len(names))
            length = len(row)
            names += bytes([length]) if length < 128 else bytes([length & 0x7F | 0x80, length >> 7])
            names += bytes(row)
        starts = [sum(map(len, tokens[:code])) + code for code in range(256)]
        marker = "Q" if shape.marker_size == 8 else "I"
        if shape.addresses_first:
            self._put_addresses()
        count_at_word = struct.pack(f"{shape.order}{'Q' if shape.count_size == 8 else 'I'}", len(rows))
        if shape.count_size == 8 and shape.marker_size == 4:  # since Linux 4.20 a u32, padded
            count_at_word = struct.pack(f"{shape.order}I4x", len(rows))
        self._put("num_syms", count_at_word)
        self._put("names", bytes(names), 4 if shape.count_size == 4 else None)
        self._put("markers", struct.pack(f"{shape.order}{len(markers)}{marker}", *markers))
        if shape.sequences == "markers":
            self._put("seqs", bytes(range(256)) * (3 * len(rows) // 256))
        self._put("token_table", b"".join(token + b"\0" for token in tokens))
        self._put("token_index", struct.pack(f"{shape.order}256H", *starts))
        if not shape.addresses_first:
            self._put_addresses()
        if shape.sequences == "end":
            self._put("seqs", bytes(range(256)) * (3 * len(rows) // 256))

    def _put_addresses(self) -> None:
        shape = self.shape
        order, mask = shape.order, (1 << 32) - 1
        places = [address for address, _, _ in self.symbols]
        word = "Q" if shape.word == 8 else "I"
        if shape.mode == "absolute":
            self._put("addresses", struct.pack(f"{order}{len(places)}{word}", *places))
            return
        start = -(-self._place // shape.word) * shape.word
        base = next(place for place in places if place >= shape.base)
        if shape.mode == "relative":
            values = [place - base for place in places]
        elif shape.mode == "percpu":
            values = [place if place < 4096 else base - 1 - place for place in places]
        else:
            values = [place - (shape.base + start + 4 * row) for row, place in enumerate(places)]
        self._put("addresses", struct.pack(f"{order}{len(places)}I", *(value & mask for value in values)))
        if shape.mode != "pcrel":
            self._put("base", struct.pack(order + word, base))


@functools.cache
def image(layout: str, count: int = 800, **changes: Any) -> Image:
    """The image of one of the layouts; shared, so not to be written to."""
    shape = replace(LAYOUTS[layout], **changes)
    return Image(symbols_of(shape, count), shape)
