"""State files of VMware (.vmss of a suspended machine, .vmsn of a snapshot): where its memory lies, its registers.

    magic u32 · version u32 · count u32 · groups: name [64], offset u64, size u64
    tag: a byte (value's size: 6 bits, count of indices: 2 bits), length of the name u8, name, indices u32 …, value
    a value of size 63 (62: compressed) is a block: bytes in the file, bytes in memory (u64 each), padding u16, data

Written after descriptions by others and never tried on a file that VMware itself has written: none was to be had.

Sources (facts): the crash utility's vmware_vmss.h and vmware_vmss.c (2018), Volatility 3's layers/vmware.py (2019).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from engine.errors import BadDataError, FaultError, NotRecognisedError
from engine.memory import Memory
from engine.records import dataclass

MAGICS = tuple(
    bytes.fromhex(text) for text in ("d0bed0be", "d0bed2be", "d2bed2be", "d3bed3be", "d1bad1ba", "d2bad2ba")
)
"""0xbed0bed0, 0xbed2bed0 (both with sizes of 32 bits), 0xbed2bed2, 0xbed3bed3 (partial), 0xbad1bad1 (restored), …"""
_NARROW = MAGICS[:2]
_HEADER = struct.Struct("<4sII")
_GROUP = struct.Struct("<64sQQ")
_GROUP_LIMIT = 1024
_TAG_LIMIT = 1 << 16
_COMPRESSED, _BLOCK = 62, 63
PAGE = 4096
REGION_LIMIT = 1024
CPU_LIMIT = 1 << 12

Key = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Block:
    """A long value: `stored` bytes at `offset` of the file, for `size` bytes of memory."""

    offset: int
    stored: int
    size: int
    compressed: bool


@dataclass(frozen=True, slots=True)
class Region:
    """`length` bytes of physical memory at `start`, which lie at `offset` of the memory's file."""

    start: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class MachineState:
    """What a state file says."""

    regions: tuple[Region, ...]
    """Empty: memory is one range from address 0."""
    memory: Block | None
    """Where memory lies in the state file itself; None: in a .vmem beside it."""
    registers: tuple[Mapping[str, int], ...]
    """For each CPU, what is known."""
    notes: tuple[str, ...] = ()


def is_state(head: bytes) -> bool:
    """Whether a file that begins so is one."""
    return head[:4] in MAGICS


def read_state(file: Memory) -> MachineState:
    """Read a state file. Raises NotRecognisedError where it is none, or has no sound description of memory."""
    try:
        magic, _, count = _HEADER.unpack(file.read(0, _HEADER.size))
        if magic not in MAGICS:
            raise NotRecognisedError("it does not begin as a state file of VMware")
        if count > _GROUP_LIMIT:
            raise NotRecognisedError(f"it is damaged: it claims {count} groups")
        table = file.read(_HEADER.size, count * _GROUP.size)
    except FaultError:
        raise NotRecognisedError("it is cut off: its table of groups is not whole") from None
    groups = {name.split(b"\0", 1)[0]: offset for name, offset, _ in _GROUP.iter_unpack(table)}
    if b"memory" not in groups:
        raise NotRecognisedError("it says nothing of memory")
    notes: list[str] = []
    wide = magic not in _NARROW
    memory = _tags(file, groups[b"memory"], wide, "memory", notes)
    cpu = _tags(file, groups[b"cpu"], wide, "cpu", notes) if b"cpu" in groups else {}
    block = memory.get(("Memory", (0, 0))) or memory.get(("Memory", (0,))) or memory.get(("Memory", ()))
    inside = block if isinstance(block, Block) else None
    return MachineState(_regions(memory), inside, tuple(_registers(file, cpu)), tuple(notes))


def _tags(file: Memory, offset: int, wide: bool, group: str, notes: list[str]) -> dict[Key, int | Block]:
    """The values of a group, by name and indices; up to where it is damaged."""
    found: dict[Key, int | Block] = {}
    try:
        for key, value in _walk(file, offset, wide):
            found.setdefault(key, value)
    except FaultError as error:
        notes.append(f"the group {group} of the state file is damaged at its offset {error.address:#x}")
    return found


def _walk(file: Memory, at: int, wide: bool) -> Iterator[tuple[Key, int | Block]]:
    sizes = struct.Struct("<QQH" if wide else "<IIH")
    for _ in range(_TAG_LIMIT):
        kind, length = file.read(at, 2)
        if not kind and not length:
            return
        count, size = kind >> 6, kind & 0x3F
        body = file.read(at + 2, length + 4 * count)
        key = body[:length].decode("ascii", "replace"), struct.unpack_from(f"<{count}I", body, length)
        at += 2 + len(body)
        if size >= _COMPRESSED:
            stored, in_memory, padding = sizes.unpack(file.read(at, sizes.size))
            data = at + sizes.size + padding
            yield key, Block(data, stored, in_memory, size == _COMPRESSED)
            at = data + stored
        else:
            yield key, int.from_bytes(file.read(at, size), "little")
            at += size
    raise BadDataError(at, detail="it has too many tags")


def _regions(tags: Mapping[Key, int | Block]) -> tuple[Region, ...]:
    count = tags.get(("regionsCount", ()), 0)
    if not isinstance(count, int) or not count:
        return ()
    if count > REGION_LIMIT:
        raise NotRecognisedError(f"it is damaged: it claims {count} regions of memory")
    found = []
    for index in range(count):
        frame, page, pages = (tags.get((name, (index,))) for name in ("regionPPN", "regionPageNum", "regionSize"))
        if not (isinstance(frame, int) and isinstance(page, int) and isinstance(pages, int)):
            raise NotRecognisedError(f"it is damaged: it does not say where region {index} of {count} lies")
        if pages:
            found.append(Region(frame * PAGE, page * PAGE, pages * PAGE))
    return tuple(found)


def _registers(file: Memory, tags: Mapping[Key, int | Block]) -> Iterator[Mapping[str, int]]:
    """Control registers and the like of each CPU, named as the manuals do, in small letters."""
    cpus: dict[int, dict[str, int]] = {}
    for (name, indices), value in tags.items():
        if not indices or indices[0] >= CPU_LIMIT:
            continue
        of_cpu = cpus.setdefault(indices[0], {})
        if name == "CR64" and len(indices) == 2 and isinstance(value, int):
            of_cpu[f"cr{indices[1]}"] = value
        elif name == "CR64" and isinstance(value, Block):
            of_cpu.update(_control_registers(file, value))
        elif name in ("rip", "rax", "rsp") and isinstance(value, int):
            of_cpu[name] = value
    for _, registers in sorted(cpus.items()):
        if registers:
            yield registers


def _control_registers(file: Memory, block: Block) -> dict[str, int]:
    """CR0 to CR4, the first five words of the block."""
    try:
        words = struct.unpack("<5Q", file.read(block.offset, 40)) if block.stored >= 40 and not block.compressed else ()
    except FaultError:
        words = ()
    return {f"cr{number}": word for number, word in enumerate(words)}
