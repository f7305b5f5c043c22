"""ISF: the JSON files in which Volatility 3 keeps types and symbols of a kernel (schema 4 to 6).

    isf = parse_isf(data)
    isf.types.struct("task_struct")["comm"]
    isf.symbols, isf.banner

The types of anonymous members have made-up names there; their members are fields like all others here.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from typing import Any

from engine.errors import NotRecognisedError
from engine.formats.symbol_table import SymbolTable
from engine.layout import VOID, DataType, Field, StructLayout, TypeKind, TypeSource
from engine.records import dataclass

DEPTH_LIMIT = 64
MEMBER_LIMIT = 1 << 17
"""Members of one structure, those of anonymous members counted."""
SIZE_LIMIT = 1 << 40

_COMPOSITE = ("struct", "union", "class")


@dataclass(frozen=True, slots=True)
class Isf:
    """One file: its types, its symbols as linked, and the kernel's banner, where it has one."""

    types: IsfTypes
    symbols: SymbolTable
    banner: bytes | None


class IsfTypes(TypeSource):
    """The types of one file; what cannot be a type is left out, as are members of it."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._base = _mapping(document, "base_types")
        self._user = _mapping(document, "user_types")
        self._enums = _mapping(document, "enums")
        pointer = self._base.get("pointer") or {}
        self.pointer_size = 4 if pointer.get("size") == 4 else 8
        self.order = ">" if pointer.get("endian") == "big" else "<"
        self._layouts: dict[str, StructLayout | None] = {}

    def struct(self, *names: str) -> StructLayout | None:
        """See `TypeSource.struct`."""
        for name in names:
            if name not in self._layouts:
                self._layouts[name] = self._layout(name)
            found = self._layouts[name]
            if found is not None:
                return found
        return None

    def enum(self, name: str) -> dict[str, int] | None:
        """See `TypeSource.enum`."""
        constants = (self._enums.get(name) or {}).get("constants")
        if not isinstance(constants, dict):
            return None
        return {key: value for key, value in constants.items() if isinstance(value, int)}

    def _layout(self, name: str) -> StructLayout | None:
        record = self._user.get(name)
        if not isinstance(record, dict) or not isinstance(record.get("size"), int):
            return None
        budget = [MEMBER_LIMIT]
        fields = sorted(self._fields(record, 0, 0, budget), key=lambda each: each.offset)
        return StructLayout(name, record["size"], fields, is_union=record.get("kind") == "union")

    def _fields(self, record: Mapping[str, Any], place: int, depth: int, budget: list[int]) -> Iterator[Field]:
        members = record.get("fields")
        for name, member in members.items() if isinstance(members, dict) and depth < DEPTH_LIMIT else ():
            budget[0] -= 1
            if budget[0] < 0:
                return
            try:
                offset, told = place + int(member["offset"]), member["type"]
                inner = self._user.get(told.get("name")) if told.get("kind") in _COMPOSITE else None
                if member.get("anonymous") and isinstance(inner, dict):
                    yield from self._fields(inner, offset, depth + 1, budget)
                elif told["kind"] == "bitfield":
                    kind = self._type(told["type"], 0)
                    bits, shift = int(told["bit_length"]), int(told["bit_position"])
                    if 0 < bits <= 8 * kind.size and 0 <= shift <= 8 * kind.size - bits:
                        yield Field(name, offset, kind.size, kind, bits, shift)
                else:
                    kind = self._type(told, 0)
                    if 0 <= offset <= SIZE_LIMIT:
                        yield Field(name, offset, kind.size, kind)
            except (KeyError, TypeError, ValueError, AttributeError):
                continue

    def _type(self, told: Mapping[str, Any], depth: int) -> DataType:
        """The type that a description means. Raises KeyError, TypeError, ValueError where it means none."""
        kind, name = told["kind"], told.get("name", "")
        if depth > DEPTH_LIMIT:
            raise ValueError("a type without an end")
        if kind == "base":
            return VOID if name == "void" else self._number(name)
        if kind == "pointer":
            inner = told["subtype"]
            return DataType(TypeKind.POINTER, self.pointer_size, inner=lambda: self._safe(inner))
        if kind == "array":
            element, count = self._type(told["subtype"], depth + 1), int(told["count"])
            if not 0 <= count * element.size <= SIZE_LIMIT:
                raise ValueError("an array that is too large")
            return DataType(TypeKind.ARRAY, count * element.size, count=count, inner=lambda: element)
        if kind == "enum":
            record = self._enums[name]
            number = self._number(record["base"])
            return DataType(
                TypeKind.ENUM, number.size, name, number.signed, values=lambda: self.enum(name) or {}
            )  # fmt: skip
        if kind in _COMPOSITE:
            record = self._user.get(name)
            if not isinstance(record, dict):
                return DataType(TypeKind.INCOMPLETE, 0, name)
            which = TypeKind.UNION if kind == "union" else TypeKind.STRUCT
            return DataType(which, int(record["size"]), name, members=lambda: self._members(name))
        return DataType(TypeKind.FUNCTION, 0, name)

    def _safe(self, told: Mapping[str, Any]) -> DataType:
        try:
            return self._type(told, 0)
        except (KeyError, TypeError, ValueError):
            return VOID

    def _members(self, name: str) -> StructLayout:
        return self.struct(name) or StructLayout(name, 0, ())

    def _number(self, name: str) -> DataType:
        record = self._base[name]
        kind = TypeKind.FLOAT if record.get("kind") == "float" else TypeKind.INTEGER
        size = int(record["size"])
        if not 0 <= size <= 64:
            raise ValueError(f"{name} of {size} bytes")
        return DataType(kind, size, name, bool(record.get("signed")))


def parse_isf(data: bytes) -> Isf:
    """What a file tells. Raises NotRecognisedError where it is no ISF."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NotRecognisedError(f"it is no JSON ({error})") from None
    if not isinstance(document, dict) or not isinstance(document.get("user_types"), dict):
        raise NotRecognisedError("it is JSON, but no ISF: there are no user_types in it")
    symbols = _mapping(document, "symbols")
    found = [
        (address, b"?", name.encode("utf-8", "surrogateescape"))
        for name, record in symbols.items()
        if isinstance(record, dict) and isinstance(address := record.get("address"), int) and 0 <= address < 1 << 64
    ]
    return Isf(IsfTypes(document), SymbolTable.of(found), _banner(symbols.get("linux_banner")))


def _mapping(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = document.get(key)
    return found if isinstance(found, dict) else {}


def _banner(record: Any) -> bytes | None:
    if not isinstance(record, dict) or not isinstance(record.get("constant_data"), str):
        return None
    try:
        return base64.b64decode(record["constant_data"]).rstrip(b"\0\n") or None
    except (binascii.Error, ValueError):
        return None
