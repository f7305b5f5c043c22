"""What QEMU's command line says of a guest: its name, machine, RAM, monitors.

libvirt writes `-name guest=NAME,debug-threads=on`, `-m size=2097152k,slots=16,maxmem=…` and objects as JSON; people
write `-m 2G -machine q35`. Files for -readconfig are taken in where they can be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from typing import Literal

from engine.connectors.qemu.emulators import Called, called
from engine.connectors.qemu.words import is_on, options, pairs, sections, size_of
from engine.records import dataclass

DEFAULT_SIZE = 128 << 20
"""QEMU's -m where there is none (hw/core/machine.c, default_ram_size)."""
DEFAULT_SIZES = {
    "ppc64 pseries": 512 << 20, "ppc64 powernv": 1 << 30, "aarch64 sbsa-ref": 1 << 30, "arm raspi2b": 1 << 30,
    "aarch64 raspi2b": 1 << 30, "aarch64 raspi3b": 1 << 30, "aarch64 raspi4b": 2 << 30, "loongarch64 virt": 1 << 30,
}  # fmt: skip
"""The same of machines that have one of their own (default_ram_size in hw/arm, hw/ppc, hw/loongarch)."""
DEFAULT_MACHINES = {
    "x86_64": "pc", "i386": "pc", "ppc64": "pseries", "s390x": "s390-ccw-virtio", "riscv64": "spike",
    "riscv32": "spike", "loongarch64": "virt",
}  # fmt: skip
"""What runs where no machine is named; other architectures have no default, or one of an old board."""
ENCRYPTED = {
    "sev-guest": "SEV", "sev-snp-guest": "SEV-SNP", "tdx-guest": "TDX", "s390-pv-guest": "Protected Virtualization",
    "pef-guest": "PEF", "rme-guest": "CCA",
}  # fmt: skip
"""Objects that make a machine's memory unreadable for its host (qapi/qom.json)."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A memory-backend object."""

    name: str
    kind: Literal["ram", "file", "memfd", "epc", "shm"] | str
    size: int | None
    path: str = ""
    share: bool = False
    number: int = 0
    """Its place among the objects: in that order QEMU makes them."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a monitor listens."""

    kind: Literal["unix", "tcp", "elsewhere"]
    """`elsewhere`: on a descriptor that was handed over, a terminal, or nothing that one can connect to."""
    path: str = ""
    abstract: bool = False
    host: str = ""
    port: int = 0
    human: bool = False
    """Whether it is the monitor for people, no QMP."""
    waits: bool = field(default=False, compare=False)
    """Whether QEMU does not start before somebody has connected (wait=on, which is the default)."""

    def __str__(self) -> str:
        if self.kind == "tcp":
            return f"{self.host}:{self.port}"
        return ("@" if self.abstract else "") + self.path if self.kind == "unix" else "a descriptor of its manager"


@dataclass(frozen=True, slots=True)
class Device:
    """A device that brings a guest memory beside its RAM, or shows it that of others."""

    driver: str
    backend: Backend
    address: int | None
    label: int
    """Bytes at the end of its backend that are no memory of the guest (of an nvdimm)."""

    @property
    def plugged(self) -> bool:
        """Whether it is RAM of the guest: pc-dimm, nvdimm, virtio-mem; not what programs share (ivshmem)."""
        return self.driver in ("pc-dimm", "nvdimm") or self.driver.startswith(("virtio-mem", "virtio-pmem"))


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A guest as its command line describes it."""

    architecture: str | None
    """As in the emulator's name: x86_64, aarch64; None where the name tells none (`kvm`)."""
    name: str | None = None
    uuid: str | None = None
    machine: str = ""
    machine_options: Mapping[str, str] = field(default_factory=dict, hash=False)
    size: int = DEFAULT_SIZE
    """Bytes of RAM without what was plugged in."""
    backends: tuple[Backend, ...] = ()
    """Those that RAM is made of, in the order of their addresses; empty where QEMU makes it by itself."""
    path: str = ""
    """Of -mem-path."""
    monitors: tuple[Address, ...] = ()
    accelerators: tuple[str, ...] = ()
    encryption: str | None = None
    """What encrypts the guest's memory."""
    devices: tuple[Device, ...] = ()
    """Those that have memory of their own, in their order."""
    others: frozenset[str] = frozenset()
    """Names of memory backends that are no RAM of the guest."""
    most: int = 0
    """Bytes up to which memory can be plugged in (maxmem); 0 where none can."""
    unread: str = ""
    """A file for -readconfig that could not be read."""

    @property
    def plugged(self) -> tuple[Device, ...]:
        """Memory that is plugged in beside RAM from the start."""
        return tuple(device for device in self.devices if device.plugged)

    @property
    def family(self) -> str:
        """The machine without its version: pc, q35, microvm, virt."""
        return family_of(self.machine)

    @property
    def holds_nothing(self) -> bool:
        """Whether the guest's memory is not in QEMU's process, which gives a domain of Xen no more than its devices."""
        return self.family.startswith(("xenfv", "xenpv", "xenpvh")) or self.accelerators[:1] == ("xen",)

    @property
    def translates(self) -> bool:
        """Whether the guest's code is translated (TCG), not run by the processor."""
        return self.accelerators[:1] in ((), ("tcg",))


