"""Modules of this host, against /proc/PID/maps and what readelf says of the files on disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from elf_samples import compiled
from readelf import Readelf, by_place
from support import as_nobody

from engine.elf_modules import executable_first
from engine.errors import AccessDeniedError, ProcessExitedError
from engine.formats.elf import VDSO, LoadedImage, loaded_images
from engine.oslayer import ProcFiles
from engine.oslayers.native import NativeLayer, NativeProcess, modules
from engine.oslayers.native.modules import KernelModule, NativeModule, kernel_modules, process_modules
from engine.types import ModuleInfo, ProcessInfo, Region, Rights, SectionInfo

PROGRAM = """
import ctypes, mmap, sys
import ssl, sqlite3, numpy
libc = ctypes.CDLL(None)
libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
library, data = sys.argv[1:]
kept = [ctypes.CDLL(library)]
libc.dlmopen.restype = ctypes.c_void_p
kept.append(libc.dlmopen(ctypes.c_long(-1), library.encode(), 2))
file = open(library, "rb")
kept.append(mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ))
file = open(data, "rb")
kept.append(mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC))
print("ready", flush=True)
sys.stdin.read()
"""
LIBRARY = """
int number = 5;
char space[30000];
int answer(void) { return 42 + number; }
"""


@contextlib.contextmanager
def running(*command: str) -> Iterator[int]:
    """The PID of a program that has said a line and then waits for the end of its input."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process.pid
    finally:
        process.kill()
        process.communicate(timeout=10)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    """A library of our own in a directory of our own."""
    made = compiled("libours.so", "-shared", "-Wl,--build-id=sha1", "-Wl,-soname,libours.so.1", source=LIBRARY)
    return shutil.copy(made, tmp_path_factory.mktemp("modules") / "libours.so")


@pytest.fixture(scope="module")
def pid(library, tmp_path_factory) -> Iterator[int]:
    """A Python with numpy, our library loaded twice and mapped flat, and a data file mapped executable."""
    data = tmp_path_factory.mktemp("data") / "data"
    data.write_bytes(b"no image" * 4096)
    with running(sys.executable, "-c", PROGRAM, str(library), str(data)) as number:
        yield number


@pytest.fixture
def process(pid, layer) -> NativeProcess:
    return layer.process(pid)


@pytest.fixture
def listed(process) -> list[NativeModule]:
    return list(process.modules())


def of_file(found: list[NativeModule]) -> list[NativeModule]:
    return [module for module in found if module.info.path != VDSO]


def named(found: list[NativeModule], start: str) -> NativeModule:
    return next(module for module in found if module.info.name.startswith(start))


# -- the list --------------------------------------------------------------------------------------------


def test_every_mapped_elf_file_is_a_module_and_no_other_file(pid, listed):
    expected = set()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) > 5 else ""
        if path.startswith("/") and Path(path).read_bytes()[:4] == b"\x7fELF":
            expected.add(path)
    assert {module.info.path for module in of_file(listed)} == expected
    assert len(expected) > 20


def test_the_executable_comes_first_and_the_others_ascend(pid, listed):
    assert listed[0].info.path == os.readlink(f"/proc/{pid}/exe")
    bases = [module.info.base for module in listed[1:]]
    assert bases == sorted(bases)


def test_a_library_loaded_twice_is_two_modules_and_a_flat_mapping_of_it_none(listed, library):
    ours = [module for module in listed if module.info.path == str(library)]
    assert [module.info.name for module in ours] == ["libours.so", "libours.so"]
    assert ours[0].info.base != ours[1].info.base


def test_a_module_reaches_from_its_first_region_to_its_last(process, listed):
    regions = list(process.regions())
    for module in of_file(listed):
        info = module.info
        own = [region for region in regions if info.base <= region.start < info.base + info.size]
        assert own[0].start == info.base
        assert info.base + info.size == max(region.stop for region in own if region.path == info.path) or (
            own[-1].path in ("", "[heap]")
        )


def test_sizes_are_those_that_the_program_headers_ask_for(listed):
    for module in of_file(listed):
        assert module.info.size == Readelf(module.info.path).load_size


def test_build_ids_are_those_of_readelf(listed):
    for module in of_file(listed):
        assert module.info.build_id == Readelf(module.info.path).build_id()


def test_the_vdso_is_a_module(listed, tmp_path):
    vdso = named(listed, VDSO)
    dump = tmp_path / "vdso"
    dump.write_bytes(vdso.memory.read(0, vdso.info.size))
    oracle = Readelf(str(dump))
    assert sorted(vdso.exports(), key=by_place) == oracle.exports() != []
    assert vdso.info.build_id == oracle.build_id()
    assert [(s.name, s.base - vdso.info.base, s.size) for s in vdso.sections()] == oracle.sections()


