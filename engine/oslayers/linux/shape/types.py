"""What shape told, as types: the same interface that BTF fills, with the few members that were proved."""

from __future__ import annotations

from collections.abc import Callable

from engine.layout import DataType, Field, StructLayout, TypeKind, TypeSource

Members = dict[str, tuple[int, DataType]]
"""Name → (offset, type)."""


class Shapes(TypeSource):
    """Structures by name. A member that was not proved is absent, and a structure of which nothing is known too."""

    whole = False

    def __init__(self, pointer_size: int) -> None:
        self.pointer_size = pointer_size
        self._structs: dict[str, StructLayout] = {}
        self._later: dict[str, Callable[[], dict[str, Members]]] = {}

    def struct(self, *names: str) -> StructLayout | None:
        """See `TypeSource.struct`."""
        for name in names:
            search = self._later.pop(name, None)
            for found, members in (search() if search is not None else {}).items():
                self.add(found, members)
        return next((self._structs[name] for name in names if name in self._structs), None)

    def enum(self, name: str) -> dict[str, int] | None:
        """See `TypeSource.enum`: none has a shape."""
        return None

    def add(self, name: str, members: Members) -> None:
        """A structure with these members. Its size is not known: that of what is known of it."""
        fields = [Field(key, offset, kind.size, kind) for key, (offset, kind) in members.items()]
        fields.sort(key=lambda field: field.offset)
        self._structs[name] = StructLayout(name, max((field.stop for field in fields), default=0), fields)

    def later(self, name: str, search: Callable[[], dict[str, Members]]) -> None:
        """A structure that is searched for once somebody asks for it."""
        self._later[name] = search

    def names(self) -> dict[str, list[str]]:
        """What is known: the members of each structure."""
        return {name: [field.name for field in layout] for name, layout in self._structs.items()}


def number(size: int, *, signed: bool = False) -> DataType:
    """A number of `size` bytes."""
    return DataType(TypeKind.INTEGER, size, signed=signed)


def pointer(size: int) -> DataType:
    """A pointer to what need not be known."""
    return DataType(TypeKind.POINTER, size)


def characters(count: int) -> DataType:
    """An array of characters."""
    return array(number(1), count)


def array(kind: DataType, count: int) -> DataType:
    """`count` of a kind one after the other."""
    return DataType(TypeKind.ARRAY, kind.size * count, count=count, inner=lambda: kind)


def structure(name: str, members: Members) -> DataType:
    """A structure inside of another one."""
    fields = [Field(key, offset, kind.size, kind) for key, (offset, kind) in members.items()]
    size = max((field.stop for field in fields), default=0)
    layout = StructLayout(name, size, fields)
    return DataType(TypeKind.STRUCT, size, name, members=lambda: layout)


def list_head(word: int) -> DataType:
    """`struct list_head`."""
    return structure("list_head", {"next": (0, pointer(word)), "prev": (word, pointer(word))})