_FAMILIES = re.compile(r"(pc-i440fx|pc-q35|pc|q35|virt|pseries|s390-ccw-virtio|powernv)(?:[-+][^,]*|[0-9]+)?")
"""Machines that come in versions: of QEMU's own or of a distribution (pc-q35-rhel9.2.0, q35+pve0, virt-jammy)."""
_ALIASES = {"pc-i440fx": "pc", "pc-q35": "q35", "ubuntu": "pc", "ubuntu-q35": "q35"}


def family_of(machine: str) -> str:
    """A machine's type without its version."""
    versioned = _FAMILIES.fullmatch(machine)
    name = versioned[1] if versioned else machine
    return _ALIASES.get(name, name)


Configuration = Callable[[str], "str | None"]
"""Gives the text of a file for -readconfig, or None where it cannot be had."""


def parse(
    executable: str | None, arguments: Sequence[str], architecture: str | None = None,
    configuration: Configuration | None = None,
) -> CommandLine | None:
    """Read the command line of a process; None where it is not QEMU's.

    `architecture` is that of the process: of its guest too, where the emulator's name says no other.
    """
    found = called(executable, arguments)
    return None if found is None else read_line(found, architecture, configuration)


def read_line(
    found: Called, architecture: str | None = None, configuration: Configuration | None = None
) -> CommandLine:
    """The command line of a QEMU that was called so."""
    given: dict[str, list[str]] = {}
    unread = ""
    for option, value in _all_options(found.arguments, configuration):
        if option == "readconfig":
            unread = value
        given.setdefault({"M": "machine", "qmp-pretty": "qmp"}.get(option, option), []).append(value)
    if "enable-kvm" in given:
        given["accel"] = ["kvm"]
    for value in given.get("set", []):
        _set(given, value)
    machine = _merged(given, "machine", "type")
    objects = [pairs(value, "qom-type") for value in given.get("object", [])]
    kind = machine.get("type") or _default_machine(found, architecture)
    known = _backends(objects)
    backends = _of_ram(given, machine, known)
    devices = tuple(_devices(given, known))
    memory = _merged(given, "m", "size")
    return CommandLine(
        architecture=found.architecture,
        name=_merged(given, "name", "guest").get("guest") or None,
        uuid=given.get("uuid", [None])[-1],
        machine=kind,
        machine_options=machine,
        size=_size(memory, machine, backends, f"{found.architecture or architecture} {family_of(kind)}"),
        backends=backends,
        path=given.get("mem-path", [""])[-1],
        monitors=tuple(_monitors(given)),
        accelerators=_accelerators(given, machine, found.name),
        encryption=_encryption(machine, objects),
        devices=devices,
        others=_others(known, devices),
        most=size_of(memory.get("maxmem"), "m") or size_of(machine.get("memory.max-size")) or 0,
        unread=unread,
    )


def _default_machine(found: Called, architecture: str | None) -> str:
    if found.flavour == "microvm":
        return "microvm"
    return DEFAULT_MACHINES.get(found.architecture or architecture or "", "")


def _all_options(arguments: Sequence[str], configuration: Configuration | None) -> Iterator[tuple[str, str]]:
    """Those on the command line and in the files that it names; a file that cannot be read stays as it is."""
    for option, value in options(arguments):
        text = configuration(value) if configuration is not None and option == "readconfig" else None
        if text is None:
            yield option, value
        else:
            yield from sections(text)


def _set(given: Mapping[str, list[str]], text: str) -> None:
    """Do what `-set GROUP.ID.KEY=VALUE` does: a word more for the option of that id."""
    place, _, value = text.partition("=")
    group, _, rest = place.partition(".")
    name, _, key = rest.rpartition(".")
    for index, words in enumerate(given.get(group, [])):
        if not words.startswith("{") and pairs(words).get("id") == name:
            given[group][index] = f"{words},{key}={value.replace(',', ',,')}"


def _merged(given: Mapping[str, Sequence[str]], option: str, first: str) -> dict[str, str]:
    """The words of an option that may stand several times."""
    found: dict[str, str] = {}
    for value in given.get(option, []):
        found.update(pairs(value, first))
    return found


