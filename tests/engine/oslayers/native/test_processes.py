"""Processes of this host: what is told of them, against /proc, psutil and ps."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tracemalloc
from pathlib import Path

import psutil
import pytest
from support import as_nobody, calls_of, require

from engine.errors import AccessDeniedError, NotFoundError, NotRecognisedError, ProcessExitedError
from engine.oslayer import Base, HostOwned, Process, ProcFiles
from engine.oslayers.native import NativeLayer, NativeProcess
from engine.oslayers.native import layer as native_layer
from engine.oslayers.native.procfs import (
    ProcDirectory,
    parse_command_line,
    parse_ids,
    parse_program_bits,
    parse_stat,
)

CALLS = 400
"""Of functions for one record: counted 207 to 280, by how many arguments there are."""


@pytest.fixture
def zombie():
    """The PID of a process that has ended and was not waited for."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    yield child.pid
    child.wait()


@pytest.fixture
def ended(start, layer):
    """A process that was met and has ended."""
    target = start()
    process = layer.process(target.pid)
    target.end()
    return process


@pytest.fixture
def sleeper():
    """A plain process with a strange command line."""
    code = "import sys; print(flush=True); sys.stdin.read()"
    arguments = [sys.executable, "-c", code, "two words", "", "\udcff\n"]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()  # Popen returns before exec(2) is through: the command line may still be empty
    yield process.pid, tuple(arguments)
    process.communicate()


# -- the layer ----------------------------------------------------------------------------------------------


def test_the_layer_tells_what_uname_and_psutil_tell(layer):
    info = layer.info
    assert (info.kind, info.version, info.architecture) == ("native", platform.release(), platform.machine())
    assert (info.page_size, info.hostname) == (os.sysconf("SC_PAGE_SIZE"), platform.node())
    assert info.live
    assert not info.writable
    assert abs(info.boot_time - psutil.boot_time()) <= 1
    assert layer.physical_memory is None
    assert layer.kernel_memory is None


def test_the_layer_needs_no_memory_and_is_writable_where_its_base_is():
    assert not NativeLayer.needs_memory
    assert NativeLayer.open(Base(writable=True), {}).info.writable


def test_another_system_than_linux_is_not_recognised(monkeypatch):
    monkeypatch.setattr(native_layer.sys, "platform", "darwin")
    with pytest.raises(NotRecognisedError, match="needs Linux"):
        NativeLayer.open(Base(), {})


def test_the_pids_are_those_of_proc(layer, target):
    pids = layer.pids()
    assert pids == sorted(pids)
    assert {os.getpid(), target.pid, 1} <= set(pids)


@pytest.mark.parametrize("pid", [0, -1, 1 << 30, 1 << 40, 10**30])
def test_a_pid_that_no_process_has_is_not_found(layer, pid):
    with pytest.raises(ProcessExitedError):
        layer.process(pid)


def test_a_listing_gives_every_process_a_record(layer, target, zombie):
    infos = {process.pid: process.info for process in list(layer.processes()) if psutil.pid_exists(process.pid)}
    assert {os.getpid(), target.pid, zombie} <= set(infos)


def test_a_record_takes_few_calls(layer):
    """What a listing costs is those, and what the kernel takes to answer."""
    counted = []
    for process in layer.processes():
        try:
            counted.append(calls_of(lambda process=process: process.info))
        except ProcessExitedError:
            continue
    assert statistics.median(counted) < CALLS


# -- records ------------------------------------------------------------------------------------------------


def test_a_record_is_what_psutil_says(layer, target):
    info, known = layer.process(target.pid).info, psutil.Process(target.pid)
    assert (info.pid, info.ppid, info.name) == (target.pid, os.getpid(), "target")
    assert (info.uid, info.gid) == (known.uids().real, known.gids().real)
    assert info.threads == known.num_threads() == 2
    assert info.state == "S"
    assert list(info.command_line) == known.cmdline()
    assert info.executable == known.exe()
    assert info.architecture == platform.machine()
    assert info.kernel_thread is False
    assert abs(info.start_time - known.create_time()) < 1.5
    assert info.extra["executable_deleted"] is False