def test_a_modules_memory_is_the_process_memory_from_its_base_on(process, listed):
    module = named(listed, "libours")
    assert module.memory.size == module.info.size
    assert module.memory.read(0, 4) == b"\x7fELF"
    assert module.memory.read(64, 64) == process.memory.read(module.info.base + 64, 64)


def test_a_program_of_32_bits_has_its_modules(layer):
    source = """void _start(void) {
        __asm__ volatile("int $0x80" :: "a"(4), "b"(1), "c"("ready\\n"), "d"(6));
        for (;;) __asm__ volatile("int $0x80" :: "a"(29));
    }"""
    path = compiled("narrow", "-m32", "-static", "-no-pie", "-fno-pic", "-Wl,--build-id=sha1", source=source)
    with running(path) as pid:
        found = list(layer.process(pid).modules())
        assert [module.info.name for module in found] == ["narrow", VDSO]
        assert (found[0].info.architecture, found[0].info.build_id) == ("i386", Readelf(path).build_id())


class Vector(ProcFiles):
    """A process of which only the auxiliary vector is known."""

    def __init__(self, *words: int, bits: int = 64) -> None:
        self.data = struct.pack(f"={len(words)}{'Q' if bits == 64 else 'I'}", *words)

    def read(self, name: str) -> bytes:
        assert name == "auxv"
        return self.data

    names = link = descriptors = thread = None

    def capability(self, kind):
        return self

    @property
    def info(self) -> ProcessInfo:
        return ProcessInfo(1, "p", executable="/bin/program")


IMAGES = [
    LoadedImage(base, 0x10000, Region(base, 0x1000, Rights.READ, False, 0, (8, 1), base, path))
    for base, path in ((0x10000, "/lib/low"), (0x40000, "/bin/program (deleted)"), (0x80000, "/lib/high"))
]


@pytest.mark.parametrize("bits", [32, 64])
def test_the_executable_is_the_image_that_holds_the_program_headers_named_by_the_kernel(bits):
    vector = Vector(6, 4096, 3, 0x80040, 9, 0x81000, 0, 0, bits=bits)
    assert executable_first(vector, IMAGES)[0] is IMAGES[2]


def test_without_program_headers_the_executable_is_known_by_its_path():
    assert executable_first(Vector(3, 0x1000, 0, 0), IMAGES)[0] is IMAGES[1]
    assert executable_first(Vector(), IMAGES)[0] is IMAGES[1]


# -- what they hold --------------------------------------------------------------------------------------


def test_exports_in_memory_are_those_of_the_files(listed):
    for module in of_file(listed):
        assert sorted(module.exports(), key=by_place) == Readelf(module.info.path).exports(), module.info.path


def test_imports_in_memory_are_those_of_the_files(listed):
    for module in of_file(listed):
        assert list(module.imports()) == Readelf(module.info.path).imports(), module.info.path


def test_sections_are_those_of_the_files(listed):
    for module in of_file(listed):
        oracle = Readelf(module.info.path)
        found = [(s.name, s.base - module.info.base + oracle.link_base, s.size) for s in module.sections()]
        assert found == oracle.sections(), module.info.path


def test_exports_need_no_file(listed, monkeypatch):
    monkeypatch.setattr(modules, "_open_mapped_file", lambda process, region: pytest.fail("a file was opened"))
    for module in listed:
        assert list(module.exports()) is not None


@pytest.fixture
def other_pid(library, tmp_path) -> Iterator[tuple[int, Path]]:
    """A Python that has loaded a copy of our library, and the copy."""
    copy = Path(shutil.copy(library, tmp_path / "gone.so"))
    program = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); print(1, flush=True); sys.stdin.read()"
    with running(sys.executable, "-c", program, str(copy)) as number:
        yield number, copy


def test_a_deleted_library_keeps_its_name_its_symbols_and_its_sections(other_pid, layer, library):
    pid, copy = other_pid
    copy.unlink()
    module = named(list(layer.process(pid).modules()), "gone.so")
    assert (module.info.name, module.info.path) == ("gone.so", f"{copy} (deleted)")
    assert sorted(module.exports(), key=by_place) == Readelf(library).exports()
    names = [section.name for section in module.sections()]
    with_file = [name for name, _, _ in Readelf(library).sections()]
    assert names == with_file or names[0] == "LOAD#0.r--"


