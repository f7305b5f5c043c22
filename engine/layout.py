"""Layouts: where the fields of a kernel's structures lie, whatever told so: BTF, a PDB, a table.

    layout = types.struct("task_struct")              # None where the kernel has no such structure
    pid = layout["pid"]                               # a Field: offset, size, type
    layout.first("__state", "state").offset           # whichever of the names this kernel has
    layout.get("thread_group")                        # None where absent
    layout["se.load.weight"], layout["mem[2].base"]   # paths through structures, unions and arrays

Members are looked up by name and never by a kernel's version. Members of anonymous structures and unions are
fields like all others. Paths are resolved on demand and kept: asking again costs a dictionary look-up.

What this module does not do: it reads no memory and parses no format.
"""

from __future__ import annotations

import enum
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import field, replace

from engine.errors import NotFoundError
from engine.records import dataclass

PATH_LIMIT = 64
"""Steps of a path; the deepest in a kernel is far below."""

_STEP = re.compile(r"([^.\[\]]+)((?:\[\d{1,9}\])*)")


class TypeKind(enum.Enum):
    """What a type is, once names for it, `const` and the like are looked through."""

    VOID = "void"
    INTEGER = "integer"
    FLOAT = "float"
    ENUM = "enum"
    POINTER = "pointer"
    ARRAY = "array"
    STRUCT = "struct"
    UNION = "union"
    FUNCTION = "function"
    INCOMPLETE = "incomplete"
    """Declared, never defined."""


@dataclass(frozen=True, slots=True)
class DataType:
    """A type: its kind, its size in bytes (0 where it has none) and what it is made of."""

    kind: TypeKind
    size: int
    name: str = ""
    """Of a structure, a union, an enum or a number; empty where it has none."""
    signed: bool = False
    count: int = 0
    """Elements of an array; 0 for one without a bound."""
    inner: Callable[[], DataType] | None = field(default=None, compare=False, repr=False)
    """Gives what a pointer points to or an array is made of."""
    members: Callable[[], StructLayout] | None = field(default=None, compare=False, repr=False)
    """Gives the fields of a structure or union."""
    values: Callable[[], dict[str, int]] | None = field(default=None, compare=False, repr=False)
    """Gives the names of an enum with their values."""

    @property
    def target(self) -> DataType:
        """What a pointer points to, or an array is made of; VOID where that is not known."""
        return self.inner() if self.inner is not None else VOID

    @property
    def layout(self) -> StructLayout | None:
        """The fields of a structure or union; None for all else."""
        return self.members() if self.members is not None else None

    def dtype(self, order: str = "<") -> str:
        """How numpy reads it: `<u4`; bytes (`V16`) where it is no number. `order` is `<` or `>`."""
        if self.kind is TypeKind.FLOAT and self.size in (2, 4, 8):
            return f"{order}f{self.size}"
        scalar = self.kind in (TypeKind.INTEGER, TypeKind.ENUM, TypeKind.POINTER)
        if scalar and self.size in (1, 2, 4, 8):
            return f"{order}{'i' if self.signed else 'u'}{self.size}"
        return f"V{self.size}"


VOID = DataType(TypeKind.VOID, 0)


@dataclass(frozen=True, slots=True)
class Field:
    """A member of a structure: where it lies, what it is.

    Of a bit-field, `offset` and `size` are the word that holds it: `extract` takes it out of that word.
    """

    name: str
    offset: int
    size: int
    type: DataType
    bit_size: int = 0
    """Bits of a bit-field; 0 for any other member."""
    shift: int = 0
    """How far a bit-field stands from the word's least significant bit, whatever the byte order."""

    @property
    def stop(self) -> int:
        """First byte behind it."""
        return self.offset + self.size

    def dtype(self, order: str = "<") -> str:
        """How numpy reads its bytes; a bit-field as the unsigned word that holds it."""
        if self.bit_size:
            return f"{order}u{self.size}" if self.size in (1, 2, 4, 8) else f"V{self.size}"
        return self.type.dtype(order)

    def extract(self, word: int) -> int:
        """The value of a bit-field in the unsigned word that holds it; of another member, `word` itself."""
        if not self.bit_size:
            return word
        value = (word >> self.shift) & ((1 << self.bit_size) - 1)
        if self.type.signed and value >> (self.bit_size - 1):
            value -= 1 << self.bit_size
        return value

    def moved(self, delta: int, name: str) -> Field:
        """The same field as a part of what begins `delta` bytes before."""
        return replace(self, name=name, offset=self.offset + delta)