def _size(
    memory: Mapping[str, str], machine: Mapping[str, str], backends: Sequence[Backend], board: str
) -> int:
    text = memory.get("size", "")
    size = size_of(text, "m" if text[-1:].isdigit() else "b") or size_of(machine.get("memory.size"))
    if size:
        return -(-size // 8192) * 8192  # as QEMU rounds it (hw/core/machine.c)
    told = [backend.size for backend in backends if backend.size]
    return sum(told) if told else DEFAULT_SIZES.get(board, DEFAULT_SIZE)


def _backends(objects: Sequence[Mapping[str, str]]) -> dict[str, Backend]:
    known: dict[str, Backend] = {}
    for number, one in enumerate(objects):
        kind, name = one.get("qom-type", ""), one.get("id", "")
        if kind.startswith("memory-backend-") and name:
            share = is_on(one.get("share", "on" if kind.endswith("-memfd") else "off"))
            kind = kind.removeprefix("memory-backend-")
            known[name] = Backend(name, kind, size_of(one.get("size")), one.get("mem-path", ""), share, number)
    return known


def _of_ram(
    given: Mapping[str, Sequence[str]], machine: Mapping[str, str], known: Mapping[str, Backend]
) -> tuple[Backend, ...]:
    wanted = machine.get("memory-backend")
    names = [wanted] if wanted else _of_nodes(given)
    return tuple(known[name] for name in names if name in known) if set(names) <= known.keys() else ()


def _devices(given: Mapping[str, Sequence[str]], known: Mapping[str, Backend]) -> Iterator[Device]:
    for value in given.get("device", []):
        one = pairs(value, "driver")
        backend = known.get(one.get("memdev", ""))
        if backend is not None:
            address = size_of(one.get("memaddr") or one.get("addr"))
            yield Device(one.get("driver", ""), backend, address or None, size_of(one.get("label-size")) or 0)


def _others(known: Mapping[str, Backend], devices: Sequence[Device]) -> frozenset[str]:
    """What is shared with other programs, and enclaves (SGX)."""
    enclaves = {name for name, backend in known.items() if backend.kind == "epc"}
    return frozenset(enclaves | {one.backend.name for one in devices if not one.plugged})


def _of_nodes(given: Mapping[str, Sequence[str]]) -> list[str]:
    """The backends of NUMA nodes, by the nodes' numbers: so RAM is put together (hw/core/numa.c)."""
    nodes: dict[int, str] = {}
    for value in given.get("numa", []):
        one = pairs(value, "type")
        if one.get("type") == "node" and one.get("memdev"):
            number = one.get("nodeid", str(len(nodes)))
            nodes[int(number) if number.isdecimal() and len(number) < 6 else len(nodes)] = one["memdev"]
    return [name for _, name in sorted(nodes.items())]


def _accelerators(given: Mapping[str, Sequence[str]], machine: Mapping[str, str], called: str) -> tuple[str, ...]:
    found = [pairs(value, "accel").get("accel", "") for value in given.get("accel", [])]
    if not found:
        found = machine.get("accel", "").split(":")
    return tuple(filter(None, found)) or (("kvm",) if called.endswith("kvm") else ("tcg",))


def _encryption(machine: Mapping[str, str], objects: Sequence[Mapping[str, str]]) -> str | None:
    wanted = machine.get("confidential-guest-support") or machine.get("memory-encryption")
    for one in objects:
        kind = one.get("qom-type", "")
        if kind in ENCRYPTED and (wanted is None or one.get("id") == wanted):
            return ENCRYPTED[kind]
    return wanted


def _monitors(given: Mapping[str, Sequence[str]]) -> list[Address]:
    """Where QMP listens; behind that where the monitor for people can be connected to."""
    devices = {one.get("id", ""): one for one in (pairs(value, "backend") for value in given.get("chardev", []))}
    found = [_option(value, devices) for value in given.get("qmp", [])]
    human = [_option(value, devices) for value in given.get("monitor", [])]
    for value in given.get("mon", []):
        one = pairs(value, "chardev")
        address = _address(devices.get(one.get("chardev", ""), {}))
        (found if one.get("mode") == "control" else human).append(address)
    return [*found, *(replace(address, human=True) for address in human if address.kind != "elsewhere")]


def _option(value: str, devices: Mapping[str, Mapping[str, str]]) -> Address:
    """What -qmp and -monitor name: a -chardev, or a place of their own."""
    if value.startswith("chardev:"):
        return _address(devices.get(value.removeprefix("chardev:"), {}))
    return _old_address(value)


def _waits(words: Mapping[str, str]) -> bool:
    return is_on(words.get("wait", "on"))


def _address(device: Mapping[str, str]) -> Address:
    """Of a -chardev. One that does not listen (server=off) has its client already."""
    if device.get("backend") == "socket" and is_on(device.get("server")):
        if device.get("path"):
            return Address("unix", device["path"], is_on(device.get("abstract")), waits=_waits(device))
        port = device.get("port", "")
        if port.isdecimal() and 0 < int(port[:6]) < 1 << 16:
            return Address("tcp", host=device.get("host") or "localhost", port=int(port), waits=_waits(device))
    return Address("elsewhere")


def _old_address(text: str) -> Address:
    """As -qmp has it: unix:PATH,server=on or tcp:HOST:PORT,server=on; both may have `wait` and more."""
    kind, _, rest = text.partition(":")
    words = pairs(rest, "address")
    place = words.get("address", "")
    if kind == "unix" and place and is_on(words.get("server")):
        return Address("unix", place, is_on(words.get("abstract")), waits=_waits(words))
    host, _, port = place.rpartition(":")
    if kind in ("tcp", "telnet") and is_on(words.get("server")) and port.isdecimal() and 0 < int(port[:6]) < 1 << 16:
        return Address("tcp", host=host.strip("[]") or "localhost", port=int(port), waits=_waits(words))
    return Address("elsewhere")