def without_map_files(monkeypatch) -> None:
    """As for a user who may not follow the links in map_files (any but root)."""
    original = os.open

    def refused(path, *arguments, **options):
        if "/map_files/" in str(path):
            raise PermissionError(1, "Operation not permitted", path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refused)


def test_sections_are_read_through_the_path_where_map_files_may_not_be(other_pid, layer, library, monkeypatch):
    pid, _ = other_pid
    without_map_files(monkeypatch)
    module = named(list(layer.process(pid).modules()), "gone.so")
    assert [section.name for section in module.sections()] == [name for name, _, _ in Readelf(library).sections()]


def test_another_file_at_the_path_is_not_taken_for_the_mapped_one(other_pid, layer, monkeypatch):
    pid, copy = other_pid
    without_map_files(monkeypatch)
    module = named(list(layer.process(pid).modules()), "gone.so")
    replacement = copy.with_name("new")
    replacement.write_bytes(Path(compiled("other.so", "-shared", source="int other;")).read_bytes())
    replacement.rename(copy)
    assert [section.name for section in module.sections()][:2] == ["LOAD#0.r--", "LOAD#1.r-x"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir])
def test_what_is_no_regular_file_is_never_opened(other_pid, layer, monkeypatch, make):
    pid, copy = other_pid
    without_map_files(monkeypatch)
    module = named(list(layer.process(pid).modules()), "gone.so")
    copy.unlink()
    make(copy)
    module.image = type(module.image)(
        module.image.base, module.image.size,
        Region(module.image.base, 4096, Rights.READ, False, 0, module.image.region.device,
               os.lstat(copy).st_ino, str(copy)),
        module.image.head,
    )  # fmt: skip
    assert next(module.sections()).name == "LOAD#0.r--"


def test_a_file_on_an_unknown_filesystem_is_not_looked_at(process, listed, monkeypatch):
    region = named(listed, "libours").image.region
    foreign = Region(region.start, region.size, region.rights, False, 0, (0, 0xFFFFF), region.inode, region.path)
    original, opened = os.open, []
    monkeypatch.setattr(os, "open", lambda *arguments: (opened.append(arguments[0]), original(*arguments))[1])
    assert modules._open_mapped_file(process, foreign) is None
    assert all(str(path).startswith(f"/proc/{process.pid}/") and "map_files" not in str(path) for path in opened)


def test_a_file_that_differs_from_memory_gives_no_sections(listed):
    module = named(listed, "libours")
    image = module.image
    module.image = type(image)(image.base, image.size, image.region, b"\x7fELF" + bytes(60), None, None, None)
    assert next(module.sections()).name == "LOAD#0.r--"


def test_where_memory_may_not_be_read_mapped_code_is_listed_and_the_file_read(process, listed):
    class Denied:
        size, may_block = 1 << 64, False

        def gather(self, addresses, out):
            raise AccessDeniedError("the memory of the process cannot be read")

        def window(self, start, size):
            return process.memory.window(start, size)

    class Hidden(NativeProcess):
        memory = Denied()

    hidden = Hidden(process.directory, None)
    found = list(process_modules(hidden))
    assert found[0].info.path == listed[0].info.path
    assert found[0].info.architecture is None
    assert {module.info.path for module in of_file(listed)} <= {module.info.path for module in found}


def test_a_plain_user_sees_modules_exports_and_sections_of_his_processes(listed):
    text = as_nobody("""
        from engine.oslayer import Base
        from engine.oslayers.native import NativeLayer
        (wait, end), (said, say) = os.pipe(), os.pipe()
        moved = [(os.POSIX_SPAWN_DUP2, wait, 0), (os.POSIX_SPAWN_DUP2, say, 1)]
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", "echo; read line"], {}, file_actions=moved)
        os.read(said, 1)
        for module in NativeLayer.open(Base(), {}).process(pid).modules():
            sections, exports = list(module.sections()), list(module.exports())
            print(module.info.name, module.info.build_id, len(exports), *(section.name for section in sections))
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    """)
    libc = named(listed, "libc.so")
    oracle = Readelf(libc.info.path)
    line = next(line.split() for line in text.splitlines() if line.startswith("libc.so"))
    assert line[1:3] == [oracle.build_id(), str(len(oracle.exports()))]
    assert line[3:] == [name for name, _, _ in oracle.sections()]


def test_modules_of_a_process_that_has_ended_are_an_error(layer):
    with running("sh", "-c", "echo; read line") as pid:
        process = layer.process(pid)
    with pytest.raises(ProcessExitedError):
        list(process.modules())