def test_the_start_time_is_the_same_at_every_look(layer, target):
    assert len({layer.process(target.pid).info.start_time for _ in range(50)}) == 1


def test_a_command_line_keeps_empty_arguments_and_bytes_that_are_no_text(layer, sleeper):
    pid, arguments = sleeper
    assert layer.process(pid).info.command_line == arguments


@pytest.mark.parametrize(
    "name", ["a) R 1 (b", "two words", "new\nline", "((((((((((", "))))))))))", "\udcff\udcfe", " ", ""]
)
def test_a_name_may_hold_anything(layer, start, name):
    target = start(name)
    process = layer.process(target.pid)
    assert process.info.name == name
    assert process.info.ppid == os.getpid()
    assert process.start_ticks > 0


def test_a_deleted_program_is_named_without_the_word_and_told_apart(layer, program, tmp_path):
    copy = shutil.copy(program, tmp_path / "a copy\n")
    process = subprocess.Popen([copy], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        info = layer.process(process.pid).info
        assert (info.executable, info.extra["executable_deleted"]) == (str(copy), False)
        os.unlink(copy)
        info = layer.process(process.pid).info
        assert (info.executable, info.extra["executable_deleted"]) == (str(copy), True)
    finally:
        process.kill()
        process.communicate()


def test_a_zombie_has_a_record_with_what_is_still_known(layer, zombie):
    info = layer.process(zombie).info
    assert (info.state, info.ppid, info.kernel_thread) == ("Z", os.getpid(), False)
    assert (info.command_line, info.executable, info.architecture) == (None, None, None)
    assert info.uid == os.getuid()
    assert list(layer.process(zombie).regions()) == []


def test_kernel_threads_are_told_apart(layer):
    infos = [process.info for process in layer.processes()]
    threads = [info for info in infos if info.kernel_thread]
    require(threads, "no kernel thread is to be seen in this PID namespace")
    assert {info.pid for info in threads} == {
        info.pid for info in infos if info.pid == 2 or info.ppid == 2
    }
    for info in threads:
        assert (info.command_line, info.executable, info.architecture) == ((), None, None)


SMALL = """
static int call(int number, int first, const void *second, int third)
{
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "0"(number), "b"(first), "c"(second), "d"(third) : "memory");
    return result;
}

void _start(void)
{
    call(4, 1, "!", 1); /* write */
    for (;;)
        call(29, 0, 0, 0); /* pause */
}
"""


def test_a_32_bit_program_is_known_as_one(layer, tmp_path):
    """Built without a C library: only the assembler and the linker need to know 32 bits."""
    require(platform.machine() == "x86_64" and shutil.which("gcc"), "there is no gcc for i386 here")
    source = tmp_path / "small.c"
    source.write_text(SMALL)
    command = ["gcc", "-m32", "-nostdlib", "-static", "-ffreestanding", "-o", tmp_path / "small", source]
    built = subprocess.run(command, capture_output=True, timeout=60, check=False)
    require(built.returncode == 0, "gcc cannot link for i386 here")
    try:
        process = subprocess.Popen([tmp_path / "small"], stdout=subprocess.PIPE)
    except OSError:
        require(False, "this kernel does not run 32-bit programs")
    try:
        assert process.stdout.read(1) == b"!"
        known = layer.process(process.pid)
        assert known.info.architecture == "i386"
        code = next(region for region in known.regions() if "x" in region.permissions)
        elf = (tmp_path / "small").read_bytes()
        assert known.memory.read(code.start, 64) == elf[code.offset : code.offset + 64]
    finally:
        process.kill()
        process.communicate()


def test_an_ended_process_is_an_error_everywhere(ended):
    files = ended.capability(ProcFiles)
    for act in (
        lambda: ended.info,
        lambda: list(ended.regions()),
        lambda: list(ended.threads()),
        lambda: ended.owner(),
        lambda: ended.memory.read(0x400000, 1),
        lambda: files.read("maps"),
        lambda: files.names(),
        lambda: files.link("exe"),
        lambda: files.descriptors(),
        lambda: files.thread(ended.pid),
    ):
        with pytest.raises(ProcessExitedError):
            act()


def test_a_process_with_another_start_time_is_another_process(layer, target):
    """What stands where a PID was given away again, without waiting for it."""
    met = layer.process(target.pid)
    other = NativeProcess(ProcDirectory(met.directory.path, target.pid, met.start_ticks - 1), None)
    files = other.capability(ProcFiles)
    for act in (
        lambda: other.info,
        lambda: list(other.regions()),
        lambda: list(other.threads()),
        lambda: other.owner(),
        lambda: other.memory.u64(target.counter),
        lambda: files.read("comm"),
        lambda: files.link("exe"),
        lambda: files.descriptors(),
        lambda: files.names(),
    ):
        with pytest.raises(ProcessExitedError):
            act()
    assert other.identity != met.identity


def test_identity_is_the_same_for_one_process_and_reads_nothing(layer, ended, target):
    assert layer.process(target.pid).identity == layer.process(target.pid).identity
    assert ended.identity[0] == ended.pid


# -- regions and threads ----------------------------------------------------------------------------------


def test_regions_printed_like_maps_are_maps(layer, target):
    lines = Path(f"/proc/{target.pid}/maps").read_text().splitlines()
    printed = []
    for region in layer.process(target.pid).regions():
        head = (
            f"{region.start:08x}-{region.stop:08x} {region.permissions} {region.offset:08x} "
            f"{region.device_text} {region.inode} "
        )
        printed.append(head.ljust(73) + region.path if region.path else head)
    assert printed == lines
    assert any(region.path == "/memfd:a name with spaces (deleted)" for region in layer.process(target.pid).regions())
    assert any(region.shared for region in layer.process(target.pid).regions())


def test_a_path_with_a_newline_is_that_path_in_regions(layer, tmp_path):
    path = tmp_path / "a\nb c\\d (deleted)"
    path.write_bytes(bytes(4096))
    code = "import mmap, os, sys; m = mmap.mmap(os.open(sys.argv[1], 2), 0); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        assert str(path) in [region.path for region in layer.process(process.pid).regions()]
    finally:
        process.communicate()


def test_threads_are_listed_with_their_own_names(layer, target):
    threads = list(layer.process(target.pid).threads())
    assert [thread.tid for thread in threads] == sorted(thread.tid for thread in threads)
    assert [thread.name for thread in threads] == ["target", "a (thread) name"]
    assert threads[0].tid == target.pid
    assert all(thread.state == "S" and thread.start_ticks for thread in threads)


# -- files ------------------------------------------------------------------------------------------------


def test_files_are_procs_own_byte_for_byte(layer, target):
    files = layer.process(target.pid).capability(ProcFiles)
    names = files.names()
    assert {"maps", "cmdline", "environ", "comm", "stat", "status", "auxv", "limits", "mountinfo"} <= set(names)
    same = set(names) - {"sched", "schedstat", "timers", "latency", "stack", "io"}
    for name in same:
        try:
            expected = Path(f"/proc/{target.pid}/{name}").read_bytes()
        except PermissionError:  # timerslack_ns of another process than one's own, to a plain user
            with pytest.raises(AccessDeniedError, match=name):
                files.read(name)
        else:
            assert files.read(name) == expected, name


def test_files_that_wait_or_do_something_are_not_offered(layer, target):
    files = layer.process(target.pid).capability(ProcFiles)
    for name in ("mem", "pagemap", "clear_refs", "kpagecgroup", "fd", "task", "../1/maps", "attr/current", "", "."):
        assert name not in files.names()
        with pytest.raises(NotFoundError):
            files.read(name)


HOSTILE = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.sbrk.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
size = 64 << 20
base = libc.mmap(None, size + 4096, 1, 0x4022, -1, 0)
fields = open("/proc/self/stat", "rb").read().rpartition(b")")[2].split()
code, code_stop, stack, data, data_stop, heap = (int(fields[at - 3]) for at in (26, 27, 28, 45, 46, 47))
layout = (code, code_stop, data, data_stop, heap, libc.sbrk(0), stack, *(base, base + size) * 2)
text = struct.pack("=11QQII", *layout, 0, 0, 0xFFFFFFFF)
print(libc.prctl(35, 14, ctypes.c_char_p(text), ctypes.c_ulong(len(text)), 0), flush=True)
sys.stdin.read()
"""
"""It says that its arguments and its environment are 64 MiB that nobody has touched (PR_SET_MM_MAP)."""


@pytest.fixture
def hostile(layer):
    """A process that runs HOSTILE."""
    with subprocess.Popen(
        [sys.executable, "-c", HOSTILE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            require(process.stdout.readline() == "0\n", "this kernel has no PR_SET_MM_MAP")
            yield layer.process(process.pid)
        finally:
            process.kill()


def test_of_arguments_without_end_a_record_holds_a_little(hostile):
    tracemalloc.start()
    try:
        assert hostile.info.command_line == ("",)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["cmdline", "environ"])
def test_of_arguments_and_environment_without_end_the_first_8_mib_are_read(hostile, name):
    assert len(hostile.capability(ProcFiles).read(name)) == 8 << 20


def test_the_longest_arguments_that_exec_takes_are_read_whole(layer):
    longest = ["x" * 100_000] * 15
    code = "import sys; print(flush=True); sys.stdin.read()"
    arguments = [sys.executable, "-c", code, *longest]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        found = layer.process(process.pid)
        assert found.capability(ProcFiles).read("cmdline") == b"".join(os.fsencode(text) + b"\0" for text in arguments)
        assert found.info.command_line[:5] == tuple(arguments[:5])
        process.communicate(timeout=10)


def test_links_are_read_and_never_followed(layer, target):
    files = layer.process(target.pid).capability(ProcFiles)
    for name in ("exe", "cwd", "root", "fd/0", "fd/1"):
        assert files.link(name) == os.readlink(f"/proc/{target.pid}/{name}")
    for name in ("fd/99999", "ns/mnt", "fd/../exe", "fd/", "exe/", "fd/0x1", "fd/1\n"):
        with pytest.raises(NotFoundError):
            files.link(name)


def test_descriptors_are_those_of_fd(layer, target):
    expected = sorted(int(name) for name in os.listdir(f"/proc/{target.pid}/fd"))
    assert layer.process(target.pid).capability(ProcFiles).descriptors() == expected


def test_a_thread_has_files_of_its_own(layer, target):
    process = layer.process(target.pid)
    tid = [thread.tid for thread in process.threads()][1]
    files = process.capability(ProcFiles).thread(tid)
    assert files.read("comm") == b"a (thread) name\n"
    assert files.read("status") == Path(f"/proc/{target.pid}/task/{tid}/status").read_bytes()
    assert "maps" in files.names()
    with pytest.raises(NotFoundError) as caught:
        process.capability(ProcFiles).thread(1)
    assert not isinstance(caught.value, ProcessExitedError)


def test_what_does_not_exist_in_a_living_process_is_not_found(layer):
    require(layer.pids()[1:2] == [2], "there is no kernel thread 2 in this PID namespace")
    files = layer.process(2).capability(ProcFiles)
    with pytest.raises(NotFoundError) as caught:
        files.link("exe")
    assert not isinstance(caught.value, ProcessExitedError)
    assert files.read("maps") == b""


def test_the_owner_is_what_proc_shows(layer, target):
    process = layer.process(target.pid)
    status = os.stat(f"/proc/{target.pid}")
    assert process.capability(HostOwned).owner() == (status.st_uid, status.st_gid)


def test_a_process_does_not_offer_what_it_has_not(layer, target):
    class Nothing:
        pass

    assert layer.process(target.pid).capability(Nothing) is None
    assert isinstance(layer.process(target.pid).capability(Process), NativeProcess)


# -- without rights -------------------------------------------------------------------------------------------


def test_another_users_process_is_listed_with_what_everybody_may_know(target):
    require(os.geteuid() == 0, "only root can become somebody else")
    said = as_nobody(
        """
        from engine.errors import AccessDeniedError
        from engine.oslayer import Base, ProcFiles
        from engine.oslayers.native import NativeLayer
        layer = NativeLayer.open(Base(), {})
        pid = int(sys.argv[1])
        process = next(process for process in layer.processes() if process.pid == pid)
        info = process.info
        print(info.name, info.state, info.uid, info.executable, info.architecture, bool(info.command_line))
        files = process.capability(ProcFiles)
        for act in (lambda: process.memory.read(1 << 20, 8), lambda: list(process.regions()),
                    lambda: list(process.memory.extents()), lambda: files.read("environ"), lambda: files.link("exe"),
                    lambda: files.descriptors(), lambda: process.memory.readinto(0, memoryview(bytearray(8)))):
            try:
                act()
                print("allowed")
            except AccessDeniedError as error:
                assert str(pid) in str(error), error
                assert "run as root" in str(error), error
                print("refused")
        """,
        str(target.pid),
    )
    assert said == "target S 0 None None True\n" + "refused\n" * 7


def test_a_hidden_process_is_left_out_and_counted(layer, monkeypatch):
    original = ProcDirectory.of_process

    def hidden(pid: int) -> ProcDirectory:
        if pid == 1:
            raise AccessDeniedError("hidden")
        return original(pid)

    monkeypatch.setattr(ProcDirectory, "of_process", hidden)
    assert 1 not in [process.pid for process in layer.processes()]
    assert layer.info.skipped == {"processes": 1}


# -- parsers ---------------------------------------------------------------------------------------------


def test_a_stat_line_with_the_worst_name_is_taken_to_pieces():
    line = b"42 (x) S 1 (y)) R 7 42 42 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 3 0 998877 1000 5 18446744073709551615 1\n"
    stat = parse_stat(line)
    assert (stat.name, stat.state, stat.ppid) == (b"x) S 1 (y)", "R", 7)
    assert (stat.flags, stat.threads, stat.start_ticks) == (4194304, 3, 998877)


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        (b"", ()),
        (b"a\0b\0", ("a", "b")),
        (b"a\0\0", ("a", "")),
        (b"a\0\0b\0", ("a", "", "b")),
        (b"server: idle", ("server: idle",)),
        (b"server: idle" + bytes(100), ("server: idle",)),
        (b"\0", ("",)),
        (b"\0\0\0\0", ("",)),
    ],
)
def test_command_lines_are_taken_to_pieces(data, arguments):
    assert parse_command_line(data) == arguments


def test_ids_are_the_real_ones_and_unknown_where_there_are_none():
    assert parse_ids(b"Name:\tUid:\t9\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n") == (1, 5)
    assert parse_ids(b"") == (None, None)


def vector(word: type, *pairs: int) -> bytes:
    return bytes((word * len(pairs))(*pairs))


@pytest.mark.parametrize(
    ("data", "bits"),
    [
        (vector(ctypes.c_uint64, 3, 0x40, 4, 56, 5, 9, 0, 0), 64),
        (vector(ctypes.c_uint32, 3, 0x34, 4, 32, 5, 9, 0, 0), 32),
        (vector(ctypes.c_uint32, 32, 4, 33, 0x34, 4, 32, 0, 0), 32),
        (vector(ctypes.c_uint64, 3, 0x40, 0, 0, 4, 56), None),
        (vector(ctypes.c_uint64, 4, 57, 0, 0), None),
        (b"", None),
        (b"\4\0\0\0\0\0\0\0\x38", None),
        (os.urandom(7), None),
    ],
)
def test_the_auxiliary_vector_tells_the_size_of_a_program(data, bits):
    assert parse_program_bits(data) == bits


def test_the_cgroup_is_told_as_proc_tells_it():
    layer = NativeLayer.open(Base(), {})
    told = Path("/proc/self/cgroup").read_text()
    extra = layer.process(os.getpid()).info.extra
    assert extra["cgroup"] in {line.split(":", 2)[2] for line in told.splitlines()} | {None}
    pids = [pid for found in layer.containers().values() for pid in found]
    assert (os.getpid() in pids) == (extra["container"] is not None)
