"""`modules/`: names, memory, tables, and the image that ELF tools open."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_os import FakeModule, Life, Pieces, fake_machine
from support import require
from tree import at, directory, names, open_at, read, read_all, text

from cloudfs.nodes.files.image import ImageMemory, ImagePlan, Piece, image_plan
from cloudfs.nodes.root import build_root
from engine.bytes_memory import BytesMemory
from engine.errors import FaultError, NotFoundError
from engine.targets import open_target
from engine.types import ExportInfo, ImportInfo, ModuleInfo, SectionInfo

PAGE = 4096
BASE = 0x10000
MODULES = "os/fake/processes/7/modules"

#  BASE        +0x1000      +0x2000      +0x3000
#  |first page | (hole)     | third page |
PIECES = {BASE: b"1" * PAGE, BASE + 2 * PAGE: b"3" * PAGE}


def module(name, base=BASE, size=3 * PAGE, **more):
    return FakeModule(ModuleInfo(name, f"/lib/{name}", base, size, "x86_64", "00ff"), None, **more)


@pytest.fixture
def fake(monkeypatch):
    with fake_machine(monkeypatch, writable=True) as (machine, layer):
        memory = Pieces(PIECES)
        one = FakeModule(
            ModuleInfo("one.so", "/lib/one.so", BASE, 3 * PAGE, "x86_64", "00ff"),
            memory.window(BASE, 3 * PAGE),
            sections=[
                SectionInfo(".text", BASE, 16),
                SectionInfo(".data", BASE + PAGE - 8, PAGE + 16),
                SectionInfo(".text", BASE + 2 * PAGE, 4),
                SectionInfo("../x\n", BASE, 4),
            ],
            exports=[ExportInfo("later", 0x20, 8, "object"), ExportInfo("a\x1b", 0x10)],
            imports=[ImportInfo("puts", "libc.so.6", "GLIBC_2.2.5"), ImportInfo("free")],
        )
        layer.table[7] = Life(pieces=PIECES, modules=[one])
        yield build_root(machine), layer


def test_a_module_has_what_is_known_of_it(fake):
    root, _ = fake
    assert names(root, f"{MODULES}/one.so") == [
        "info", "info.json", "mem", "image", "exports", "imports", "sections",
    ]  # fmt: skip
    assert json.loads(text(root, f"{MODULES}/one.so/info.json")) == {
        "name": "one.so", "path": "/lib/one.so", "base": "0x10000", "size": 3 * PAGE,
        "architecture": "x86_64", "build_id": "00ff",
    }  # fmt: skip
    assert "build_id:     00ff\n" in text(root, f"{MODULES}/one.so/info")


def test_a_module_of_unknown_address_has_no_memory(fake):
    root, layer = fake
    layer.kernel_modules = [FakeModule(ModuleInfo("driver", None, None, 100))]
    assert names(root, "os/fake/modules/driver") == ["info", "info.json", "exports", "imports"]


def test_of_two_modules_of_one_name_the_second_has_its_base_and_both_stay_what_they_are(fake):
    root, layer = fake
    layer.table[7].modules = [module("a", 0x1000), module("a", 0x2000), module("a", 0x2000), module("a@2000", 0x3000)]
    assert names(root, MODULES) == ["a", "a@2000", "a@2000#2", "a@2000@3000"]
    for name, base in (("a", 0x1000), ("a@2000", 0x2000), ("a@2000@3000", 0x3000)):
        assert json.loads(text(root, f"{MODULES}/{name}/info.json"))["base"] == f"{base:#x}"
        assert at(root, f"{MODULES}/{name}").identity == directory(root, MODULES).child(name).identity


def test_hostile_names_of_modules_and_sections_are_names(fake):
    root, layer = fake
    layer.table[7].modules += [module("../../etc/passwd", 0x1000), module("", 0x2000), module(".", 0x3000)]
    assert names(root, MODULES)[1:] == ["..%2F..%2Fetc%2Fpasswd", "%", "%2E"]
    assert "..%2Fx%0A" in names(root, f"{MODULES}/one.so/sections")


def test_mem_of_a_module_is_exact_and_ends_with_it(fake):
    root, _ = fake
    node = at(root, f"{MODULES}/one.so/mem")
    assert node.attributes().size == 3 * PAGE
    file = node.open(0)
    assert read(file, 0, 1 << 20) == b"1" * PAGE
    with pytest.raises(FaultError):
        read(file, PAGE, 8)
    assert read(file, 3 * PAGE - 2, 100) == b"33"
    assert read(file, 3 * PAGE, 100) == b""
    assert bytes(file.read(3 * PAGE, 100, memoryview(bytearray(100)))) == b""


def test_sections_are_whole_and_may_be_written(fake):
    root, _ = fake
    assert names(root, f"{MODULES}/one.so/sections")[:3] == [".text", ".data", ".text@12000"]
    data = at(root, f"{MODULES}/one.so/sections/.data")
    assert data.attributes().size == PAGE + 16
    assert read_all(data) == b"1" * 8 + bytes(PAGE) + b"3" * 8
    file = open_at(root, f"{MODULES}/one.so/sections/.text@12000", os.O_RDWR)
    assert file.write(1, b"abcdef") == 3
    assert read_all(at(root, f"{MODULES}/one.so/sections/.text@12000")) == b"3abc"


def test_exports_are_addresses_in_order_and_imports_say_from_where(fake):
    root, _ = fake
    assert text(root, f"{MODULES}/one.so/exports") == (
        "0000000000010010        - -        a\\033\n0000000000010020        8 object   later\n"
    )
    assert text(root, f"{MODULES}/one.so/imports") == "puts libc.so.6 GLIBC_2.2.5\nfree - -\n"


def test_a_module_that_is_unmapped_is_gone(fake):
    root, layer = fake
    node = at(root, f"{MODULES}/one.so")
    layer.table[7].modules = []
    for _ in range(10_000):
        try:
            list(node.children())
        except NotFoundError:
            break
    else:
        pytest.fail("it is still there")


def test_kernel_modules_are_read_through_their_own_memory(fake):
    root, layer = fake
    memory = BytesMemory(b"k" * PAGE)
    info = ModuleInfo("ext4", None, 0xFFFF_FFFF_C000_0000, PAGE)
    layer.kernel_modules = [FakeModule(info, memory, sections=[SectionInfo(".text", info.base + 4, 8)])]
    assert read_all(at(root, "os/modules/ext4/mem")) == b"k" * PAGE
    assert read_all(at(root, "os/modules/ext4/sections/.text")) == b"k" * 8


# -- the image ----------------------------------------------------------------------------------------------


def test_what_is_no_elf_image_is_served_as_it_lies(fake):
    root, _ = fake
    assert read_all(at(root, f"{MODULES}/one.so/image")) == b"1" * PAGE + bytes(PAGE) + b"3" * PAGE


def test_pieces_are_put_where_the_plan_says_with_zeros_between_and_patches_over_them():
    memory = BytesMemory(bytes(range(256)))
    plan = ImagePlan((Piece(0, 16, 8), Piece(10, 100, 4)), 16, ((6, b"\xaa\xbb\xcc"), (15, b"\xdd")))
    image = ImageMemory(memory, plan)
    whole = bytes(range(16, 22)) + b"\xaa\xbb\xcc\0" + bytes(range(100, 104)) + b"\0\xdd"
    assert image.read(0, 16) == whole
    for start in range(16):
        for stop in range(start, 17):
            assert image.read(start, stop - start) == whole[start:stop]
    buffer = memoryview(bytearray(20))
    with pytest.raises(FaultError) as fault:
        image.readinto(4, buffer)
    assert fault.value.address == 16
    assert bytes(buffer[:12]) == whole[4:]


def test_a_fault_of_the_memory_is_one_of_the_image_at_its_offset():
    image = ImageMemory(Pieces(PIECES).window(BASE, 3 * PAGE), ImagePlan((Piece(0x100, PAGE - 8, 16),), 0x200))
    with pytest.raises(FaultError) as fault:
        image.read(0, 0x200)
    assert fault.value.address == 0x108
    assert [(e.start, e.size) for e in image.extents()] == [(0x100, 8)]


def elf(loads, *, size=0x4000, header=b""):
    """A 64-bit ELF header with these PT_LOAD (offset, address, file size), as loaded at 0."""
    import struct

    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0x1234, 0, 64, 56, len(loads), 64, 9, 8)
    for offset, address, length in loads:
        head += struct.pack("<IIQQQQQQ", 1, 5, offset, address, address, length, length, 4096)
    return BytesMemory((head + header).ljust(size, b"x"))


def test_segments_go_back_to_their_offsets_and_the_header_says_that_there_are_no_sections():
    image_bytes = elf([(0, 0, 0x800), (0x1000, 0x2000, 0x123)])
    plan = image_plan(image_bytes)
    assert plan.pieces == (Piece(0, 0, 0x800), Piece(0x1000, 0x2000, 0x123))
    assert plan.size == 0x1123
    data = ImageMemory(image_bytes, plan).read(0, 0x1123)
    assert data[0x28:0x30] == bytes(8)
    assert data[0x3C:0x40] == bytes(4)
    assert data[0x1000:] == b"x" * 0x123


@pytest.mark.parametrize(
    "loads",
    [
        [(0, 0, 1 << 63)],
        [(0, 0, 0x100), (1 << 60, 0x2000, 0x1000)],
        [(0, 0, 0x3000), (0x1000, 0x2000, 0x3000), (0x1800, 0, 0x800)],
        [(5, 0, 0x100)],
        [(0, 1 << 63, 0x1000)],
        [],
    ],
)
def test_hostile_headers_make_a_small_file_that_can_be_read(loads):
    memory = elf(loads)
    plan = image_plan(memory)
    assert 0 < plan.size <= 2 * memory.size + (16 << 20)
    last = 0
    for piece in plan.pieces:
        assert piece.offset >= last
        assert 0 <= piece.address <= memory.size - piece.size
        last = piece.offset + piece.size
    assert len(ImageMemory(memory, plan).read(0, plan.size)) == plan.size


@pytest.fixture(scope="module")
def target():
    """A program with libraries, and its modules in the tree."""
    code = "import ssl, ctypes; print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        with open_target("native") as machine:
            root = build_root(machine)
            yield root, f"os/native/processes/{process.pid}"
    finally:
        process.kill()
        process.communicate()


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_readelf_and_objdump_read_the_image_of_every_module_without_a_complaint(target, tmp_path):
    require(shutil.which("readelf"), "there is no readelf")
    root, path = target
    file = tmp_path / "image"
    for name in names(root, f"{path}/modules"):
        file.write_bytes(read_all(at(root, f"{path}/modules/{name}/image")))
        for command in (("readelf", "-h", "-l", "-d", "-W"), ("readelf", "-D", "-s", "-W"), ("objdump", "-x")):
            done = run(*command, str(file))
            assert (done.returncode, done.stderr) == (0, ""), f"{name}: {command}"


def rows(shown):
    """The lines of tables."""
    found = [line for line in shown.splitlines() if re.search(r"0x|\bFUNC\b|\bOBJECT\b", line)]
    return {line.strip() for line in found if "at offset" not in line}


def test_the_image_has_the_segments_and_the_dynamic_symbols_of_its_file(target, tmp_path):
    require(shutil.which("readelf"), "there is no readelf")
    root, path = target
    name = next(name for name in names(root, f"{path}/modules") if name.startswith("libc.so"))
    original = json.loads(text(root, f"{path}/modules/{name}/info.json"))["path"]
    file = tmp_path / "image"
    file.write_bytes(read_all(at(root, f"{path}/modules/{name}/image")))
    for options in (("-l", "-W"), ("-D", "-s", "-W"), ("-d", "-W")):
        ours, theirs = rows(run("readelf", *options, str(file)).stdout), rows(run("readelf", *options, original).stdout)
        assert len(theirs) > 5
        assert theirs - ours == set()


def test_code_in_the_image_is_the_code_of_the_file(target):
    root, path = target
    name = next(name for name in names(root, f"{path}/modules") if name.startswith("libc.so"))
    original = Path(json.loads(text(root, f"{path}/modules/{name}/info.json"))["path"]).read_bytes()
    image = read_all(at(root, f"{path}/modules/{name}/image"))
    code = range(0x28000, 0x28000 + (1 << 20))
    assert image[code.start : code.stop] == original[code.start : code.stop]


def test_exports_are_those_that_readelf_prints_of_the_file(target):
    require(shutil.which("readelf"), "there is no readelf")
    root, path = target
    name = next(name for name in names(root, f"{path}/modules") if name.startswith("libc.so"))
    record = json.loads(text(root, f"{path}/modules/{name}/info.json"))
    base = int(record["base"], 16)
    ours = {}
    for line in text(root, f"{path}/modules/{name}/exports").splitlines():
        address, _, _, symbol = line.split()
        ours[symbol] = int(address, 16) - base
    shown = run("readelf", "--dyn-syms", "-W", record["path"]).stdout
    for symbol in ("malloc", "qsort", "environ"):
        assert re.search(rf"0*{ours[symbol]:x} .* {symbol}@@", shown), symbol
