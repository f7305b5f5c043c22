"""Guests started in every way: without a monitor their RAM is found where QEMU's monitor says that it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from guests.kernels import GuestError
from guests.living import Living, wait_until
from support import applies, as_nobody, require

from engine.connectors.qemu import QemuConnector
from engine.connectors.qemu.finding import guests
from engine.errors import NotFoundError, UnsupportedError, UnusableTargetError
from engine.oslayer import Base
from engine.oslayers.native import NativeLayer

MIB = 1 << 20
Open = Callable[..., QemuConnector]
def backend(kind: str, name: str, size: int, more: str = "") -> list[str]:
    return ["-object", f"memory-backend-{kind},id={name},size={size}M{more}"]


def agree(living: Living, opened: Open) -> QemuConnector:
    """Open it as its monitor tells, and as is concluded; both are the same. Gives the second."""
    told, concluded = opened(living), opened(living, qmp="no")
    assert "told by its monitor" in told.info.notes[0]
    assert "concluded from its machine" in concluded.info.notes[0]
    assert told.memory_map.coalesced() == concluded.memory_map.coalesced()
    return concluded


@pytest.mark.parametrize(
    ("binary", "machine"),
    [
        ("qemu-system-x86_64", ""), ("qemu-system-aarch64", "virt,highmem=off"), ("qemu-system-riscv64", ""),
        ("qemu-system-ppc64", ""), ("qemu-system-ppc64", "powernv"), ("qemu-system-s390x", ""),
        ("qemu-system-loongarch64", ""),
    ],
)  # fmt: skip
def test_a_machine_of_which_no_size_is_told_has_that_of_its_kind(start, opened, binary, machine):
    applies(shutil.which(binary), f"{binary} is missing, one of many (packages qemu-system-misc, qemu-system-ppc)")
    agree(start("", binary=binary, machine=machine, more=["-S"]), opened)


@pytest.mark.parametrize(
    ("ram", "more"),
    [
        ("private", ["-accel", "tcg,tb-size=64"]),
        ("memfd", ["-accel", "tcg,tb-size=64,split-wx=on"]),
        ("memfd", ["-device", "VGA,vgamem_mb=64"]),
        ("private", ["-mem-path", "{folder}/ram", "-mem-prealloc"]),
        ("private", ["-mem-path", "{folder}"]),
        ("", [*backend("memfd", "r", 96), "-machine", "memory-backend=r"]),
        ("", ["-m", "64", "-object", "{'qom-type':'memory-backend-ram','id':'r','size':67108864,'share':true}",
                    "-machine", "memory-backend=r"]),
        ("", ["-machine", "memory.size=96M"]),
    ],
    ids=["buffer", "split-buffer", "graphics", "path", "folder", "unsized", "quotes", "property"],
)  # fmt: skip
def test_ram_is_told_from_all_else_that_is_mapped(start, opened, ram, more):
    agree(start(ram, more=["-S", *more]), opened)


def test_nodes_of_a_machine_of_old_are_told_by_its_monitor(start, opened):
    assert agree(start("nodes", machine="pc-i440fx-2.4", more=["-S"]), opened).memory.size == 64 * MIB


def test_nodes_of_one_size_are_told_apart_by_the_order_in_which_they_are_made(start, opened):
    words = ["-m", "96", "-smp", "3"]
    for number in range(3):
        node = f"node,nodeid={2 - number},memdev=m{number},cpus={number}"
        words += [*backend("memfd", f"m{number}", 32), "-numa", node]
    living = start("", more=words)
    memory = opened(living).memory
    wait_until(lambda: b"SeaBIOS" in memory.read(0xF0000, 0x10000), what="the BIOS in its shadow")
    agree(living, opened)


def test_memory_devices_are_placed_as_qemu_places_them(start, opened):
    words = [
        "-m", "64M,slots=4,maxmem=8G", *backend("ram", "d0", 128), "-device", "pc-dimm,memdev=d0",
        *backend("ram", "d1", 34), "-device", "nvdimm,memdev=d1,label-size=2M",
        *backend("memfd", "d2", 256), "-device", "virtio-mem-pci,memdev=d2,requested-size=64M",
    ]  # fmt: skip
    living = start("", machine="q35,nvdimm=on", more=["-S", *words])
    concluded = agree(living, opened)
    assert concluded.info.real_size == (64 + 128 + 32 + 256) * MIB
    assert any("plugged in while it runs" in note for note in concluded.info.notes)
    assert living.monitor is not None
    living.monitor.ask("object-add", **{"qom-type": "memory-backend-ram", "id": "d3", "size": 128 * MIB})
    living.monitor.ask("device_add", driver="pc-dimm", id="late", memdev="d3")
    assert opened(living).info.real_size == (64 + 128 + 32 + 256 + 128) * MIB


def test_what_a_guest_shares_with_other_programs_is_no_ram_of_it(start, opened):
    shared = [*backend("file", "big", 256, ",mem-path={folder}/shared,share=on"), "-device", "ivshmem-plain,memdev=big"]
    living = start("memfd", machine="q35", more=shared)
    wait_until(lambda: "ram): big" in living.ask("info mtree -f"), what="the device's memory")
    assert agree(living, opened).info.real_size == 64 * MIB


@pytest.mark.parametrize("ram", ["private", "memfd"])
def test_ram_of_a_guest_of_kvm_is_found_in_the_same_way(start, opened, ram):
    try:
        living = start(ram, accelerator="kvm", machine="q35", more=["-cpu", "qemu64"])
    except GuestError as error:
        applies(False, f"KVM does not run guests here: {error}")
        raise
    assert "enabled" in living.ask("info kvm")
    memory = opened(living).memory
    wait_until(lambda: b"SeaBIOS" in memory.read(0xF0000, 0x10000), what="the BIOS in its shadow")
    living.ask("stop")
    concluded = agree(living, opened)
    assert "confirmed by its" in concluded.info.notes[0]
    assert concluded.memory.read(0xF0000, 0x10000) == living.saved(0xF0000, 0x10000)
    assert opened(living).hints().registers[0]["CR0"] & 1


# -- programs and processes ---------------------------------------------------------------------------------


def test_a_qemu_of_another_name_is_found_and_listed(start, opened, tmp_path):
    program = shutil.which("qemu-system-x86_64")
    require(program, "qemu-system-x86_64 is missing")
    shutil.copy(program, tmp_path / "my-vm")
    # It looks for what belongs to it beside itself.
    modules = next((place.parent for place in Path("/usr/lib").glob("*/qemu/accel-*.so")), tmp_path)
    data = [word for folder in ("seabios", "qemu") for word in ("-L", f"/usr/share/{folder}")]
    before = ["env", f"QEMU_MODULE_DIR={modules}"]
    agree(start("private", binary=str(tmp_path / "my-vm"), before=before, more=["-S", *data]), opened)


@pytest.mark.parametrize(
    "more", [["-chroot", "/proc"], ["-runas", "nobody"], ["-async-teardown"], ["-sandbox", "on,spawn=deny"]],
    ids=["chroot", "runas", "teardown", "sandbox"],
)  # fmt: skip
def test_a_qemu_that_gave_up_rights_is_opened_and_asked(start, opened, more):
    living = start("private", more=["-S", *more])
    agree(living, opened)
    assert [one.pid for one in guests(NativeLayer.open(Base(live=True), {})) if one.name == living.name] == [living.pid]


def test_a_qemu_in_a_pid_namespace_is_asked_by_its_socket(start, opened):
    before = ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child"]
    agree(start("memfd", before=before, more=["-S"]), opened)


def test_a_daemon_is_asked_by_a_path_that_was_meant_where_it_began(start, opened, tmp_path):
    name = f"daemon, {os.getpid()}\n\x07"
    words = [
        "-machine", "pc", "-m", "64", "-nodefaults", "-display", "none", "-S", "-daemonize", "-pidfile", "pid",
        "-name", f"guest={name.replace(',', ',,')},process=other", "-qmp", "unix:q,server=on,wait=off",
    ]  # fmt: skip
    environment = {**os.environ, "PWD": str(tmp_path)}
    subprocess.run(["qemu-system-x86_64", *words], cwd=tmp_path, env=environment, check=True, timeout=30)
    pid = int((tmp_path / "pid").read_text())
    try:
        connector = opened(name)
        assert "told by its monitor at q" in connector.info.notes[0]
        assert connector.info.target == f"{name} (pid {pid})"
        listed = {target.name for target in QemuConnector.targets(NativeLayer.open(Base(live=True), {}))}
        assert str(pid) in listed, "nobody can type its name"
    finally:
        os.kill(pid, 9)


def test_a_configuration_file_is_read_as_the_process_sees_it(start, opened, tmp_path):
    (tmp_path / "vm.cfg").write_text(
        '[machine]\n  type = "q35"\n  memory-backend = "r"\n[memory]\n  size = "96"\n'
        '[object "r"]\n  qom-type = "memory-backend-memfd"\n  size = "96M"\n'
    )
    living = start("", machine="", more=["-S", "-readconfig", str(tmp_path / "vm.cfg")])
    assert agree(living, opened).memory.size == 96 * MIB


def test_a_qemu_that_is_asked_what_it_can_do_is_no_guest(start, opened):
    living = start("", machine="none", more=["-S"])
    with pytest.raises(NotFoundError):
        opened(living)


# -- users --------------------------------------------------------------------------------------------------

OPEN_IT = """
    from engine.connectors.qemu import QemuConnector
    from engine.errors import EngineError
    from engine.oslayer import Base
    from engine.oslayers.native import NativeLayer
    host = NativeLayer.open(Base(live=True), {})
    print([target.name for target in QemuConnector.targets(host) if target.name == sys.argv[1]])
    try:
        connector = QemuConnector.open(sys.argv[1], {}, parent=host, writable=False)
        print(connector.memory.size, connector.info.notes[0])
    except EngineError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize("ram", ["private", "memfd"])