class StructLayout:
    """The fields of one structure or union; those of anonymous members are among them.

    Iterating gives the direct fields in their order. `size` is in bytes.
    """

    def __init__(self, name: str, size: int, fields: Iterable[Field], *, is_union: bool = False) -> None:
        self.name = name
        self.size = size
        self.is_union = is_union
        self.fields = tuple(fields)
        self._direct: dict[str, Field] = {}
        for each in self.fields:
            self._direct.setdefault(each.name, each)
        self._paths: dict[str, Field | None] = {}

    def __repr__(self) -> str:
        kind = "union" if self.is_union else "struct"
        return f"<{kind} {self.name or '(anonymous)'}: {self.size} bytes, {len(self.fields)} fields>"

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    def __contains__(self, path: str) -> bool:
        return self._find(path) is not None

    def __getitem__(self, path: str) -> Field:
        found = self._find(path)
        if found is None:
            raise NotFoundError(f"{self.name or 'the structure'} has no member {path}")
        return found

    def get(self, *paths: str) -> Field | None:
        """The first of the paths that exists; None where none does."""
        for path in paths:
            found = self._find(path)
            if found is not None:
                return found
        return None

    def first(self, *paths: str) -> Field:
        """The first of the paths that exists. Raises NotFoundError where none does."""
        found = self.get(*paths)
        if found is None:
            raise NotFoundError(f"{self.name or 'the structure'} has none of the members {', '.join(paths)}")
        return found

    def offset(self, *paths: str) -> int:
        """The offset of the first of the paths that exists. Raises NotFoundError where none does."""
        return self.first(*paths).offset

    def _find(self, path: str) -> Field | None:
        found = self._direct.get(path)
        if found is not None:
            return found
        if path not in self._paths:
            self._paths[path] = self._resolve(path)
        return self._paths[path]

    def _resolve(self, path: str) -> Field | None:
        steps = path.split(".")
        layout: StructLayout | None = self
        found: Field | None = None
        for step in steps if len(steps) <= PATH_LIMIT else ():
            match = _STEP.fullmatch(step)
            direct = layout._direct.get(match[1]) if match is not None and layout is not None else None
            part = _element(direct, match[2]) if match is not None and direct is not None else None
            if part is None:
                return None
            found = part.moved(found.offset if found is not None else 0, path)
            layout = found.type.layout
        return found


def _element(member: Field, indices: str) -> Field | None:
    """The element of an array that `[1][2]` means; None where there is none. Arrays without a bound have all."""
    offset, kind = member.offset, member.type
    for index in map(int, re.findall(r"\d+", indices)):
        if kind.kind is not TypeKind.ARRAY or (kind.count and index >= kind.count):
            return None
        kind = kind.target
        offset += index * kind.size
    return replace(member, offset=offset, size=kind.size, type=kind) if indices else member


class TypeSource(ABC):
    """Whatever knows the structures of one kernel build."""

    order: str = "<"
    """`<` or `>`: the byte order of the target's words."""
    pointer_size: int = 8
    whole: bool = True
    """Whether a member that is not told does not exist; false where only some could be found out."""

    @abstractmethod
    def struct(self, *names: str) -> StructLayout | None:
        """The structure, union or name for one that is called like the first of `names` that exists.

        None where none of them exists.
        """

    @abstractmethod
    def enum(self, name: str) -> dict[str, int] | None:
        """The names of an enum and their values; None where there is no such enum."""

    def require(self, *names: str) -> StructLayout:
        """Like `struct`. Raises NotFoundError where none of the names exists."""
        found = self.struct(*names)
        if found is None:
            raise NotFoundError(f"no structure is called {' or '.join(names)}")
        return found