def test_a_process_without_memory_has_no_modules(layer):
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    try:
        assert list(layer.process(child.pid).modules()) == []
        # Of a kernel thread only root may ask; in a PID namespace there is none.
        for process in layer.processes() if os.geteuid() == 0 else ():
            if process.info.kernel_thread:
                assert list(process.modules()) == []
                break
    finally:
        child.wait()


def test_every_process_of_this_host_lists_modules_that_are_images(layer):
    for process in layer.processes():
        with contextlib.suppress(AccessDeniedError, ProcessExitedError):
            for module in process.modules():
                assert module.info.base % 4096 == 0
                assert module.info.size > 0


# -- the kernel's ----------------------------------------------------------------------------------------

LISTING = """\
nfsd 638976 13 - Live 0xffffffffc0a12000
auth_rpcgss 135168 1 nfsd, Live 0x0000000000000000 (OE)
broken line
../../etc 1 0 - Live 0xffffffffc0000000
"""


@pytest.fixture
def kernel_tree(tmp_path) -> tuple[Path, Path]:
    """A /proc/modules and a /sys/module with sections and notes of one module."""
    listing, sysfs = tmp_path / "modules", tmp_path / "module"
    listing.write_text(LISTING)
    (sysfs / "nfsd/sections").mkdir(parents=True)
    (sysfs / "nfsd/notes").mkdir()
    base = 0xFFFFFFFFC0A12000
    for name, address in ((".text", base), (".rodata", base + 0x1000), (".data", base + 0x1800)):
        (sysfs / "nfsd/sections" / name).write_text(f"{address:#018x}\n")
    note = struct.pack("=III", 4, 20, 3) + b"GNU\0" + bytes(range(20))
    (sysfs / "nfsd/notes/.note.gnu.build-id").write_bytes(note)
    return listing, sysfs


def test_kernel_modules_are_listed_in_the_order_of_proc_modules(kernel_tree):
    machine = os.uname().machine
    assert [module.info for module in kernel_modules(*kernel_tree)] == [
        ModuleInfo("nfsd", None, 0xFFFFFFFFC0A12000, 638976, machine, bytes(range(20)).hex()),
        ModuleInfo("auth_rpcgss", None, None, 135168, machine, None),
    ]


def test_sections_of_a_kernel_module_reach_up_to_the_next_one(kernel_tree):
    module = next(kernel_modules(*kernel_tree))
    assert list(module.sections()) == [
        SectionInfo(".text", 0xFFFFFFFFC0A12000, 0x1000),
        SectionInfo(".rodata", 0xFFFFFFFFC0A13000, 0x800),
        SectionInfo(".data", 0xFFFFFFFFC0A13800, 0x800),
    ]


def test_hidden_addresses_of_sections_give_none(kernel_tree):
    for path in (kernel_tree[1] / "nfsd/sections").iterdir():
        path.write_text("0x0000000000000000\n")
    assert list(next(kernel_modules(*kernel_tree)).sections()) == []


def test_a_kernel_module_without_sysfs_has_no_sections(kernel_tree):
    assert list(list(kernel_modules(*kernel_tree))[1].sections()) == []


def test_the_memory_of_a_kernel_module_is_not_known(kernel_tree):
    assert next(kernel_modules(*kernel_tree)).memory is None


def test_a_kernel_without_modules_lists_none(tmp_path):
    assert list(kernel_modules(tmp_path / "missing")) == []


def test_the_modules_of_this_kernel_are_those_of_proc_modules(layer):
    listing = Path("/proc/modules")
    expected = [line.split()[0] for line in listing.read_text().splitlines()] if listing.exists() else []
    found = list(layer.modules())
    assert [module.info.name for module in found] == expected
    for module in found:
        assert isinstance(module, KernelModule)
        with contextlib.suppress(AccessDeniedError):
            assert all(section.size > 0 for section in module.sections())


def test_listing_reads_memory_in_one_column(process, monkeypatch):
    regions = list(process.regions())
    calls = []
    original = type(process.memory).gather
    monkeypatch.setattr(
        type(process.memory), "gather", lambda self, *a: (calls.append(len(a[0])), original(self, *a))[1]
    )
    monkeypatch.setattr(type(process.memory), "read", lambda *a: pytest.fail("memory was read singly"))
    assert loaded_images(process.memory, regions)
    assert len(calls) == 1


def test_the_layer_gives_native_modules(layer: NativeLayer, pid):
    assert all(isinstance(module, NativeModule) for module in layer.process(pid).modules())
