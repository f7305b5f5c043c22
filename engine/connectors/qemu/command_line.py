"""What QEMU's command line says of a guest: its name, machine, RAM, monitors.

libvirt writes `-name guest=NAME,debug-threads=on`, `-m size=2097152k,slots=16,maxmem=…` and objects as JSON; people
write `-m 2G -machine q35`. What a configuration file (-readconfig) says is not seen here: QEMU's monitor knows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Literal

from engine.connectors.qemu.words import is_on, options, pairs, size_of
from engine.records import dataclass

EMULATOR = re.compile(r"\.?qemu-system-([a-z0-9_]+)(?:-[a-z0-9_-]+)?|qemu-kvm|kvm")
"""Names of QEMU's executable: `qemu-system-x86_64`, as some distributions wrap it, and those that mean this machine."""
DEFAULT_SIZE = 128 << 20
"""QEMU's -m where there is none (hw/core/machine.c, default_ram_size)."""
DEFAULT_MACHINES = {"x86_64": "pc", "i386": "pc"}
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


@dataclass(frozen=True, slots=True)
class Address:
    """Where a monitor (QMP) listens."""

    kind: Literal["unix", "tcp", "elsewhere"]
    """`elsewhere`: on a descriptor that was handed over, a terminal, or nothing that one can connect to."""
    path: str = ""
    abstract: bool = False
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.kind == "tcp":
            return f"{self.host}:{self.port}"
        return ("@" if self.abstract else "") + self.path if self.kind == "unix" else "a descriptor of its manager"


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
    plugged: bool = False
    """Whether there are memory devices (pc-dimm, virtio-mem) beside its RAM."""

    @property
    def family(self) -> str:
        """The machine without its version: pc, q35, microvm, virt."""
        name = re.sub(r"^pc-(i440fx|q35)\b.*", lambda match: {"i440fx": "pc", "q35": "q35"}[match[1]], self.machine)
        return re.sub(r"-(?:[0-9]+\.[0-9]+|rhel[0-9.]+|[a-z]+-[0-9.]+)$", "", name)

    @property
    def translates(self) -> bool:
        """Whether the guest's code is translated (TCG), not run by the processor."""
        return self.accelerators[:1] in ((), ("tcg",))


def emulator(executable: str | None, arguments: Sequence[str]) -> re.Match[str] | None:
    """The name of QEMU's executable, as what is run or as it was called; None of other programs."""
    for path in (executable, arguments[0] if arguments else None):
        if path and (found := EMULATOR.fullmatch(os.path.basename(path))):
            return found
    return None


def parse(executable: str | None, arguments: Sequence[str]) -> CommandLine | None:
    """Read the command line of a process; None where it is not QEMU's."""
    called = emulator(executable, arguments)
    if called is None:
        return None
    given: dict[str, list[str]] = {}
    for option, value in options(arguments):
        given.setdefault({"M": "machine", "qmp-pretty": "qmp"}.get(option, option), []).append(value)
    if "enable-kvm" in given:
        given["accel"] = ["kvm"]
    machine = _machine(given)
    objects = [pairs(value, "qom-type") for value in given.get("object", [])]
    kind = machine.get("type") or DEFAULT_MACHINES.get(called[1] or "", "")
    path = given.get("mem-path", [""])[-1]
    return CommandLine(
        architecture=called[1],
        name=_name(given),
        uuid=given.get("uuid", [None])[-1],
        machine=kind,
        machine_options=machine,
        size=_size(given),
        backends=_backends(given, machine, objects),
        path=path,
        monitors=tuple(_monitors(given)),
        accelerators=_accelerators(given, machine, called[0]),
        encryption=_encryption(machine, objects),
        plugged=any(pairs(value, "driver").get("memdev") for value in given.get("device", [])),
    )


def _machine(given: Mapping[str, Sequence[str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in given.get("machine", []):
        found.update(pairs(value, "type"))
    return found


def _name(given: Mapping[str, Sequence[str]]) -> str | None:
    found: dict[str, str] = {}
    for value in given.get("name", []):
        found.update(pairs(value, "guest"))
    return found.get("guest") or None


def _size(given: Mapping[str, Sequence[str]]) -> int:
    found: dict[str, str] = {}
    for value in given.get("m", []):
        found.update(pairs(value, "size"))
    size = size_of(found.get("size"), "m")
    return -(-size // 8192) * 8192 if size else DEFAULT_SIZE  # as QEMU rounds it (hw/core/machine.c)


def _backends(
    given: Mapping[str, Sequence[str]], machine: Mapping[str, str], objects: Sequence[Mapping[str, str]]
) -> tuple[Backend, ...]:
    known: dict[str, Backend] = {}
    for one in objects:
        kind, name = one.get("qom-type", ""), one.get("id", "")
        if kind.startswith("memory-backend-") and name:
            share = is_on(one.get("share", "on" if kind.endswith("-memfd") else "off"))
            kind = kind.removeprefix("memory-backend-")
            known[name] = Backend(name, kind, size_of(one.get("size")), one.get("mem-path", ""), share)
    wanted = machine.get("memory-backend")
    names = [wanted] if wanted else _of_nodes(given)
    return tuple(known[name] for name in names if name in known) if set(names) <= known.keys() else ()


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
    devices = {one.get("id", ""): one for one in (pairs(value, "backend") for value in given.get("chardev", []))}
    found = []
    for value in given.get("qmp", []):
        name = value.removeprefix("chardev:") if value.startswith("chardev:") else None
        found.append(_old_address(value) if name is None else _address(devices.get(name, {})))
    for value in given.get("mon", []):
        one = pairs(value, "chardev")
        if one.get("mode") == "control":
            found.append(_address(devices.get(one.get("chardev", ""), {})))
    return found


def _address(device: Mapping[str, str]) -> Address:
    """Of a -chardev. One that does not listen (server=off) has its client already."""
    if device.get("backend") == "socket" and is_on(device.get("server")):
        if device.get("path"):
            return Address("unix", device["path"], is_on(device.get("abstract")))
        port = device.get("port", "")
        if port.isdecimal() and 0 < int(port[:6]) < 1 << 16:
            return Address("tcp", host=device.get("host") or "localhost", port=int(port))
    return Address("elsewhere")


def _old_address(text: str) -> Address:
    """As -qmp has it: unix:PATH,server=on or tcp:HOST:PORT,server=on; both may have `wait` and more."""
    kind, _, rest = text.partition(":")
    words = pairs(rest, "address")
    place = words.get("address", "")
    if kind == "unix" and place and is_on(words.get("server")):
        return Address("unix", place, is_on(words.get("abstract")))
    host, _, port = place.rpartition(":")
    if kind in ("tcp", "telnet") and is_on(words.get("server")) and port.isdecimal() and 0 < int(port[:6]) < 1 << 16:
        return Address("tcp", host=host.strip("[]") or "localhost", port=int(port))
    return Address("elsewhere")
