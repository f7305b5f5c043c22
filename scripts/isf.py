"""Writes the symbols of a Linux kernel for Volatility 3 (an ISF), out of an image of its memory alone.

    .venv/bin/python scripts/isf.py memory.raw linux.json.xz
    vol -s DIRECTORY_OF_IT -f memory.raw linux.pslist

Its types come from BTF, its symbols from kallsyms, all from the image. Schema 6.2.0 of Volatility's ISF.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

from engine.errors import BadDataError
from engine.file_memory import FileMemory
from engine.formats.btf import Btf, Kind
from engine.oslayer import Base
from engine.oslayers.linux import LinuxLayer

LINKED_TEXT = 0xFFFF_FFFF_8100_0000
"""_stext of x86-64 kernels as linked: Volatility adds the slide again."""
LINKED_START = 0xFFFF_FFFF_8000_0000
VARIABLES = {
    "init_task": "task_struct", "init_pid_ns": "pid_namespace", "init_nsproxy": "nsproxy", "modules": "list_head",
    "init_uts_ns": "uts_namespace", "init_mm": "mm_struct", "init_user_ns": "user_namespace",
}  # fmt: skip
_COMPOSITE = {Kind.STRUCT: "struct", Kind.UNION: "union"}


class Exporter:
    """The types of one kernel as JSON."""

    def __init__(self, btf: Btf) -> None:
        self.btf = btf
        self.base: dict[str, Any] = {
            "void": {"size": 0, "signed": False, "kind": "void", "endian": "little"},
            "pointer": {"size": btf.pointer_size, "signed": False, "kind": "int", "endian": "little"},
        }
        self.user: dict[str, Any] = {}
        self.enums: dict[str, Any] = {}
        self._waiting: list[int] = []
        self._names: dict[int, str] = {}

    def run(self) -> None:
        """Take all structures, unions and enums that have a name, and whatever they are made of."""
        taken: set[str] = set()
        for number, name in self.btf.names(frozenset({Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.ENUM64})):
            if name not in taken:
                taken.add(name)
                self.describe(number)
        while self._waiting:
            self._add(self._waiting.pop())

    def describe(self, reference: int) -> dict[str, Any]:
        """What ISF says of a type."""
        number = self.btf.resolve(reference)
        kind = self.btf.kind(number)
        if kind is None:
            return {"kind": "base", "name": "void"}
        if kind in _COMPOSITE or kind in (Kind.ENUM, Kind.ENUM64):
            return {"kind": _COMPOSITE.get(kind, "enum"), "name": self._named(number)}
        if kind is Kind.PTR:
            return {"kind": "pointer", "subtype": self.describe(self.btf._head(number)[2])}
        if kind is Kind.ARRAY:
            element, _, count = self.btf._extra(number, 3)
            return {"kind": "array", "count": count, "subtype": self.describe(element)}
        if kind in (Kind.INT, Kind.FLOAT):
            return {"kind": "base", "name": self._number(number)}
        if kind is Kind.FWD:
            return {"kind": "struct", "name": self.btf.name(number)}
        return {"kind": "function"}

    def _number(self, number: int) -> str:
        made = self.btf.type(number)
        kind = "bool" if made.name == "_Bool" else "char" if made.name.endswith("char") else made.kind.value
        self.base[made.name] = {
            "size": made.size, "signed": made.signed, "endian": "little", "kind": {"integer": "int"}.get(kind, kind),
        }  # fmt: skip
        return made.name

    def _named(self, number: int) -> str:
        if number not in self._names:
            self._names[number] = self.btf.name(number) or f"unnamed_{number}"
            self._waiting.append(number)
        return self._names[number]

    def _add(self, number: int) -> None:
        name, kind = self._names[number], self.btf.kind(number)
        if kind not in _COMPOSITE:
            made = self.btf.type(number)
            base = f"enum{8 * made.size}"
            self.base[base] = {"size": made.size, "signed": made.signed, "kind": "int", "endian": "little"}
            values = made.values() if made.values is not None else {}
            self.enums.setdefault(name, {"size": made.size, "base": base, "constants": values})
            return
        fields: dict[str, Any] = {}
        for row, (member, reference, offset, bits) in enumerate(self.btf.members(number)):
            fields[member or f"unnamed_field_{row}"] = self._member(member, reference, offset, bits)
        self.user.setdefault(name, {"size": self.btf.size(number), "fields": fields, "kind": _COMPOSITE[kind]})

    def _member(self, name: str, reference: int, offset: int, bits: int) -> dict[str, Any]:
        told = self.describe(reference)
        if not bits:
            found = {"type": told, "offset": offset // 8}
            return found if name else found | {"anonymous": True}
        size = 8 * max(1, self.btf.type(reference).size)
        told = {"kind": "bitfield", "bit_position": offset % size, "bit_length": bits, "type": told}
        return {"type": told, "offset": offset // size * size // 8}


def isf_of(layer: LinuxLayer) -> dict[str, Any]:
    """The whole document. Raises SystemExit where the kernel does not carry what it needs."""
    profile = layer.kernel.profile
    if not isinstance(profile.types, Btf) or profile.kallsyms is None:
        raise SystemExit(f"this kernel does not carry its types and symbols: {'; '.join(profile.notes)}")
    exporter = Exporter(profile.types)
    exporter.run()
    start = profile.require("_stext")
    slide = start - LINKED_TEXT if start >= LINKED_START else 0
    symbols: dict[str, Any] = {}
    for symbol in profile.kallsyms:
        moved = symbol.address - slide if symbol.address > LINKED_START else symbol.address
        symbols.setdefault(symbol.name, {"address": moved})
    for name, kind in VARIABLES.items():
        if name in symbols and kind in exporter.user:
            symbols[name]["type"] = {"kind": "struct", "name": kind}
    banner = layer.kernel.found.memory.cstring(profile.require("linux_banner"), 512) + b"\0"
    char = {"kind": "array", "count": len(banner), "subtype": {"kind": "base", "name": "char"}}
    symbols["linux_banner"] |= {"type": char, "constant_data": base64.b64encode(banner).decode()}
    producer = {"name": "cloudfs", "version": "1.0.0"}
    return {
        "metadata": {"format": "6.2.0", "producer": producer, "linux": {"symbols": [], "types": []}},
        "base_types": exporter.base, "user_types": exporter.user, "enums": exporter.enums, "symbols": symbols,
    }  # fmt: skip


def write_isf(image: str, output: str) -> None:
    """Write the ISF of an image, packed as the name of the output says."""
    document = json.dumps(isf_of(LinuxLayer.open(Base(FileMemory(image)), {}))).encode()
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(output).suffix, bytes)
    Path(output).write_bytes(pack(document))


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("image", help="an image of physical memory")
    parser.add_argument("output", help="FILE.json, FILE.json.xz or FILE.json.gz")
    arguments = parser.parse_args()
    try:
        write_isf(arguments.image, arguments.output)
    except BadDataError as error:
        raise SystemExit(f"the types of this kernel are damaged: {error}") from None


if __name__ == "__main__":
    main()
