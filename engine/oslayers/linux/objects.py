"""A kernel's objects in its memory: words, fields, columns of fields, strings.

Everything here bounds what it reads and believes nothing: a pointer is followed only where `is_pointer` says that
it could be one, a string is cut at its limit, what cannot be read is a fault that the caller counts and skips.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from engine.errors import FaultError
from engine.layout import Field, StructLayout, TypeSource
from engine.memory import Addresses, Memory, as_addresses
from engine.records import dataclass

Column = npt.NDArray[Any]
T = TypeVar("T")
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Objects:
    """Reads a kernel's objects: its memory, its types, the size and order of its words.

    One for each operation over live memory (`fresh`), so that page tables are read once in it and believed no longer.
    """

    memory: Memory
    types: TypeSource
    kernel_start: int
    """First address of the kernel's half."""
    skipped: Counter[str] = field(default_factory=Counter)
    """What was left out, by kind: told in `info`."""
    retried: Counter[str] = field(default_factory=Counter)
    """What was read again since it had changed meanwhile, by kind: told there too."""
    _known: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: Hashable, find: Callable[[], T]) -> T:
        """What `find` gives, which is asked once for each key: for few things that many others have in common.

        What reads on is to hold `apart`, and not this: else the two would wait for the garbage collector.
        """
        try:
            found: T = self._known[key]
        except KeyError:
            found = self._known[key] = find()
        return found

    def fresh(self) -> Objects:
        """The same with a view of memory of its own, for one operation."""
        return Objects(self.memory.cached(), self.types, self.kernel_start, self.skipped, self.retried)

    def apart(self) -> Objects:
        """The same without what `once` keeps, over the same view of memory."""
        return Objects(self.memory, self.types, self.kernel_start, self.skipped, self.retried)

    def silent(self) -> Objects:
        """The same, counting what it leaves out nowhere: for guesses."""
        return Objects(self.memory, self.types, self.kernel_start)

    @property
    def word(self) -> int:
        """Bytes of a pointer."""
        return self.types.pointer_size

    @property
    def word_type(self) -> str:
        """How numpy reads a pointer."""
        return f"{self.types.order}u{self.types.pointer_size}"

    def is_pointer(self, value: int) -> bool:
        """Whether `value` could be the address of an object of the kernel."""
        return self.kernel_start <= value < (1 << 8 * self.word) - 4096 and not value & 1

    # -- one --------------------------------------------------------------------------------------------

    def pointer(self, address: int) -> int:
        """The pointer at `address`. Raises FaultError."""
        if self.types.order == "<":
            return self.memory.u64(address) if self.word == 8 else self.memory.u32(address)
        return int.from_bytes(self.memory.read(address, self.word), "big")

    def value(self, address: int, member: Field) -> int:
        """A number in a member of the structure at `address`; of a bit-field its bits. Raises FaultError."""
        return self.number_of(self.memory.read(address + member.offset, member.size), member)

    def number_in(self, data: bytes, member: Field) -> int:
        """A number in a member of a structure whose bytes were read."""
        return self.number_of(data[member.offset : member.stop], member)

    def number_of(self, data: bytes, member: Field) -> int:
        """The number that the bytes of a member are."""
        number = int.from_bytes(data, "little" if self.types.order == "<" else "big", signed=False)
        if member.bit_size:
            return member.extract(number)
        if member.type.signed and number >> (8 * member.size - 1):
            number -= 1 << 8 * member.size
        return number

    def follow(self, address: int, *members: Field) -> int:
        """The pointer behind a chain of pointers, each a member of what the last points to; 0 where one is null.

        Raises FaultError, and BadDataError's kin never: what is no pointer faults when it is followed.
        """
        for member in members:
            if not address:
                return 0
            address = self.pointer(address + member.offset)
        return address

    def text(self, address: int, limit: int = 4096) -> str:
        """The C string at `address`, at most `limit` bytes, undecodable bytes as surrogates. Raises FaultError."""
        return decoded(self.memory.cstring(address, limit))

    def text_in(self, address: int, member: Field) -> str:
        """The C string in an array of characters of the structure at `address`. Raises FaultError."""
        return decoded(self.memory.read(address + member.offset, member.size).partition(b"\0")[0])

    # -- columns ------------------------------------------------------------------------------------------

    def column(self, addresses: Addresses, member: Field) -> tuple[Column, Mask]:
        """The member of each structure, and which could be read; what could not is 0. Bit-fields are taken out."""
        values, faults = self.memory.words(addresses + np.uint64(member.offset), member.dtype(self.types.order))
        good = np.ones(len(addresses), bool)
        good[faults.rows] = False
        if member.bit_size:
            wide = values.astype(np.uint64)
            values = (wide >> np.uint64(member.shift)) & np.uint64((1 << member.bit_size) - 1)
        return values, good

    def pointers(self, addresses: Addresses, member: Field) -> tuple[Addresses, Mask]:
        """The pointer in each structure, and which could be read."""
        values, good = self.column(addresses, member)
        return values.astype(np.uint64), good

    def texts(self, addresses: Addresses, member: Field) -> list[str | None]:
        """The C string in an array of characters of each structure; None where it cannot be read."""
        out = np.zeros((len(addresses), member.size), np.uint8)
        faults = self.memory.gather(addresses + np.uint64(member.offset), out)
        bad = set(faults.rows.tolist())
        return [
            None if row in bad else decoded(out[row].tobytes().partition(b"\0")[0]) for row in range(len(addresses))
        ]

    def rows(self, addresses: Sequence[int] | Addresses, size: int) -> list[bytes | None]:
        """`size` bytes at each address; None where they cannot be read whole."""
        found = self.memory.read_many([(int(address), size) for address in addresses])
        return [data if isinstance(data, bytes) else None for data in found]

    def addresses(self, values: Iterable[int]) -> Addresses:
        """Numbers as a column of addresses."""
        return as_addresses(list(values))

    def struct(self, *names: str) -> StructLayout:
        """The layout of a structure, by the first of its names that this kernel has. Raises NotFoundError."""
        return self.types.require(*names)

    def readable(self, address: int) -> bool:
        """Whether the byte at `address` can be read."""
        try:
            self.memory.u8(address)
        except FaultError:
            return False
        return True


def decoded(data: bytes) -> str:
    """Bytes out of a kernel as text; what is no UTF-8 as surrogates (PEP 383)."""
    return data.decode("utf-8", "surrogateescape")
