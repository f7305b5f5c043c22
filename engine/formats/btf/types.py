"""BTF types by name, as layouts: only what is asked for is made, and kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError
from engine.formats.btf.checks import Checker
from engine.formats.btf.members import field_place, flatten
from engine.formats.btf.records import (
    MODIFIERS,
    ROW_WORDS,
    TYPE_WORDS,
    Header,
    Kind,
    kinds_of,
    parse_header,
    type_starts,
)
from engine.formats.name_column import NameColumn
from engine.layout import VOID, DataType, Field, StructLayout, TypeKind, TypeSource
from engine.records import dataclass

CHAIN_LIMIT = 64
"""Names, `const` and arrays around one type; Linux refuses more than 32."""
SIZE_LIMIT = 1 << 40
"""Bytes of an array; per-CPU tables and the like stay far below."""

_COMPOSITE = frozenset({Kind.STRUCT, Kind.UNION})
_ENUMS = frozenset({Kind.ENUM, Kind.ENUM64})
_SIGNED = 1
_LONG = ("long unsigned int", "unsigned long", "long int", "long")


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable that BTF tells of (per-CPU ones, in a kernel): its section and where it lies there."""

    name: str
    section: str
    offset: int
    size: int
    type: DataType


class Btf(TypeSource):
    """The types of one blob. Split BTF (a kernel module's) continues the numbers of its `base`.

    What is made once is kept. Safe for concurrent readers. `skipped` counts members that were left out since they
    cannot be; `check` says whether all of the blob is sound.
    """

    def __init__(
        self,
        data: bytes | memoryview,
        base: Btf | None = None,
        *,
        pointer_size: int | None = None,
        starts: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Index the types of `data`: the whole blob; bytes behind it are not looked at.

        `pointer_size` is found from the size of `long` where it is not given. `starts` is the index of the very same
        bytes (`index`), kept from before.
        Raises NotRecognisedError where it is no BTF, BadDataError where it is cut or its types cannot be told apart.
        """
        self.header: Header = parse_header(bytes(data[:24]))
        if len(data) < self.header.size:
            raise BadDataError(len(data), detail=f"BTF of {self.header.size} bytes is cut")
        self.base = base
        self.order = self.header.order
        self.skipped = 0
        start, size = self.header.types
        words = np.frombuffer(data, self.order + "u4", size // 4, start)
        self._words: npt.NDArray[np.uint32] = words.astype(np.uint32, copy=self.order == ">")
        start, size = self.header.strings
        self._strings = bytes(data[start : start + size])
        if (size and self._strings[-1]) or (base is None and not self._strings.startswith(b"\0")):
            raise BadDataError(start, detail="the BTF strings do not begin and end with a NUL")
        if base is not None and base.order != self.order:
            raise BadDataError(0, detail="split BTF and its base differ in byte order")
        try:
            self._starts = type_starts(self._words) if starts is None else starts
        except BadDataError as error:
            raise BadDataError(error.address + self.header.types[0], detail=error.detail) from None
        self.first: int = base.count if base is not None else 1
        """The number of the first type of this blob itself."""
        self.count: int = self.first + len(self._starts)
        """One more than the highest type number; 0 is void."""
        self._strings_start: int = base.strings_stop if base is not None else 0
        self.strings_stop: int = self._strings_start + len(self._strings)
        self._types: dict[int, DataType] = {}
        self._layouts: dict[int, StructLayout] = {}
        self._named: dict[str, StructLayout | None] = {}
        self.pointer_size = pointer_size or (base.pointer_size if base is not None else self._long_size())

    @property
    def index(self) -> npt.NDArray[np.int32]:
        """Where each type begins, in words: to be kept, see `starts`."""
        return self._starts

    def check(self) -> None:
        """Look at every type, member and name. Raises BadDataError, with an offset in the blob, for what cannot be."""
        section = self.header.types[0]
        Checker(self._words, self._starts, self.count, self._strings, self._strings_start, section).run()

    # -- by number ------------------------------------------------------------------------------------

    def _record(self, number: int) -> tuple[Btf, int]:
        """The blob that holds a type, and the index of its first word there."""
        if number >= self.first:
            if number >= self.count:
                raise BadDataError(0, detail=f"BTF has no type {number}")
            return self, int(self._starts[number - self.first])
        if self.base is None or number <= 0:
            raise BadDataError(0, detail=f"BTF has no type {number}")
        return self.base._record(number)

    def _head(self, number: int) -> tuple[int, int, int]:
        """Name offset, info and third word of a type."""
        blob, at = self._record(number)
        name, info, third = blob._words[at : at + TYPE_WORDS].tolist()
        return name, info, third

    def _rows(self, number: int) -> list[list[int]]:
        """The rows behind a type, as lists of words."""
        blob, at = self._record(number)
        info = int(blob._words[at + 1])
        width = ROW_WORDS[Kind(info >> 24 & 0x1F)]
        rows = blob._words[at + TYPE_WORDS : at + TYPE_WORDS + width * (info & 0xFFFF)]
        found: list[list[int]] = rows.reshape(-1, width).tolist()
        return found

    def _extra(self, number: int, count: int) -> list[int]:
        blob, at = self._record(number)
        found: list[int] = blob._words[at + TYPE_WORDS : at + TYPE_WORDS + count].tolist()
        return found

    def _string(self, offset: int) -> str:
        if offset < self._strings_start:
            return self.base._string(offset) if self.base is not None else ""
        start = offset - self._strings_start
        stop = self._strings.find(0, start) if start < len(self._strings) else -1
        return self._strings[start:stop].decode("utf-8", "surrogateescape") if stop >= 0 else ""

    def kind(self, number: int) -> Kind | None:
        """The kind of a type; None for void. Raises BadDataError where there is no such number."""
        return Kind(self._head(number)[1] >> 24 & 0x1F) if number else None

    def name(self, number: int) -> str:
        """The name of a type; empty where it has none. Raises BadDataError where there is no such number."""
        return self._string(self._head(number)[0]) if number else ""

    def size(self, number: int) -> int:
        """The size in bytes that a structure, a union, a number or an enum states."""
        return self._head(number)[2]

    def resolve(self, number: int) -> int:
        """The type behind names, `const` and the like. Raises BadDataError where they never end."""
        for _ in range(CHAIN_LIMIT):
            if not number:
                return 0
            _, info, third = self._head(number)
            if info >> 24 & 0x1F not in MODIFIERS:
                return number
            number = third
        raise BadDataError(0, detail=f"BTF type {number} refers to itself")

    def type(self, number: int) -> DataType:
        """The type of that number, names looked through. Raises BadDataError where it cannot be."""
        return self._type(number, CHAIN_LIMIT)

    def _type(self, number: int, depth: int) -> DataType:
        number = self.resolve(number)
        if not number:
            return VOID
        if number not in self._types:
            self._types[number] = self._make(number, depth)
        return self._types[number]

    def _make(self, number: int, depth: int) -> DataType:
        name_at, info, size = self._head(number)
        kind, name = Kind(info >> 24 & 0x1F), self._string(name_at)
        match kind:
            case Kind.STRUCT | Kind.UNION:
                which = TypeKind.STRUCT if kind is Kind.STRUCT else TypeKind.UNION
                return DataType(which, size, name, members=lambda: self._layout(number))
            case Kind.INT:
                signed = bool(self._extra(number, 1)[0] >> 24 & _SIGNED)
                return DataType(TypeKind.INTEGER, size, name, signed)
            case Kind.ENUM | Kind.ENUM64:
                return DataType(TypeKind.ENUM, size, name, self._is_signed(info), values=lambda: self._enum(number))
            case Kind.FLOAT:
                return DataType(TypeKind.FLOAT, size, name, signed=True)
            case Kind.PTR:
                return DataType(TypeKind.POINTER, self.pointer_size, inner=lambda: self.type(size))
            case Kind.ARRAY:
                return self._array(number, depth)
            case Kind.FWD:
                return DataType(TypeKind.INCOMPLETE, 0, name)
            case Kind.FUNC | Kind.FUNC_PROTO:
                return DataType(TypeKind.FUNCTION, 0, name)
        raise BadDataError(0, detail=f"BTF type {number} is a {kind.name} where a type of data should be")

    def _array(self, number: int, depth: int) -> DataType:
        element, _, count = self._extra(number, 3)
        if not depth:
            raise BadDataError(0, detail=f"BTF array {number} is made of itself")
        inner = self._type(element, depth - 1)
        if inner.kind is TypeKind.INCOMPLETE:
            raise BadDataError(0, detail=f"BTF array {number} of a type that is declared alone, or lost")
        if count * inner.size > SIZE_LIMIT:
            raise BadDataError(0, detail=f"BTF array {number} has {count} elements of {inner.size} bytes")
        return DataType(TypeKind.ARRAY, count * inner.size, count=count, inner=lambda: inner)

    # -- structures and enums -------------------------------------------------------------------------

    def _layout(self, number: int) -> StructLayout:
        if number not in self._layouts:
            name_at, info, size = self._head(number)
            members, skipped = flatten(self, number)
            self.skipped += skipped
            is_union = info >> 24 & 0x1F == Kind.UNION
            self._layouts[number] = StructLayout(self._string(name_at), size, members, is_union=is_union)
        return self._layouts[number]

    def members(self, number: int) -> Iterator[tuple[str, int, int, int]]:
        """The members of a structure or union: name, type, bit offset, bits (0: no bit-field)."""
        packed = self._head(number)[1] >> 31
        for name, reference, offset in self._rows(number):
            if packed:
                yield self._string(name), reference, offset & 0xFFFFFF, offset >> 24
            else:
                yield self._string(name), reference, *self._old_bit_field(reference, offset)

    def _old_bit_field(self, reference: int, offset: int) -> tuple[int, int]:
        """Bit offset and bits of a member whose bit-field, if it is one, stands in its INT type."""
        try:
            number = self.resolve(reference)
        except BadDataError:
            return offset, 0  # whoever wants its type is told
        if not number or self.kind(number) is not Kind.INT:
            return offset, 0
        (data,) = self._extra(number, 1)
        bits, size = data & 0xFF, self._head(number)[2]
        return offset + (data >> 16 & 0xFF), bits if bits != 8 * size else 0

    def field(self, name: str, reference: int, bit_offset: int, bits: int, limit: int) -> Field:
        """A member of a structure of `limit` bytes as a Field. Raises BadDataError where it cannot be one."""
        kind = self.type(reference)
        return field_place(name, kind, bit_offset, bits, limit, self.order == ">")

    def _enum(self, number: int) -> dict[str, int]:
        info = self._head(number)[1]
        wide = info >> 24 & 0x1F == Kind.ENUM64
        signed = self._is_signed(info)
        bits = 64 if wide else 32
        found: dict[str, int] = {}
        for name, *value in self._rows(number):
            whole = value[0] | value[1] << 32 if wide else value[0]
            found[self._string(name)] = whole - (1 << bits) if signed and whole >> (bits - 1) else whole
        return found

    def _is_signed(self, info: int) -> bool:
        """Whether the values of an enum are signed."""
        return bool(info >> 31) or not (info >> 24 & 0x1F == Kind.ENUM64 or self._enums_have_signs)

    @cached_property
    def _enums_have_signs(self) -> bool:
        """Whether this blob tells signed enums: before Linux 6.0 none did, and all values were taken for signed."""
        if self.base is not None:
            return self.base._enums_have_signs
        info = self._words[self._starts + 1][np.isin(self._kinds, (Kind.ENUM, Kind.ENUM64))]
        return bool((info >> np.uint32(31)).any())

    # -- by name --------------------------------------------------------------------------------------

    @cached_property
    def _kinds(self) -> npt.NDArray[Any]:
        return kinds_of(self._words[self._starts + 1]).astype(np.uint8)

    @cached_property
    def _name_columns(self) -> list[tuple[npt.NDArray[Any] | None, NameColumn]]:
        """Columns of names with the types that their rows mean (None: row i is the i-th type).

        A split blob has two: some of its types have names among the strings of its base.
        """
        offsets = self._words[self._starts].astype(np.int64)
        if self.base is None:
            return [(None, NameColumn(self._strings, offsets))]
        ours = np.flatnonzero(offsets >= self._strings_start)
        columns: list[tuple[npt.NDArray[Any] | None, NameColumn]] = [
            (ours, NameColumn(self._strings, offsets[ours] - self._strings_start))
        ]
        below: Btf | None = self.base
        while below is not None:
            rows = np.flatnonzero((offsets >= below._strings_start) & (offsets < below.strings_stop))
            columns.append((rows, NameColumn(below._strings, offsets[rows] - below._strings_start)))
            below = below.base
        return columns

    def numbers(self, name: str, kinds: frozenset[Kind] = frozenset(Kind)) -> list[int]:
        """The types of these kinds with this name, ascending; those of the base, if any, come first."""
        found = self.base.numbers(name, kinds) if self.base is not None else []
        wanted = name.encode("utf-8", "surrogateescape")
        own: list[int] = []
        for rows, column in self._name_columns if wanted else ():
            own += [row if rows is None else int(rows[row]) for row in column.find(wanted)]
        return found + [self.first + row for row in sorted(own) if int(self._kinds[row]) in kinds]

    def struct(self, *names: str) -> StructLayout | None:
        """See `TypeSource.struct`; of several with one name the first."""
        for name in names:
            if name not in self._named:
                self._named[name] = self._struct(name)
            found = self._named[name]
            if found is not None:
                return found
        return None

    def _struct(self, name: str) -> StructLayout | None:
        for number in self.numbers(name, _COMPOSITE) + self.numbers(name, frozenset({Kind.TYPEDEF})):
            target = self.resolve(number)
            if target and self.kind(target) in _COMPOSITE:
                return self._layout(target)
        return None

    def enum(self, name: str) -> dict[str, int] | None:
        """See `TypeSource.enum`."""
        for number in self.numbers(name, _ENUMS):
            return self._enum(number)
        return None

    def names(self, kinds: frozenset[Kind] = _COMPOSITE) -> Iterator[tuple[int, str]]:
        """The types of these kinds in this blob itself that have a name: their numbers and names."""
        wanted = np.isin(self._kinds, np.array(sorted(kinds), np.uint8))
        for row in np.flatnonzero(wanted).tolist():
            name = self._string(int(self._words[self._starts[row]]))
            if name:
                yield self.first + row, name

    def variables(self) -> Iterator[Variable]:
        """The variables of this blob's sections; those that cannot be are left out and counted."""
        for number, section in self.names(frozenset({Kind.DATASEC})):
            for reference, offset, size in self._rows(number):
                try:
                    name, info, kind = self._head(reference)
                    if info >> 24 & 0x1F == Kind.VAR:
                        yield Variable(self._string(name), section, offset, size, self.type(kind))
                except BadDataError:
                    self.skipped += 1

    def _long_size(self) -> int:
        """The size of `long`, which on Linux is that of a pointer; 8 where it is not told."""
        for name in _LONG:
            for number in self.numbers(name, frozenset({Kind.INT})):
                size = self._head(number)[2]
                if size in (4, 8):
                    return size
        return 8
