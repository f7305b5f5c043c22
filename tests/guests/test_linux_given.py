"""`symbols=PATH`: a guest whose RAM has lost what the kernel says of itself is read by a file of its symbols."""

from __future__ import annotations

import importlib.util
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from guests.recording import Recording
from support import require

from engine.errors import UnusableTargetError
from engine.file_memory import FileMemory
from engine.formats.btf import Btf
from engine.oslayer import Base
from engine.oslayers.linux import LinuxLayer
from engine.types import ProcessInfo, Region

GUEST, OTHER = "amd64-6.1-4level", "amd64-6.12"
PAGE = 4096


@pytest.fixture(scope="module")
def isf() -> ModuleType:
    """The script that exports a kernel's symbols; Volatility 3 reads what it writes."""
    path = Path(__file__).parents[2] / "scripts" / "isf.py"
    spec = importlib.util.spec_from_file_location("isf_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def opened(path: Path, symbols: Path | None = None) -> LinuxLayer:
    options = {"cache": "no"} | ({"symbols": str(symbols)} if symbols is not None else {})
    return LinuxLayer.open(Base(FileMemory(str(path), immutable=True)), options)


@pytest.fixture(scope="module")
def whole(guest: Callable[[str], Recording]) -> LinuxLayer:
    """The guest as it was recorded."""
    return opened(guest(GUEST).image)


def pages_of(layer: LinuxLayer, start: int, size: int) -> Iterator[int]:
    """Physical addresses of the pages that touch a range of the kernel's image."""
    for page in range(start & ~(PAGE - 1), start + size, PAGE):
        yield layer.kernel.found.memory.virt_to_phys(page)


@pytest.fixture(scope="module")
def without(guest, whole, tmp_path_factory) -> Iterator[Callable[[str], Path]]:
    """A copy of its RAM in which the types, the symbols or both are zeros: `without("types symbols")`."""
    folder = tmp_path_factory.mktemp("without")
    profile = whole.kernel.profile
    types = profile.require("__start_BTF"), profile.require("__stop_BTF") - profile.require("__start_BTF")
    tables = profile.kallsyms.tables
    symbols = whole.kernel.found.image.start + tables.names, tables.behind - tables.names

    def get(words: str) -> Path:
        path = folder / words.replace(" ", "-")
        if not path.exists():
            subprocess.run(["cp", "--sparse=always", str(guest(GUEST).image), str(path)], check=True, timeout=60)
            with open(path, "r+b") as file:
                for word in words.split():
                    for page in pages_of(whole, *{"types": types, "symbols": symbols}[word]):
                        file.seek(page)
                        file.write(bytes(PAGE))
        return path

    yield get
    shutil.rmtree(folder, ignore_errors=True)  # copies have a hundred megabytes each


def shown(layer: LinuxLayer) -> list[tuple[ProcessInfo, list[Region]]]:
    return [(process.info, list(process.regions())) for process in layer.processes()]


def linked(layer: LinuxLayer) -> list[tuple[str, str, int]]:
    """(name, letter, address) of the kernel's symbols as its System.map has them."""
    slide = layer.kernel.found.vmcoreinfo.kernel_offset
    start = layer.kernel.found.candidate.kernel_start
    symbols = layer.kernel.profile.kallsyms
    return [(each.name, each.kind, each.address - slide if each.address >= start else each.address) for each in symbols]


def raw_types(layer: LinuxLayer) -> bytes:
    profile = layer.kernel.profile
    start = profile.require("__start_BTF")
    return layer.kernel.found.memory.read(start, profile.require("__stop_BTF") - start)


def system_map(layer: LinuxLayer, path: Path) -> Path:
    path.write_text("".join(f"{address:016x} {kind} {name}\n" for name, kind, address in linked(layer)))
    return path


def test_the_copies_have_lost_what_they_should(without):
    """Else the other tests would show nothing."""
    profile = opened(without("types symbols")).kernel.profile
    assert profile.kallsyms is None
    assert not isinstance(profile.types, Btf)


@pytest.mark.parametrize("packed", ["json", "json.xz", "json.gz"])
def test_an_isf_stands_for_types_and_symbols(guest, isf, without, whole, tmp_path, packed):
    path = tmp_path / f"linux.{packed}"
    isf.write_isf(str(guest(GUEST).image), str(path))
    assert shown(opened(without("types symbols"), path)) == shown(whole)


def test_a_system_map_stands_for_symbols(without, whole, tmp_path):
    layer = opened(without("symbols"), system_map(whole, tmp_path / "System.map"))
    assert shown(layer) == shown(whole)
    known = layer.kernel.profile.kallsyms
    assert {(each.name, each.address) for each in known} == {
        (each.name, each.address) for each in whole.kernel.profile.kallsyms
    }


def test_btf_alone_stands_for_types(without, whole, tmp_path):
    path = tmp_path / "vmlinux.btf"
    path.write_bytes(raw_types(whole))
    assert shown(opened(without("types"), path)) == shown(whole)


def vmlinux(layer: LinuxLayer, folder: Path, build_id: str) -> Path:
    """An ELF file with the symbols and the types of a kernel, by the GNU assembler and linker."""
    require(shutil.which("as") and shutil.which("ld"), "there is no assembler and linker")
    (folder / "types").write_bytes(raw_types(layer))
    lines = ['.section .BTF, "a"', f'.incbin "{folder / "types"}"', ".text", "nop"]
    names = [each for each in linked(layer) if each[0].replace("_", "").isalnum()]
    seen: set[str] = set()
    for name, kind, address in names:
        if name not in seen:
            seen.add(name)
            lines += [f'.set "{name}", {address:#x}', *([f'.globl "{name}"'] if kind.isupper() else [])]
    source, built, linked_file = folder / "v.s", folder / "v.o", folder / "vmlinux"
    source.write_text("\n".join(lines) + "\n")
    link = ["ld", "-e", "0", f"--build-id=0x{build_id}", "-o", linked_file, built]
    for command in (["as", "-o", built, source], link):
        subprocess.run(command, check=True, timeout=60)
    return linked_file


def test_a_vmlinux_stands_for_types_and_symbols(without, whole, tmp_path):
    path = vmlinux(whole, tmp_path, whole.kernel.found.vmcoreinfo.build_id)
    assert shown(opened(without("types symbols"), path)) == shown(whole)


def test_a_vmlinux_of_another_build_is_refused(guest, whole, tmp_path):
    path = vmlinux(whole, tmp_path, "0123456789abcdef0123456789abcdef01234567")
    with pytest.raises(UnusableTargetError, match=r"not of this kernel: it is of build 0123456789abcdef.*give the"):
        opened(guest(GUEST).image, path)


def test_an_isf_of_another_kernel_is_refused(guest, isf, tmp_path):
    path = tmp_path / "other.json"
    isf.write_isf(str(guest(OTHER).image), str(path))
    with pytest.raises(UnusableTargetError, match=r"not of this kernel: it is «Linux version 6\.12"):
        opened(guest(GUEST).image, path)


def test_types_and_symbols_without_a_name_are_told_by_what_vmcoreinfo_states(guest, tmp_path):
    other = opened(guest(OTHER).image)
    (tmp_path / "btf").write_bytes(raw_types(other))
    with pytest.raises(UnusableTargetError, match="it is of one in which "):
        opened(guest(GUEST).image, tmp_path / "btf")
    with pytest.raises(UnusableTargetError, match="known symbols at other addresses"):
        opened(guest(GUEST).image, system_map(other, tmp_path / "System.map"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not ADDRESS LETTER NAME"),
        (b"no symbols\n", "not ADDRESS LETTER NAME"),
        (b"0000000000000000 T _stext\n" * 9, "all its addresses are zero"),
        (b"{}", "no user_types"),
        (b"{" * 100_000, "no JSON"),
        (b"\x1f\x8b no gzip", "symbols="),
        (b"\xfd7zXZ\0 no xz", "symbols="),
        (b"\x7fELF", "symbols="),
        (struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 400, 400, 4000), "cut"),
    ],
)
def test_what_is_no_file_of_symbols_is_refused_with_one_sentence(guest, tmp_path, content, why):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UnusableTargetError, match=why) as caught:
        opened(guest(GUEST).image, path)
    assert str(path) in str(caught.value)


def test_the_types_of_an_isf_are_those_it_was_made_of(guest, isf, whole, tmp_path):
    path = tmp_path / "linux.json"
    isf.write_isf(str(guest(GUEST).image), str(path))
    from engine.formats.isf import parse_isf

    found, own = parse_isf(path.read_bytes()).types, whole.kernel.profile.types
    assert isinstance(own, Btf)
    names = ("task_struct", "mm_struct", "page", "sock", "module", "file", "printk_info", "maple_range_64", "cred")
    for name in names:
        one, other = found.require(name), own.require(name)
        assert one.size == other.size
        assert {(each.name, each.offset, each.size, each.bit_size, each.shift, each.dtype()) for each in one} == {
            (each.name, each.offset, each.size, each.bit_size, each.shift, each.dtype()) for each in other
        }
    assert found.enum("pid_type") == own.enum("pid_type")
