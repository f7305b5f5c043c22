"""What readelf(1) of binutils says of an ELF file: the oracle of the tests of engine.formats.elf."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property

from support import require

from engine.types import ExportInfo, ImportInfo

_SYMBOL = re.compile(
    r"\s*\d+: ([0-9a-f]+) +(\d+|0x[0-9a-f]+) +(\S+) +(\S+) +(\S+) +(?:\[[^]]*\] +)?(<[^>]*>|\S+) (.*)"
)
_SECTION = re.compile(r" *\[ *\d+\] (\S*) +(\S+) +([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+) [0-9a-f]+ +([A-Zolp]*) +\d")
_LOAD = re.compile(r"  LOAD +0x([0-9a-f]+) 0x([0-9a-f]+) 0x[0-9a-f]+ 0x([0-9a-f]+) 0x([0-9a-f]+)")
_KINDS = {"FUNC": "function", "OBJECT": "object", "COMMON": "object", "TLS": "tls", "IFUNC": "ifunc"}


@dataclass(frozen=True)
class Symbol:
    value: int
    size: int
    kind: str
    binding: str
    visibility: str
    section: str
    name: str
    version: str | None
    default: bool


class Readelf:
    """One file as readelf sees it."""

    def __init__(self, path: str) -> None:
        require(shutil.which("readelf"), "readelf (binutils) is not installed")
        self.path = os.fspath(path)

    def _run(self, *options: str) -> str:
        done = subprocess.run(
            ["readelf", "-W", *options, self.path],
            capture_output=True, timeout=60, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        return done.stdout.decode("utf-8", "surrogateescape")

    @cached_property
    def loads(self) -> list[tuple[int, int, int, int]]:
        """(offset, address, size in the file, size in memory) of the segments that are loaded."""
        return [tuple(int(field, 16) for field in match.groups()) for match in _LOAD.finditer(self._run("-l"))]

    @property
    def link_base(self) -> int:
        first = [address - offset for offset, address, _, size in self.loads if offset < 4096 and size]
        return (first or [min((address for _, address, _, _ in self.loads), default=0)])[0] & -4096

    @property
    def load_size(self) -> int:
        return max((address + size + 4095 & -4096) - self.link_base for _, address, _, size in self.loads)

    @cached_property
    def _symbol_lines(self) -> list[str]:
        text = self._run("--dyn-syms")
        if not _SYMBOL.search(text):
            text = self._run("-D", "-s")  # no section headers: by the dynamic section
        return text.splitlines()

    @cached_property
    def symbols(self) -> list[Symbol]:
        found = []
        for line in self._symbol_lines:
            match = _SYMBOL.fullmatch(line)
            if match is None:
                continue
            value, size, kind, binding, visibility, section, text = match.groups()
            # (NUMBER) stands behind versions of other files, also of what was copied from them.
            text, needed = re.subn(r" \(\d+\)$", "", text.strip())
            name, mark, version = text.partition("@")
            found.append(
                Symbol(
                    int(value, 16), int(size, 0), kind, binding, visibility, section, name,
                    version.removeprefix("@") if mark else None, version.startswith("@") or not mark or bool(needed),
                )
            )  # fmt: skip
        return found

    def exports(self) -> list[ExportInfo]:
        """As `Symbols.exports` promises them, sorted."""
        defined = [
            symbol
            for symbol in self.symbols
            if symbol.section not in ("UND", "ABS", "COM")
            and symbol.binding in ("GLOBAL", "WEAK", "UNIQUE")
            and symbol.visibility in ("DEFAULT", "PROTECTED")
            and symbol.kind not in ("SECTION", "FILE")
            and symbol.name
        ]
        taken = {symbol.name for symbol in defined if symbol.default}
        others = [symbol for symbol in defined if symbol.name not in taken]
        latest = {symbol.name: symbol for symbol in sorted(others, key=lambda s: self._definitions[s.version or ""])}
        chosen = [symbol for symbol in defined if symbol.default] + list(latest.values())
        return sorted(
            (
                ExportInfo(
                    symbol.name,
                    symbol.value if symbol.kind == "TLS" else symbol.value - self.link_base,
                    symbol.size or None,
                    _KINDS.get(symbol.kind),
                )
                for symbol in chosen
            ),
            key=by_place,
        )

    @cached_property
    def _definitions(self) -> dict[str, int]:
        """Version → its number."""
        found = re.findall(r"Index: (\d+)  Cnt: \d+  Name: (\S+)", self._run("-V"))
        return {name: int(number) for number, name in found}

    @cached_property
    def _libraries(self) -> dict[int, tuple[str, str]]:
        """Version number → (library, version)."""
        found, library = {}, ""
        for line in self._run("-V").splitlines():
            if file := re.search(r"Version: 1  File: (\S+)  Cnt:", line):
                library = file[1]
            elif name := re.search(r"Name: (\S+)  Flags: .*  Version: (\d+)", line):
                found[int(name[2])] = (library, name[1])
        return found

    def imports(self) -> list[ImportInfo]:
        """Undefined dynamic symbols in the order of the table."""
        found = []
        for line in self._symbol_lines:
            match = _SYMBOL.fullmatch(line)
            if match is None or match[6] != "UND" or match[4] not in ("GLOBAL", "WEAK", "UNIQUE"):
                continue
            if match[3] in ("SECTION", "FILE"):
                continue
            text = match[7].strip()
            number = re.search(r" \((\d+)\)$", text)
            name = re.sub(r" \(\d+\)$", "", text).partition("@")[0]
            library, version = self._libraries[int(number[1])] if number else (None, None)
            if name:
                found.append(ImportInfo(name, library, version))
        return found

    def build_id(self) -> str | None:
        match = re.search(r"Build ID: ([0-9a-f]+)", self._run("-n"))
        return match[1] if match else None

    def _dynamic(self, tag: str) -> list[str]:
        return re.findall(rf"\({tag}\) .*\[(.*)\]", self._run("-d"))

    def needed(self) -> list[str]:
        return self._dynamic("NEEDED")

    def soname(self) -> str | None:
        return next(iter(self._dynamic("SONAME")), None)

    def sections(self) -> list[tuple[str, int, int]]:
        """(name, address, size) of the sections that a loaded image has in memory."""
        return [
            (match[1], int(match[3], 16), int(match[5], 16))
            for match in _SECTION.finditer(self._run("-S"))
            if "A" in match[6] and not ("T" in match[6] and match[2] == "NOBITS")
        ]


def by_place(export: ExportInfo) -> tuple[object, ...]:
    """A key to sort exports by that tells all of them apart."""
    return export.offset, export.name, export.size or 0, export.kind or ""
