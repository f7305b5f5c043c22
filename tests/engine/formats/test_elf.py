"""ELF files, against readelf: system libraries, and what gcc makes of one source in every style."""

from __future__ import annotations

import ctypes.util
import shutil
import sys
from pathlib import Path

import pytest
from elf_samples import VERSIONED, VERSIONS, compiled, stripped
from readelf import Readelf, by_place
from support import require

from engine.bytes_memory import BytesMemory
from engine.errors import BadDataError, NotRecognisedError
from engine.file_memory import FileMemory
from engine.formats.elf import ElfFile
from engine.types import ExportInfo, ImportInfo


def mapped_file(name: str) -> str:
    """A library of this very process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"/{name}" in line:
            return line.split(maxsplit=5)[5]
    require(False, f"no {name} is mapped here")
    raise AssertionError


SAMPLES = {
    "ls": lambda: str(shutil.which("ls")),
    "libc": lambda: mapped_file("libc.so"),
    "loader": lambda: mapped_file("ld-linux"),
    "python": lambda: sys.executable,
    "libstdc++": lambda: mapped_file("libstdc++") if ctypes.util.find_library("stdc++") else "",
    "sysv": lambda: compiled("sysv.so", "-shared", "-Wl,--hash-style=sysv", "-Wl,-soname,libsysv.so.1"),
    "gnu": lambda: compiled("gnu.so", "-shared", "-Wl,--hash-style=gnu", "-Wl,--build-id=sha1"),
    "both": lambda: compiled("both.so", "-shared", "-Wl,--hash-style=both", "-Wl,--build-id=0xdeadbeef"),
    "versioned": lambda: compiled("versioned.so", "-shared", source=VERSIONED, script=VERSIONS),
    "wide pages": lambda: compiled("wide.so", "-shared", "-Wl,-z,max-page-size=0x200000"),
    "32 bits": lambda: compiled("narrow.so", "-shared", "-m32"),
    "static": lambda: compiled("static", "-static", "-no-pie", source="void _start(void) {}"),
    "fixed address": lambda: compiled("fixed", "-no-pie", "-Wl,-Ttext-segment=0x70000000", "-Wl,-e,plain",
                                      "-rdynamic", "-Wl,--unresolved-symbols=ignore-all"),
    "object": lambda: compiled("object.o", "-c", source="int number; int f(void) { return number; }"),
    "no sections": lambda: stripped(compiled("gnu.so", "-shared", "-Wl,--hash-style=gnu", "-Wl,--build-id=sha1")),
}  # fmt: skip


@pytest.fixture(params=SAMPLES)
def path(request) -> str:
    return SAMPLES[request.param]()


@pytest.fixture
def elf(path) -> ElfFile:
    return ElfFile(FileMemory(path))


def test_exports_are_those_of_readelf(elf, path):
    oracle = Readelf(path if not path.endswith(".no-sections") else path.removesuffix(".no-sections"))
    assert sorted(elf.exports(), key=by_place) == oracle.exports()
    assert elf.skipped == 0


def test_imports_are_those_of_readelf(elf, path):
    oracle = Readelf(path if not path.endswith(".no-sections") else path.removesuffix(".no-sections"))
    assert list(elf.imports()) == oracle.imports()


def test_the_build_id_is_that_of_readelf(elf, path):
    assert elf.build_id() == Readelf(path).build_id()


def test_name_and_needed_libraries_are_those_of_readelf(elf, path):
    assert (elf.soname(), elf.needed()) == (Readelf(path).soname(), Readelf(path).needed())


def test_sections_in_memory_are_those_of_readelf(elf, path):
    oracle = Readelf(path)
    if elf.loads:
        found = [(section.name, section.base, section.size) for section in elf.section_infos(elf.link_base)]
        assert found == oracle.sections()


def test_base_and_size_of_the_loaded_image_follow_the_program_headers(elf, path):
    oracle = Readelf(path)
    if elf.loads:
        assert (elf.link_base, elf.load_size) == (oracle.link_base, oracle.load_size)


def test_kinds_of_symbols_are_told_apart():
    elf = ElfFile(FileMemory(SAMPLES["gnu"]()))
    kinds = {export.name: export.kind for export in elf.exports()}
    assert {name: kinds[name] for name in ("plain", "number", "counter_of_thread", "chosen", "weak", "guarded")} == {
        "plain": "function", "number": "object", "counter_of_thread": "tls", "chosen": "ifunc",
        "weak": "function", "guarded": "function",
    }  # fmt: skip


def test_hidden_symbols_are_not_exported():
    names = {export.name for export in ElfFile(FileMemory(SAMPLES["gnu"]())).exports()}
    assert names.isdisjoint({"invisible", "hidden_function", "choose", "wanted"})


def test_undefined_symbols_are_imported_weak_ones_too():
    assert {ImportInfo("wanted"), ImportInfo("perhaps")} <= set(ElfFile(FileMemory(SAMPLES["gnu"]())).imports())


def test_of_two_versions_the_default_one_is_exported():
    elf = ElfFile(FileMemory(SAMPLES["versioned"]()))
    place = {symbol.name: symbol.value for symbol in Readelf(SAMPLES["versioned"]()).symbols if symbol.default}["size"]
    assert [(export.name, export.offset) for export in elf.exports() if export.name == "size"] == [("size", place)]


def test_of_versions_without_a_default_the_latest_is_exported():
    path = SAMPLES["versioned"]()
    places = [symbol.value for symbol in Readelf(path).symbols if (symbol.name, symbol.version) == ("gone", "ONE_2")]
    assert [export.offset for export in ElfFile(FileMemory(path)).exports() if export.name == "gone"] == places


def test_a_file_without_section_headers_has_no_sections():
    assert ElfFile(FileMemory(SAMPLES["no sections"]())).sections == ()


def test_a_program_that_exports_nothing_has_its_imports_without_section_headers():
    library = compiled("libwanted.so", "-shared", source="int wanted(int x) { return x; }")
    path = compiled("quiet", library, "-pie", "-Wl,--hash-style=gnu", "-fvisibility=hidden",
                    source="extern int wanted(int); int _start(void) { return wanted(1); }")  # fmt: skip
    elf = ElfFile(FileMemory(stripped(path)))
    assert list(elf.imports()) == Readelf(path).imports() == [ImportInfo("wanted")]


def test_segments_stand_in_for_sections():
    elf = ElfFile(FileMemory(SAMPLES["no sections"]()))
    infos = list(elf.segment_infos(0x1000))
    loads = [(base - 0, size) for _, base, _, size in Readelf(SAMPLES["no sections"]()).loads]
    assert [(info.base - 0x1000, info.size) for info in infos if info.name.startswith("LOAD#")] == loads
    assert {"LOAD#0.r--", "LOAD#1.r-x", "DYNAMIC#0"} <= {info.name for info in infos}


@pytest.mark.parametrize("data", [b"", b"MZ", b"\x7fEL", b"#!/bin/sh\n"])
def test_what_is_no_elf_is_not_recognised(data):
    with pytest.raises(NotRecognisedError, match="not an ELF image"):
        ElfFile(BytesMemory(data))


@pytest.mark.parametrize("data", [b"\x7fELF", b"\x7fELF\x02\x01\x01" + bytes(20), b"\x7fELF\x07\x01" + bytes(60)])
def test_a_header_that_is_cut_or_impossible_is_bad_data(data):
    with pytest.raises(BadDataError):
        ElfFile(BytesMemory(data))


def test_names_that_are_not_text_survive():
    data = bytearray(Path(SAMPLES["sysv"]()).read_bytes())
    at = data.index(b"\0plain\0")
    data[at + 1 : at + 3] = b"\xff\xfe"
    names = [export.name for export in ElfFile(BytesMemory(data)).exports()]
    assert b"\xff\xfeain" in [name.encode("utf-8", "surrogateescape") for name in names]


def test_a_symbol_whose_name_lies_outside_of_the_table_is_skipped_and_counted():
    data = bytearray(Path(SAMPLES["sysv"]()).read_bytes())
    elf = ElfFile(BytesMemory(data))
    expected = list(elf.exports())
    symbols = elf.dynamic.linked(6)
    row = next(n for n in range(1, 99) if elf.dynamic.string(elf.memory.u32(symbols + 24 * n)) == "plain")
    data[symbols + 24 * row : symbols + 24 * row + 4] = b"\xff\xff\xff\x7f"
    damaged = ElfFile(BytesMemory(data))
    assert list(damaged.exports()) == [export for export in expected if export.name != "plain"]
    assert damaged.skipped == 1


def test_an_export_without_a_size_has_none():
    elf = ElfFile(FileMemory(compiled("bare.so", "-shared", source='__asm__(".globl bare\\nbare: ret");')))
    assert [export for export in elf.exports() if export.name == "bare"] == [
        ExportInfo("bare", next(e.offset for e in elf.exports()), None, None)
    ]