def test_a_user_opens_a_guest_of_his_own(start, ram):
    require(os.geteuid() == 0, "only root can become somebody else")
    before = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    living = start(ram, before=before, own_monitor=False, monitor="none", more=["-S"])
    wait_until(lambda: _is_there(living), what="QEMU")
    assert as_nobody(OPEN_IT, living.name, imports="shutil, engine.connectors.qemu").splitlines() == [
        f"['{living.name}']", f"{64 * MIB} the layout of its RAM is concluded from its machine (pc) and size, "
        "confirmed by nothing in it",
    ]  # fmt: skip


def test_a_guest_of_somebody_else_is_listed_and_refused_in_a_sentence(start):
    require(os.geteuid() == 0, "only root can become somebody else")
    living = start("memfd", more=["-S"])
    listed, refused = as_nobody(OPEN_IT, living.name, imports="shutil, engine.connectors.qemu").splitlines()
    assert listed == f"['{living.name}']"
    named = f"AccessDeniedError this user may not look into the guest {living.name} (pid {living.pid}): "
    assert refused.startswith(named)
    assert "run as root" in refused


def _is_there(living: Living) -> bool:
    threads = os.listdir(f"/proc/{living.pid}/task")
    return "qemu" in Path(f"/proc/{living.pid}/comm").read_text() and len(threads) > 2


