"""What QEMU's monitor prints: the flat view of its memory, host addresses, registers, whether the machine runs.

`info mtree -f` prints one FlatView per address space; the one of "memory" (root: system) is physical memory:

    FlatView #3
     AS "memory", root: system
     Root memory region: system
      0000000000000000-00000000000c2fff (prio 0, ram): pc.ram
      00000000000c3000-00000000000e7fff (prio 0, rom): pc.ram @00000000000c3000 KVM

`rom` of a block that is RAM elsewhere is RAM that the guest cannot write at the moment (shadows of a PC's BIOS);
`nv-ram` is RAM of an nvdimm; `ramd` is the memory of a device that was passed through; `@` is left out where the
offset is 0; the address behind the dash belongs to the line (softmmu/memory.c, mtree_print_flatview).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from engine.records import dataclass

_LINE = re.compile(
    r"^ +([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (\w[^)]*)\): (.*?)(?: @([0-9a-f]{16}))?(?: [A-Z]{2,8})?$",
    re.MULTILINE,
)
_PHYSICAL = re.compile(r'AS "[^"\n]*", root: system$', re.MULTILINE)
_HOST = re.compile(r"^Host virtual address for 0x[0-9a-f]+ \((.*)\) is 0x([0-9a-f]+)", re.MULTILINE)
_MAIN = re.compile(r"(?:.*[.])?ram")
"""Names that machines give their RAM: pc.ram, mach-virt.ram, riscv_virt_board.ram; not vga.vram."""
VIEWS_MOST = 4096
LINES_MOST = 1 << 16


@dataclass(frozen=True, slots=True)
class View:
    """One line: `size` bytes at a physical address are those from `offset` on of a block."""

    address: int
    size: int
    block: str
    offset: int


def ram_views(text: str, backends: Collection[str]) -> list[View]:
    """The RAM in the output of `info mtree -f`, ascending; `backends` names memory backends.

    Where no block has such a name it is the largest one.
    """
    for part in re.split(r"(?m)^FlatView #\d+", text, maxsplit=VIEWS_MOST):
        if _PHYSICAL.search(part):
            found = list(_views(part))
            writable = {view.block for view, kind in found if kind != "rom"}
            main = {block for block in writable if _name(block) in backends or _MAIN.fullmatch(block)}
            if not main and writable:
                sizes = {block: sum(view.size for view, _ in found if view.block == block) for block in writable}
                main = {max(sizes, key=lambda block: sizes[block])}
            return sorted((view for view, _ in found if view.block in main), key=lambda view: view.address)
    return []


def _views(part: str) -> Iterator[tuple[View, str]]:
    for number, match in enumerate(_LINE.finditer(part)):
        first, last, kind, block, offset = match.groups()
        start, stop = int(first, 16), int(last, 16) + 1
        if number < LINES_MOST and kind in ("ram", "rom", "nv-ram") and stop > start:
            yield View(start, stop - start, block, int(offset or "0", 16)), kind


def _name(block: str) -> str:
    """A backend's name, which stands with its path in machines of QEMU 4.0 and before."""
    return block.removeprefix("/objects/")


def memory_devices(text: str) -> frozenset[str]:
    """The names of the backends of devices (pc-dimm, virtio-mem) in the output of `info memory-devices`."""
    return frozenset(_name(path) for path in re.findall(r"(?m)^ +memdev: (.+)$", text))


def memory_backends(text: str) -> frozenset[str]:
    """The names of memory backends in the output of `info memdev`."""
    return frozenset(re.findall(r"(?m)^memory backend: (.+)$", text))


def host_address(text: str) -> int | None:
    """The address in QEMU's process that `gpa2hva` tells; None where it tells none."""
    found = _HOST.search(text)
    return None if found is None else int(found[2], 16)


_REGISTER = re.compile(r"\b([A-Za-z][A-Za-z0-9_]{1,15})\s*=\s*([0-9a-f]{4,16})\b")
_X86 = ("CR0", "CR2", "CR3", "CR4", "EFER", "RIP", "EIP", "RSP", "ESP")
_OTHERS = ("PC", "SP")
_SATP = re.compile(r"(?m)^ satp +([0-9a-f]{8,16})$")


def registers(text: str) -> list[Mapping[str, int]]:
    """For each processor of `info registers -a` what tells how it translates, and where it stands."""
    found: list[Mapping[str, int]] = []
    for part in re.split(r"(?m)^CPU#\d+", text)[1:VIEWS_MOST]:
        values: dict[str, int] = {}
        for name, value in _REGISTER.findall(part):
            if name in _X86 or name in _OTHERS:
                values.setdefault(name.upper(), int(value, 16))
        if (table := _SATP.search(part)) is not None:
            values["SATP"] = int(table[1], 16)
        found.append(values)
    return found


_STATUS = re.compile(r"(?m)^VM status: (\w+)(?: \(single step mode\))?(?: \(([\w-]+)\))?")


def status(text: str) -> str | None:
    """The run state in the output of `info status`, as QMP names it: running, postmigrate …; None where none is told.

    The monitor prints a state in parentheses that is neither running nor paused (monitor/hmp-cmds.c, hmp_info_status).
    """
    found = _STATUS.search(text)
    return None if found is None else found[2] or found[1]
