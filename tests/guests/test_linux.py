"""The OS layer `linux` over recorded guests, opened from their RAM alone: all that it says equals what they said."""

from __future__ import annotations

import ipaddress
import types

import pytest
from guests.catalogue import BTF
from guests.opened import opened

from cloudfs.render import log_lines, maps_line
from cloudfs.render.net import net_lines
from engine.errors import EngineError
from engine.file_memory import FileMemory
from engine.oslayer import Base, KernelLog, OpenFiles, ProcFiles, Sockets, Symbols
from engine.oslayers.linux import LinuxLayer


@pytest.fixture
def layer(recording):
    return opened(recording)


@pytest.fixture
def with_types(typed):
    """The layer of a guest whose kernel carries its types."""
    return opened(typed)


def test_the_kernel_is_found_with_its_release_and_page_tables(recording, layer):
    truth = recording.truth
    assert layer.info.version == truth.text("/proc/sys/kernel/osrelease").strip()
    assert layer.info.page_size == truth.page_size
    assert layer.info.kernel_base == int(truth.vmcoreinfo["SYMBOL(_stext)"], 16)


def test_the_log_equals_what_the_guest_read_of_it(recording, layer):
    log = layer.capability(KernelLog)
    assert log is not None
    expected = recording.truth.text("dmesg").splitlines()
    found = [line[:-1] for record in log.records() for line in log_lines(record, raw=True)]
    assert found[: len(expected)] == expected


def test_physical_memory_lies_where_the_machine_has_it(recording, layer):
    """A few words of each extent of RAM, by the guest's addresses, in the recorded file."""
    memory = layer.physical_memory
    with recording.image.open("rb") as image:
        for start, length, offset in recording.extents:
            for part in range(8):
                at = length // 8 * part & ~7
                image.seek(offset + at)
                assert memory.read(start + at, 8) == image.read(8), hex(start + at)


def test_all_processes_are_listed(typed, with_types):
    truth = typed.truth
    listed = set(with_types.pids())
    assert set(truth.pids) <= listed
    assert len(listed - set(truth.pids)) <= 2  # what began after the guest had listed its own


def test_names_states_and_numbers_equal_the_guest_s_own(typed, with_types):
    for pid in typed.truth.pids:
        info = with_types.process(pid).info
        status = dict(line.split(":\t", 1) for line in typed.truth.text(f"/proc/{pid}/status").splitlines())
        name = status["Name"]
        assert name == info.name or info.kernel_thread, pid
        assert int(status["PPid"]) == info.ppid
        assert [info.uid, info.gid] == [int(status[key].split()[0]) for key in ("Uid", "Gid")]
        assert int(status["Threads"]) == info.threads
        stat = typed.truth.text(f"/proc/{pid}/stat").rsplit(")", 1)[1].split()
        assert abs(int(stat[19]) - (info.start_ticks or 0)) <= 1


def test_command_line_environment_and_links_equal_the_guest_s_own(typed, with_types):
    truth = typed.truth
    for pid in truth.pids:
        files = with_types.process(pid).capability(ProcFiles)
        assert files is not None
        for name in ("cmdline", "environ"):
            if f"/proc/{pid}/{name}" in truth:
                assert files.read(name) == truth[f"/proc/{pid}/{name}"], (pid, name)
        for name in ("exe", "cwd", "root"):
            if f"/proc/{pid}/{name}" in truth:
                assert files.link(name) == truth.text(f"/proc/{pid}/{name}").rstrip("\n"), (pid, name)


def test_every_line_of_maps_equals_the_guest_s_own(typed, with_types):
    for pid in typed.truth.pids:
        expected = [line.split() for line in typed.truth.text(f"/proc/{pid}/maps").splitlines()]
        found = [maps_line(region).split() for region in with_types.process(pid).regions()]
        assert found == expected, pid


def test_secrets_are_read_back_from_every_kind_of_mapping(typed, with_types):
    from guests.truth import secret_text

    truth = typed.truth
    memory = with_types.process(truth.keeper).memory
    for name, address in truth.secrets.items():
        assert memory.read(address, 48) == secret_text(name), name


