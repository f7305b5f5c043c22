"""The processors' registers as a stub describes them (target.xml), and what they say of the target.

Source: «Debugging with GDB», appendix «Target Descriptions» (GDB 13).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from xml.etree.ElementTree import Element

from engine.connectors.gdb.documents import parsed
from engine.connectors.gdb.wire import Wire
from engine.records import dataclass

DOCUMENT_MOST = 1 << 20
DOCUMENTS_MOST = 64
REGISTERS_MOST = 4096
PROCESSORS_MOST = 1024
WANTED = ("cr0", "cr3", "cr4", "efer", "ttbr0_el1", "ttbr1_el1", "tcr_el1", "ttbr0", "ttbr1", "ttbcr", "satp")
"""What translation hangs on, asked for by number where it does not come with the general registers."""
_BIG = ("powerpc", "s390", "m68k", "sparc", "mips")


@dataclass(frozen=True, slots=True)
class Register:
    """One register of the description: its number, and bytes in the answer to `g`."""

    name: str
    number: int
    size: int


@dataclass(frozen=True, slots=True)
class Description:
    """What target.xml says."""

    architecture: str | None
    registers: tuple[Register, ...]


def describe(wire: Wire) -> Description:
    """The stub's description of its target; an empty one where it has none, or none that can be read."""
    nodes = list(_nodes(wire, "target.xml", [0]))
    architecture = next((node.text.strip() for node in nodes if node.tag == "architecture" and node.text), None)
    registers: list[Register] = []
    number = 0
    for node in nodes:
        if node.tag == "reg" and len(registers) < REGISTERS_MOST:
            try:
                number = int(node.get("regnum", number))
                size = int(node.get("bitsize", 0)) // 8
            except ValueError:
                continue
            registers.append(Register(node.get("name", "").lower(), number, size))
            number += 1
    return Description(architecture, tuple(registers))


def _nodes(wire: Wire, name: str, seen: list[int]) -> Iterator[Element]:
    """All elements of a document in their order, those of included ones where they are included."""
    seen[0] += 1
    text = wire.document("features", name, DOCUMENT_MOST) if seen[0] <= DOCUMENTS_MOST else None
    if not text:
        return
    root = parsed(text)
    for node in () if root is None else root.iter():
        if node.tag == "include":
            yield from _nodes(wire, node.get("href", ""), seen)
        else:
            yield node


def read_registers(wire: Wire, description: Description) -> list[Mapping[str, int]]:
    """The registers of each processor; one that a stub does not tell is left out."""
    order = "big" if (description.architecture or "").startswith(_BIG) else "little"
    found = []
    for thread in _threads(wire):
        if thread and wire.ask(b"Hg" + thread) != b"OK":
            continue
        found.append(_of_one(wire, description, order == "big"))
    return found


def _of_one(wire: Wire, description: Description, big: bool) -> Mapping[str, int]:
    values: dict[str, int] = {}
    block, at = wire.ask(b"g"), 0
    for register in sorted(description.registers, key=lambda register: register.number):
        part = block[2 * at : 2 * (at + register.size)]
        at += register.size
        if len(part) < 2 * register.size and register.name in WANTED:
            part = wire.ask(b"p%x" % register.number)
        value = _number(part, big)
        if value is not None and register.name and register.size and len(part) == 2 * register.size:
            values.setdefault(register.name, value)
    return values


def _number(text: bytes, big: bool) -> int | None:
    try:
        return int.from_bytes(bytes.fromhex(text.decode("ascii")), "big" if big else "little")
    except ValueError:
        return None  # x marks what is not available


def _threads(wire: Wire) -> list[bytes]:
    """The stub's names of its processors; one without a name where it has none."""
    names: list[bytes] = []
    question = b"qfThreadInfo"
    while len(names) < PROCESSORS_MOST:
        reply = wire.ask(question)
        if reply[:1] != b"m":
            break
        names += reply[1:].split(b",")
        question = b"qsThreadInfo"
    return names[:PROCESSORS_MOST] or [b""]
