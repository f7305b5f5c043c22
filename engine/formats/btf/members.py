"""Members of BTF structures as fields: bit-fields placed in words, anonymous members taken apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from engine.errors import BadDataError
from engine.formats.btf.records import Kind
from engine.layout import DataType, Field, TypeKind

DEPTH_LIMIT = 32
"""Anonymous structures inside one another; five is the most in Linux."""
MEMBER_LIMIT = 1 << 17
"""Members of one structure, those of anonymous members counted: one type holds at the most 65,535."""


class Types(Protocol):
    """What taking a structure apart asks of a blob; see `Btf` for each."""

    def resolve(self, number: int) -> int:
        """See `Btf.resolve`."""

    def kind(self, number: int) -> Kind | None:
        """See `Btf.kind`."""

    def size(self, number: int) -> int:
        """See `Btf.size`."""

    def members(self, number: int) -> Iterator[tuple[str, int, int, int]]:
        """See `Btf.members`."""

    def field(self, name: str, reference: int, bit_offset: int, bits: int, limit: int) -> Field:
        """See `Btf.field`."""


def field_place(name: str, kind: DataType, bit_offset: int, bits: int, limit: int, big_endian: bool) -> Field:
    """A member at `bit_offset` of a structure of `limit` bytes.

    Raises BadDataError where it lies outside, at no byte without being a bit-field, or is of a type that is not told.
    """
    if kind.kind is TypeKind.INCOMPLETE:
        raise BadDataError(0, detail=f"member {name} of a type that is declared alone, or lost")
    if not bits:
        if bit_offset % 8 or bit_offset // 8 + kind.size > limit:
            raise BadDataError(0, detail=f"member {name} at bit {bit_offset} of a structure of {limit} bytes")
        return Field(name, bit_offset // 8, kind.size, kind)
    if bit_offset + bits > 8 * limit or bits > 128:
        raise BadDataError(0, detail=f"bit-field {name} at bit {bit_offset} of a structure of {limit} bytes")
    size = max(1, kind.size)
    start = bit_offset // (8 * size) * size
    if bit_offset + bits > 8 * (start + size) or start + size > limit:  # packed: only the bytes it touches
        start = bit_offset // 8
        size = (bit_offset + bits + 7) // 8 - start
    inside = bit_offset - 8 * start
    shift = 8 * size - inside - bits if big_endian else inside
    return Field(name, start, size, kind, bits, shift)


def flatten(types: Types, number: int) -> tuple[list[Field], int]:
    """The fields of a structure or union, those of its anonymous members among them, and how many were left out."""
    fields: list[Field] = []
    skipped = 0
    left = MEMBER_LIMIT
    # Each entry: the members still to come of one structure, its place in the outermost one, its size.
    stack = [(types.members(number), 0, types.size(number))]
    while stack:
        members, place, limit = stack[-1]
        try:
            name, reference, bit_offset, bits = next(members)
        except StopIteration:
            stack.pop()
            continue
        left -= 1
        if left < 0:
            raise BadDataError(0, detail=f"BTF structure {number} has more than {MEMBER_LIMIT} members")
        try:
            if name:
                found = types.field(name, reference, bit_offset, bits, limit)
                fields.append(found.moved(place, name) if place else found)
                continue
            inner = types.resolve(reference)
            if inner and types.kind(inner) in (Kind.STRUCT, Kind.UNION):
                size = types.size(inner)
                if bit_offset % 8 or bit_offset // 8 + size > limit or len(stack) >= DEPTH_LIMIT:
                    raise BadDataError(0, detail=f"an anonymous member of BTF structure {number} cannot be")
                stack.append((types.members(inner), place + bit_offset // 8, size))
        except BadDataError:
            skipped += 1
    return fields, skipped