def test_kernel_modules_equal_proc_modules(typed, with_types):
    expected = [line.split() for line in typed.truth.text("/proc/modules").splitlines()]
    try:
        found = [[module.name, str(module.size), f"{module.info.base:#018x}"] for module in with_types.modules()]
    except EngineError as error:
        pytest.fail(str(error))
    assert found == [[row[0], row[1], row[5]] for row in expected]


def test_symbols_equal_kallsyms(recording, layer):
    symbols = layer.capability(Symbols)
    assert symbols is not None
    expected = set()
    for line in recording.truth.text("/proc/kallsyms").splitlines():
        address, kind, rest = line.split(" ", 2)
        name, _, module = rest.partition("\t")
        if module or recording.guest.architecture in BTF:
            module = module.strip("[]")
        expected.add((name, kind, int(address, 16), module or None))
    found = {(one.name, one.kind, one.address, one.module) for one in symbols.symbols()}
    if recording.guest.architecture not in BTF:  # modules' symbols need types
        expected = {row for row in expected if row[3] is None}
        found = {row for row in found if row[3] is None}
    assert not expected ^ found




def _ends(family: str, text: str) -> str:
    """`0100007F:1C20` as `127.0.0.1:7200`."""
    host, port = text.split(":")
    data = b"".join(bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8))
    if family == "inet":
        return f"{ipaddress.IPv4Address(data)}:{int(port, 16)}"
    wide = ipaddress.IPv6Address(data)
    return f"[{f'::ffff:{wide.ipv4_mapped}' if wide.ipv4_mapped else wide}]:{int(port, 16)}"


@pytest.mark.parametrize(
    ("file", "family"), [("tcp", "inet"), ("tcp6", "inet6"), ("udp", "inet"), ("udp6", "inet6")]
)
def test_sockets_equal_proc_net(typed, with_types, file, family):
    source = with_types.capability(Sockets)
    assert source is not None
    found = {
        (one.local, one.remote, one.uid, one.inode)
        for one in source.sockets()
        if one.family == family and one.protocol == file.rstrip("6")
    }
    lines = [line.split() for line in typed.truth.text(f"/proc/net/{file}").splitlines()[1:]]
    assert {(_ends(family, row[1]), _ends(family, row[2]), int(row[7]), int(row[9])) for row in lines} == found


def test_unix_sockets_equal_proc_net(typed, with_types):
    source = with_types.capability(Sockets)
    assert source is not None
    found = {(one.inode, one.local) for one in source.sockets() if one.family == "unix"}
    lines = [line.split(None, 7) for line in typed.truth.text("/proc/net/unix").splitlines()[1:]]
    assert {(int(row[6]), row[7].rstrip("\n") if len(row) > 7 else None) for row in lines} == found


def test_netlink_sockets_equal_proc_net_to_the_byte(typed, with_types):
    source = with_types.capability(Sockets)
    assert source is not None
    assert "".join(net_lines("netlink", source.sockets())) == typed.truth.text("/proc/net/netlink")


def test_the_kernel_s_own_sockets_have_no_process(with_types):
    source = with_types.capability(Sockets)
    assert source is not None
    own = [one for one in source.sockets() if one.pid is None]
    assert own
    assert {(one.family, one.descriptor) for one in own} == {("netlink", None)}


def test_open_files_equal_the_links_in_fd(typed, with_types):
    for pid in typed.truth.pids:
        if f"/proc/{pid}/fd" not in typed.truth:
            continue
        process = with_types.process(pid).capability(OpenFiles)
        found = {str(one.descriptor): one.path for one in process.open_files()}
        expected = dict(line.split(" ", 1) for line in typed.truth.text(f"/proc/{pid}/fd").splitlines())
        assert found == expected, pid


def test_processes_are_listed_once_while_a_lease_is_held_and_anew_afterwards(guest):
    held = types.SimpleNamespace(held=True)
    memory = FileMemory(str(guest("amd64-6.1-4level").image), immutable=True)
    layer = LinuxLayer.open(Base(memory, live=True, lease=held), {})
    first = layer._list()
    assert layer._list() is first
    assert next(layer.processes()).record is next(layer.processes()).record
    held.held = False
    assert layer._list() is not first
    assert layer._list().keys() == first.keys()
