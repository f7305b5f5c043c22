"""The mount's rules, each tried on a real mount of this machine by doing what programs do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from clients.kinds import await_rest
from mounting import mounted
from support import require

PAGE = 4096
NO_CHANGE = {"EPERM"} if os.geteuid() == 0 else {"EPERM", "EACCES"}
"""The kernel answers users other than root, by the mode of the directory, before we are asked."""
NO_WRITE = "EROFS" if os.geteuid() == 0 else "EACCES"
_NAMES = iter(range(10_000))

_PROGRAM = r"""
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: anybody of this user may look
libc.prctl(15, bytes.fromhex(sys.argv[1]), 0, 0, 0)  # PR_SET_NAME
held, addresses = [], []
for path in sys.argv[2:]:
    file = open(os.fsencode(bytes.fromhex(path)), "rb+")
    file.truncate(4 * 4096)
    mapped = mmap.mmap(file.fileno(), 4 * 4096, mmap.MAP_SHARED)
    mapped[:] = b"mapped bytes\n\0\0\0" * 1024
    file.truncate(2 * 4096)  # what lies behind is a hole now
    held.append((file, mapped))
held.append((None, mmap.mmap(-1, 1 << 28, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)))
print(*(ctypes.addressof((ctypes.c_char * 1).from_buffer(mapped)) for _, mapped in held), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Program:
    """A program with a name of our choice that has mapped files, and 256 MiB it never touched."""

    pid: int
    mapped: tuple[int, ...]
    untouched: int


@contextlib.contextmanager
def program(name: bytes = b"a rule", *files: bytes) -> Iterator[Program]:
    words = [name.hex(), *(file.hex() for file in files)]
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", _PROGRAM, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        *mapped, untouched = map(int, process.stdout.readline().split())
        await_rest(process.pid)
        yield Program(process.pid, tuple(mapped), untouched)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def top() -> Iterator[Path]:
    """The root of a mount that may write."""
    with mounted("--writable", limit=240) as found:
        yield found.folder


@pytest.fixture
def new(top) -> Path:
    return top / "connector/new"


@pytest.fixture
def image(top, tmp_path) -> Path:
    """An instance over a file that the test knows."""
    path = tmp_path / "image.raw"
    path.write_bytes(os.urandom(1 << 20))
    name = fresh()
    (top / "connector/new").write_text(f"{name} raw:{path}\n")
    return top / "connector" / name


def fresh() -> str:
    """A name that no instance has."""
    return f"i{next(_NAMES)}"


def shell(line: str, *arguments: object, program: str = "bash", cwd: Path | None = None, timeout: float = 30):
    require(shutil.which(program), f"{program} is not installed")
    return subprocess.run(
        [program, "-c", line, program, *map(str, arguments)], capture_output=True, text=True, timeout=timeout,
        stdin=subprocess.DEVNULL, cwd=cwd, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip


def errno_of(action: Callable[[], object]) -> str:
    """The name of the errno with which it fails."""
    with pytest.raises(OSError) as caught:
        action()
    assert caught.value.errno is not None
    return errno.errorcode[caught.value.errno]


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# -- control files -------------------------------------------------------------------------------------------

WAYS = {
    "bash": ("bash", 'echo "$1" > "$2"'),
    "dash": ("dash", 'echo "$1" > "$2"'),
    "bash >>": ("bash", 'echo "$1" >> "$2"'),
    "tee": ("bash", 'echo "$1" | tee "$2" >/dev/null; exit ${PIPESTATUS[1]}'),
    "tee -a": ("bash", 'echo "$1" | tee -a "$2" >/dev/null; exit ${PIPESTATUS[1]}'),
    "dd": ("bash", 'echo "$1" | dd of="$2" status=none'),
    "cat": ("bash", 'echo "$1" | cat > "$2"'),
    "cp": ("bash", 'cp <(echo "$1") "$2"'),
    "perl": ("bash", """perl -e 'open F, ">", $ARGV[1]; print F "$ARGV[0]\\n"; close F or die "$!\\n"' "$1" "$2" """),
    "python": ("bash", f"""{shlex.quote(sys.executable)} -S """
               """-c 'import sys; print(sys.argv[1], file=open(sys.argv[2], "w"))' """
               """ "$1" "$2" """),
    "busybox": ("bash", 'busybox sh -c \'echo "$1" > "$2"\' sh "$1" "$2"'),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_command_arrives_once_however_it_is_written(top, new, way):
    name = fresh()
    done = shell(WAYS[way][1], f"{name} dummy:size=64K", new, program=WAYS[way][0])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (top / "connector" / name / "phys_mem").stat().st_size == 1 << 16


@pytest.mark.parametrize("way", [way for way in WAYS if way != "python"])
def test_whoever_writes_a_line_that_fails_is_told(new, way):
    done = shell(WAYS[way][1], f"{fresh()} nosuch", new, program=WAYS[way][0])
    assert done.returncode != 0
    assert "No such device or address" in done.stderr or (way == "dash" and "I/O error" in done.stderr)


def test_python_is_told_of_a_failing_line_though_it_writes_it_twice(new):
    name = fresh()
    with pytest.raises(OSError, match="No such device or address"):
        new.write_text(f"{name} nosuch\n")
    assert new.read_text().count(f"failed: {name} nosuch") == 1


def test_several_lines_in_one_write_all_run(top, new):
    names = [fresh() for _ in range(5)]
    done = shell('printf "$1" > "$2"', "".join(f"{name} dummy:size=4K\\n" for name in names), new)
    assert done.returncode == 0
    assert set(names) <= set(os.listdir(top / "connector"))


def test_a_write_stops_in_front_of_the_line_that_fails_and_the_rest_never_runs(top, new):
    good, bad, never = fresh(), fresh(), fresh()
    first = f"{good} dummy:size=4K\n".encode()
    with opened(new, os.O_WRONLY) as descriptor:
        rest = f"{bad} nosuch\n{never} dummy\n".encode()
        assert os.write(descriptor, first + rest) == len(first)
        assert errno_of(lambda: os.write(descriptor, rest)) == "ENXIO"
        assert errno_of(lambda: os.write(descriptor, f"{never} dummy\n".encode())) == "ENXIO"
    assert good in os.listdir(top / "connector")
    assert never not in os.listdir(top / "connector")


def test_a_here_document_whose_middle_line_fails_runs_the_first_alone(top, new):
    good, never = fresh(), fresh()
    done = shell('cat > "$3" <<EOF\n$1 dummy:size=4K\nx nosuch\n$2 dummy:size=4K\nEOF', good, never, new)
    assert done.returncode != 0
    assert good in os.listdir(top / "connector")
    assert never not in os.listdir(top / "connector")


def test_two_writers_of_half_lines_do_not_mix(top, new):
    one, two = fresh(), fresh()
    with opened(new, os.O_WRONLY) as first, opened(new, os.O_WRONLY) as second:
        os.write(first, f"{one} dum".encode())
        os.write(second, f"{two} dummy:si".encode())
        os.write(first, b"my:size=4K\n")
        os.write(second, b"ze=8K\n")
    assert (top / "connector" / one / "phys_mem").stat().st_size == 4096
    assert (top / "connector" / two / "phys_mem").stat().st_size == 8192


def test_a_line_without_newline_runs_when_it_is_closed(top, new):
    name = fresh()
    assert shell('printf %s "$1" > "$2"', f"{name} dummy:size=4K", new).returncode == 0
    assert name in os.listdir(top / "connector")


def test_a_shell_may_keep_it_open_and_write_line_by_line(top, new):
    one, two = fresh(), fresh()
    line = 'exec 3> "$3"; echo "$1 dummy:size=4K" >&3; echo "x nosuch" >&3; echo $?; exec 4> "$3"; echo "$2 dummy" >&4'
    done = shell(line, one, two, new)
    assert done.stdout == "1\n", done.stderr
    assert {one, two} <= set(os.listdir(top / "connector"))


def test_comments_and_empty_lines_are_nothing(top, new):
    before = os.listdir(top / "connector")
    assert shell('printf "# x dummy\\n\\n   \\n#\\n" > "$1"', new).returncode == 0
    assert os.listdir(top / "connector") == before


def test_an_editor_writes_back_what_it_has_read_and_nothing_happens(top, new):
    before = os.listdir(top / "connector")
    require(shutil.which("vim"), "vim is not installed")
    done = shell('vim -esnN -u NONE -i NONE -c "w!" -c "qa!" "$1"', new)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.listdir(top / "connector") == before


def test_an_editor_adds_a_line_and_it_runs(top, new):
    name = fresh()
    require(shutil.which("vim"), "vim is not installed")
    done = shell('vim -esnN -u NONE -i NONE -c "\\$put =\'$1 dummy:size=4K\'" -c "w!" -c "qa!" "$2"', name, new)
    assert done.returncode == 0, done.stdout + done.stderr
    assert name in os.listdir(top / "connector")


def test_a_reader_further_back_in_new_reads_what_stands_there(new):
    whole = new.read_bytes()
    assert shell('tail -c +11 "$1"', new).stdout.encode() == whole[10:]
    assert shell('dd if="$1" bs=10 skip=1 status=none', new).stdout.encode() == whole[10:]


def test_truncate_and_touch_of_new_do_nothing_and_succeed(new):
    assert shell('truncate -s 0 "$1" && touch "$1" && : > "$1"', new).returncode == 0


@pytest.mark.parametrize("name", ["new", "..", ".", "a/b", "-x", "a b", "x" * 65, "\x1b[31m", "é"])
def test_names_that_no_instance_can_have_are_refused(new, name):
    assert errno_of(lambda: new.write_text(f"'{name}' dummy\n")) == "EINVAL"


# -- text files ----------------------------------------------------------------------------------------------


def text_files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        parts = set(path.relative_to(directory).parts)
        if not parts & {"regions", "sections", "fd", "task", "environ"} and path.is_file() and not path.is_symlink():
            yield path


def test_every_sized_file_has_as_many_bytes_as_stat_says_and_blocks_for_them(top, image):
    with program() as target:
        found = list(text_files(top / "os/processes" / str(target.pid))) + list(text_files(image))
        assert len(found) > 20
        for path in found:
            if path.name in ("mem", "exports", "imports", "image", "phys_mem", "mounts", "mountinfo"):
                continue
            size, told = len(path.read_bytes()), path.stat()
            again = len(path.read_bytes())
            assert told.st_size in (size, again), path
            assert told.st_blocks >= told.st_size / 512, path


def test_text_ends_in_a_newline_but_for_what_proc_has(top, image):
    paths = [top / "README", top / "plugins", top / "connector/new", *image.glob("info*"), image / "memory_map"]
    for path in paths:
        assert path.read_bytes().endswith(b"\n"), path


def test_tar_of_a_process_without_its_memory_holds_what_proc_says(top, tmp_path):
    with program() as target:
        line = 'tar cf - -C "$1" maps cmdline comm environ info | tar xf - -C "$2"'
        assert shell(line, top / f"os/processes/{target.pid}", tmp_path).returncode == 0
        for name in ("maps", "cmdline", "comm", "environ"):
            assert (tmp_path / name).read_bytes() == Path(f"/proc/{target.pid}/{name}").read_bytes(), name


# -- holes and reading ---------------------------------------------------------------------------------------


def region_at(directory: Path, address: int) -> Path:
    return next(path for path in (directory / "regions").iterdir() if int(path.name.split("-")[0], 16) == address)


def test_a_hole_is_zeros_in_its_region_and_eio_in_mem(top, tmp_path):
    backing = tmp_path / "backing"
    backing.touch()
    with program(b"holes", os.fsencode(backing)) as target:
        directory = top / "os/processes" / str(target.pid)
        expected = b"mapped bytes\n\0\0\0" * 512 + bytes(2 * PAGE)
        assert region_at(directory, target.mapped[0]).read_bytes() == expected
        with opened(directory / "mem", os.O_RDONLY) as mem:
            assert os.pread(mem, 4 * PAGE, target.mapped[0]) == expected[: 2 * PAGE]
            assert errno_of(lambda: os.pread(mem, 16, target.mapped[0] + 2 * PAGE)) == "EIO"


def test_strings_and_grep_read_a_region_to_its_end_though_it_has_a_hole(top, tmp_path):
    backing = tmp_path / "backing"
    backing.touch()
    with program(b"holes", os.fsencode(backing)) as target:
        region = region_at(top / "os/processes" / str(target.pid), target.mapped[0])
        assert shell('strings "$1" | wc -l', region).stdout.strip() == "512"
        assert shell('grep -c "mapped bytes" "$1"', region).stdout.strip() == "512"


def _cost(pid: int, address: int) -> tuple[str, str]:
    """Page tables of a process, and what of the mapping at an address is in memory, both as the kernel counts them."""
    status, smaps = Path(f"/proc/{pid}/status").read_text(), Path(f"/proc/{pid}/smaps").read_text()
    tables = re.search(r"^VmPTE:.*", status, re.MULTILINE)
    resident = re.search(rf"^{address:x}-.*?^Rss: *(.*?)$", smaps, re.MULTILINE | re.DOTALL)
    assert tables
    assert resident
    return tables[0], resident[1]


def test_reading_what_was_never_touched_gives_zeros_and_costs_the_target_nothing(top):
    with program() as target:
        before = _cost(target.pid, target.untouched)
        assert before[1] == "0 kB"
        region = region_at(top / "os/processes" / str(target.pid), target.untouched)
        assert shell('cmp -n $((1 << 28)) "$1" /dev/zero', region).returncode == 0
        with opened(top / f"os/processes/{target.pid}/mem", os.O_RDONLY) as mem:
            assert os.pread(mem, 1 << 20, target.untouched) == bytes(1 << 20)
        assert _cost(target.pid, target.untouched) == before


def test_a_raw_file_that_changes_is_read_as_it_is_now_on_a_held_descriptor(top, tmp_path):
    path, name = tmp_path / "live.raw", fresh()
    path.write_bytes(b"a" * PAGE)
    (top / "connector/new").write_text(f"{name} raw:{path}\n")
    with opened(top / "connector" / name / "phys_mem", os.O_RDONLY) as held, open(path, "r+b", buffering=0) as file:
        for byte in (b"b", b"c"):
            file.seek(0)
            file.write(byte * PAGE)
            assert os.pread(held, PAGE, 0) == byte * PAGE


def test_tail_follows_an_image_that_grows(top, tmp_path):
    path, name = tmp_path / "growing.raw", fresh()
    path.write_bytes(b"a" * PAGE + b"last")
    (top / "connector/new").write_text(f"{name} raw:{path}\n")
    command = ["tail", "-c", "4", "-s", "0.1", "-f", str(top / "connector" / name / "phys_mem")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tail:
        try:
            assert tail.stdout is not None
            os.set_blocking(tail.stdout.fileno(), False)
            seen = b""

            def follows(wanted: bytes) -> bool:
                nonlocal seen
                seen += tail.stdout.read() or b""
                return seen == wanted

            wait_for(lambda: follows(b"last"), "the last bytes")
            with open(path, "ab") as file:
                file.write(b" and more")
            wait_for(lambda: follows(b"last and more"), "what was appended")
        finally:
            tail.kill()


# -- what would destroy --------------------------------------------------------------------------------------


@pytest.fixture
def memory_file(request, top, image) -> Iterator[Path]:
    if request.param == "phys_mem":
        yield image / "phys_mem"
        return
    with program() as target:
        directory = top / "os/processes" / str(target.pid)
        yield directory / "mem" if request.param == "mem" else region_at(directory, target.untouched)


@pytest.mark.parametrize("memory_file", ["mem", "region", "phys_mem"], indirect=True)
@pytest.mark.parametrize(
    "habit",
    [
        lambda path: os.open(path, os.O_WRONLY | os.O_TRUNC),
        lambda path: os.open(path, os.O_WRONLY | os.O_APPEND),
        lambda path: os.open(path, os.O_RDONLY | os.O_TRUNC),
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, 1 << 40),
        lambda path: os.utime(path),
        lambda path: os.chmod(path, 0o777),
        lambda path: os.chown(path, 1, 1),
        os.unlink,
        lambda path: os.rename(path, path.with_name("other")),
        lambda path: os.link(path, path.with_name("other")),
    ],
    ids="O_TRUNC O_APPEND O_RDONLY|O_TRUNC cut grow utime chmod chown unlink rename link".split(),
)
def test_a_memory_file_refuses_what_would_change_more_than_bytes(memory_file, habit):
    assert errno_of(lambda: habit(memory_file)) in NO_CHANGE


@pytest.mark.parametrize("memory_file", ["phys_mem"], indirect=True)
def test_ftruncate_of_an_open_memory_file_is_eperm(memory_file):
    with opened(memory_file, os.O_RDWR) as descriptor:
        assert errno_of(lambda: os.ftruncate(descriptor, 0)) == "EPERM"


@pytest.mark.parametrize("memory_file", ["mem", "phys_mem"], indirect=True)
def test_who_could_not_cut_a_file_does_not_overwrite_it_either(memory_file):
    with opened(memory_file, os.O_RDWR) as descriptor, opened(memory_file, os.O_RDWR) as other:
        assert errno_of(lambda: os.ftruncate(descriptor, 0)) == "EPERM"
        assert errno_of(lambda: os.pwrite(descriptor, b"a new file", 0)) == "EPERM"
        with contextlib.suppress(OSError):  # a hole stands at the beginning of mem
            assert os.pread(descriptor, 16, 0) == os.pread(other, 16, 0)


@pytest.mark.parametrize("where", [".", "connector", "os", "os/native", "os/processes", "os/processes/self"])
@pytest.mark.parametrize(
    "make",
    [
        lambda path: os.open(path, os.O_WRONLY | os.O_CREAT),
        os.mkdir,
        lambda path: os.mknod(path, 0o644),
        os.mkfifo,
        lambda path: os.symlink("x", path),
    ],
    ids="create mkdir mknod mkfifo symlink".split(),
)
def test_nothing_can_be_made(top, where, make):
    directory = top / where.replace("self", str(os.getpid()))
    assert errno_of(lambda: make(directory / "made-up")) in NO_CHANGE


# -- instances -----------------------------------------------------------------------------------------------


def test_an_open_file_of_a_removed_instance_is_enodev_and_closes(image):
    with opened(image / "phys_mem", os.O_RDWR) as held:
        assert len(os.pread(held, 16, 0)) == 16
        os.rmdir(image)
        assert errno_of(lambda: os.pread(held, 16, 0)) == "ENODEV"
        assert errno_of(lambda: os.pwrite(held, b"x", 0)) == "ENODEV"
    assert not image.exists()


def test_a_file_held_from_before_is_not_that_of_a_new_instance_of_the_name(top, image):
    with opened(image / "phys_mem", os.O_RDONLY) as held:
        os.rmdir(image)
        (top / "connector/new").write_text(f"{image.name} dummy:size=64K\n")
        assert (image / "phys_mem").stat().st_size == 1 << 16
        assert errno_of(lambda: os.pread(held, 16, 0)) == "ENODEV"


def test_an_instance_goes_though_a_shell_stands_in_it(image):
    done = shell('cd "$1" && rmdir "$1" && ls', image)
    assert done.returncode != 0
    assert "No such file or directory" in done.stderr or "No such device" in done.stderr
    assert not image.exists()


def test_rm_rf_of_an_instance_removes_nothing(image):
    before = (image / "phys_mem").read_bytes()
    done = shell('rm -rf "$1"', image)
    assert done.returncode != 0
    assert "Operation not permitted" in done.stderr or "Permission denied" in done.stderr
    assert (image / "phys_mem").read_bytes() == before


def test_only_instances_can_be_removed(top, image):
    for path in (top / "connector", top / "os/native/processes", top / f"os/processes/{os.getpid()}"):
        assert errno_of(lambda path=path: os.rmdir(path)) in NO_CHANGE
    assert errno_of(lambda: os.rmdir(image / "info")) in {"ENOTDIR", *NO_CHANGE}


# -- names and owners ----------------------------------------------------------------------------------------


def links_by_name(top: Path) -> dict[bytes, bytes]:
    directory = os.fsencode(top / "os/processes/by-name")
    found = {}
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):  # it ended
            found[name] = os.readlink(directory + b"/" + name)
    return found


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Lists of names are up to a second old."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, f"not {what}"
        time.sleep(0.1)


@pytest.mark.parametrize("name", [b"a/b", b"\x1b[31m", b"new\nline", b"\xff\xfe", b"..", b".", b"by-name", b"-rf ~"])
def test_a_process_with_a_hostile_name_is_listed_and_found(top, name):
    with program(name) as target:
        wait_for(lambda: f"../{target.pid}".encode() in links_by_name(top).values(), "listed by name")
        for found in links_by_name(top):
            assert re.fullmatch(rb"[^/\x00-\x1f\x7f]+", found), found
            found.decode()
        assert (top / "os/processes" / str(target.pid) / "comm").read_bytes() == name + b"\n"


@pytest.mark.parametrize("name", [b"a\nb", b"\xff\xfe", b"%41", b"~", b"x" * 255, "é".encode() * 127, b" (deleted)"])
def test_a_region_of_a_file_with_a_hostile_name_can_be_read(top, tmp_path, name):
    backing = os.fsencode(tmp_path) + b"/" + name
    open(backing, "wb").close()
    with program(b"names", backing) as target:
        region = region_at(top / "os/processes" / str(target.pid), target.mapped[0])
        raw = os.fsencode(region.name)
        assert len(raw) <= 255
        assert re.fullmatch(rb"[^/\x00-\x1f\x7f]+", raw)
        assert region.read_bytes().startswith(b"mapped bytes\n")
        assert shell('cp -r "$1" "$2/copy"', region.parent, tmp_path, timeout=60).returncode in (0, 1)


def test_of_several_processes_with_one_name_each_is_found_by_name_and_pid(top):
    with program(b"twins") as one, program(b"twins") as two:
        wanted = {f"twins#{one.pid}", f"twins#{two.pid}"}
        wait_for(lambda: wanted <= set(os.listdir(top / "os/processes/by-name")), "listed by name")
        assert not (top / "os/processes/by-name/twins").exists()
        for target in (one, two):
            assert os.readlink(top / f"os/processes/by-name/twins#{target.pid}") == f"../{target.pid}"
            assert os.readlink(top / f"os/processes/by-pid-name/twins ({target.pid})") == f"../{target.pid}"


def test_files_of_another_user_belong_to_him_as_in_proc(top):
    require(os.geteuid() == 0, "only root can be somebody else")
    process = subprocess.Popen(["sleep", "60"], user=65534, group=65534, extra_groups=[])
    try:
        for name in (".", "mem", "maps", "fd", "regions", "task"):
            told = os.lstat(top / f"os/processes/{process.pid}" / name)
            assert (told.st_uid, told.st_gid) == (65534, 65534), name
    finally:
        process.kill()
        process.wait()


def test_descriptors_are_links_with_the_text_that_proc_has(top):
    with program() as target:
        there, here = Path(f"/proc/{target.pid}/fd"), top / f"os/processes/{target.pid}/fd"
        assert {name: os.readlink(here / name) for name in os.listdir(here)} == {
            name: os.readlink(there / name) for name in os.listdir(there)
        }


def test_a_zombie_is_listed_and_every_file_of_it_answers(top):
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        directory = top / f"os/processes/{process.pid}"
        assert str(process.pid) in os.listdir(top / "os/processes")
        assert "Z (zombie)" in (directory / "status").read_text()
        done = shell('ls -laR "$1"; cat "$1"/*; true', directory)
        assert "Input/output error" not in done.stderr.replace("mem: Input/output error", "")
    finally:
        process.wait()


# -- a good neighbour ----------------------------------------------------------------------------------------


def test_ripgrep_keeps_out_of_memory_that_it_was_not_sent_into(top, tmp_path):
    backing = tmp_path / "backing"
    backing.touch()
    with program(b"ignored", os.fsencode(backing)) as target:
        directory = top / "os/processes" / str(target.pid)
        require(shutil.which("rg"), "rg is not installed")
        found = shell("rg --no-config -al --no-messages 'mapped bytes'", cwd=directory).stdout.split()
        assert not [name for name in found if re.search(r"(^|/)(mem|regions|sections|image|phys_mem)\b", name)]
        sent = shell("rg --no-config -ac 'mapped bytes' regions", cwd=directory).stdout
        assert f"{target.mapped[0]:x}" in sent


def test_tar_leaves_the_tree_out_where_it_respects_cache_tags(top):
    done = shell('tar cf - --exclude-caches -C "$1" . | tar tf -', top)
    assert done.stdout.split() == ["./", "./CACHEDIR.TAG"]


def test_df_of_the_mount_has_no_blocks_and_df_of_all_leaves_it_out(top):
    one = shell('df -P "$1"', top)
    assert one.returncode == 0
    assert one.stdout.splitlines()[1].split()[1:5] == ["0", "0", "0", "-"]
    assert str(top) not in shell("df -P").stdout


def test_the_mount_is_never_read_only_for_the_kernel():
    with mounted() as mount:
        line = next(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(mount.folder) in line)
        assert line.split()[5].split(",")[0] == "rw"
        assert {"nosuid", "nodev"} <= set(line.split()[5].split(","))
        name = fresh()
        (mount.folder / "connector/new").write_text(f"{name} dummy:size=4K\n")
        assert errno_of(lambda: os.open(mount.folder / f"connector/{name}/phys_mem", os.O_WRONLY)) == NO_WRITE
        os.rmdir(mount.folder / "connector" / name)


def test_find_over_a_process_ends_and_meets_no_error(top):
    with program() as target:
        done = shell('find "$1" -ls', top / f"os/processes/{target.pid}", timeout=60)
        assert done.returncode == 0, done.stderr[:500]
        assert done.stderr == ""
        assert len(done.stdout.splitlines()) > 100