# -- other programs, other machines -------------------------------------------------------------------------


def pretender(*words: str) -> list[str]:
    code = "import sys; print('on', flush=True); sys.stdin.read()"
    return ["qemu-system-x86_64", "-c", code, *words]


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["-machine", "xenfv", "-xen-domid", "3"], UnsupportedError, "domain of Xen"),
        (["-machine", "pc", "-m", "64T"], UnusableTargetError, "no mapping of 67108864 MiB"),
        (["-readconfig", "/none/vm.cfg", "-m", "64T"], UnusableTargetError, "'/none/vm.cfg' cannot be read"),
        (["-object", "tdx-guest,id=t", "-machine", "q35,confidential-guest-support=t"], UnsupportedError,
         r"encrypted \(TDX\)"),
    ],
    ids=["xen", "nowhere", "configuration", "encrypted"],
)  # fmt: skip
def test_what_cannot_be_opened_says_why(opened, words, error, said):
    with subprocess.Popen(
        pretender("-name", "pretender", *words), executable=sys.executable, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(error, match=said):
                opened(str(process.pid))
        finally:
            process.kill()


def test_the_memfd_of_any_program_is_opened_by_place_size_and_map(opened, tmp_path):
    code = (
        "import mmap, os, sys; f = os.memfd_create('guest-ram'); os.ftruncate(f, 8 << 20); m = mmap.mmap(f, 8 << 20)\n"
        "m[0x400000:0x400004] = b'high'; m[4096:4099] = b'low'; print('on', flush=True); sys.stdin.read()"
    )
    (tmp_path / "map").write_text(
        "[[range]]\nbase = 0\nlength = 0x400000\n"
        "[[range]]\nbase = 0x100000000\nlength = 0x400000\nreal_base = 0x400000\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            maps = Path(f"/proc/{other.pid}/maps").read_text().splitlines()
            place = next(line.partition("-")[0] for line in maps if "/memfd:guest-ram" in line)
            found = opened(str(other.pid), base=f"0x{place}", size="8M", map=str(tmp_path / "map"))
            assert found.memory.read(4096, 3) == b"low"
            assert found.memory.read(1 << 32, 4) == b"high"
            assert found.memory.shortcut() is not None, "a file that is mapped is read without the process"
        finally:
            other.kill()
