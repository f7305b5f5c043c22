"""What VMCOREINFO would say of a kernel that was found without it: put together from its types, symbols and content.

The log of printk is the one thing that is read by VMCOREINFO alone. Its offsets stand in the kernel's types; where
there are none, or no symbol tells where the ring is, the ring is found by its shape:

    count_bits · descs · infos · head_id · tail_id · [last_finalized_seq] · size_bits · data · head_lpos · tail_lpos

with head and tail not more than the count apart, and a descriptor at the head whose state names it.

Source: Linux kernel/printk/printk_ringbuffer.h, 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import EngineError, NotFoundError
from engine.formats.search import chunks
from engine.formats.vmcoreinfo import Vmcoreinfo
from engine.memory import Memory
from engine.oslayers.linux.finding import Found
from engine.oslayers.linux.profile import Profile
from engine.records import dataclass

MEMBERS = {
    "printk_ringbuffer": ("desc_ring", "text_data_ring"),
    "prb_desc_ring": ("count_bits", "descs", "infos", "head_id", "tail_id"),
    "prb_desc": ("state_var", "text_blk_lpos"),
    "prb_data_blk_lpos": ("begin", "next"),
    "prb_data_ring": ("size_bits", "data"),
    "printk_info": ("seq", "ts_nsec", "text_len", "caller_id"),
}
"""What the log is read by."""
COUNT_BITS, SIZE_BITS = (5, 22), (10, 28)
"""Log2 of descriptors and of bytes that a ring may have."""
INFO_SIZES = range(24, 257, 8)
"""Sizes that `struct printk_info` may have: 88 up to 6.18, more in later releases."""
RING_WORDS = 12
RING_LIMIT = 64
CONSECUTIVE = 8
"""Records whose numbers must follow one another."""


def with_description(profile: Profile) -> Found:
    """The profile's kernel, its text completed where it was found without VMCOREINFO."""
    found = profile.found
    if not found.unaided:
        return found
    profile.notes.append("found without VMCOREINFO: by its names, its symbols and its page tables")
    lines = dict(found.vmcoreinfo.values)
    prb = found.vmcoreinfo.symbol("prb") or profile.symbol("prb")
    try:
        told = _by_types(profile) if prb is not None else {}
        if prb is None or not told:
            ring = _newest(found, profile.word)
            told, prb = told or ring.offsets, ring.pointer
        lines |= told
        lines["SYMBOL(prb)"] = f"{prb:x}"
    except NotFoundError as error:
        profile.notes.append(f"no log: {error}")
    text = "".join(f"{key}={value}\n" for key, value in lines.items())
    return replace(found, vmcoreinfo=Vmcoreinfo.parse(text.encode()))


def _by_types(profile: Profile) -> dict[str, str]:
    """The lines that the kernel's types give; none where one is missing."""
    lines: dict[str, str] = {}
    for name, members in MEMBERS.items():
        layout = profile.types.struct(name) if profile.types is not None else None
        if layout is None or any(member not in layout for member in members):
            return {}
        lines[f"SIZE({name})"] = str(layout.size)
        lines |= {f"OFFSET({name}.{member})": str(layout[member].offset) for member in members}
    return lines


@dataclass(frozen=True, slots=True)
class _Ring:
    """A ring of printk as it was found."""

    pointer: int
    """The address of a word that holds the ring's."""
    newest: int
    """The number of its last record."""
    offsets: dict[str, str]


def _newest(found: Found, word: int) -> _Ring:
    """The ring with the youngest record: the one at boot is left when a larger one is made.

    Raises NotFoundError.
    """
    image = found.memory.window(found.image.start, found.image.size)
    rings: dict[int, tuple[int, dict[str, str]]] = {}
    for address, words, gap in _shapes(image, found, word):
        newest = _checked(found.memory, words, word, gap)
        if newest is not None:
            rings[address] = newest
        if len(rings) == RING_LIMIT:
            break
    pointers = _pointers(image, list(rings), word)
    base = found.image.start
    known = [_Ring(base + pointers[address], *ring) for address, ring in rings.items() if address in pointers]
    if not known:
        raise NotFoundError("no ring of printk lies in the kernel's image")
    return max(known, key=lambda ring: ring.newest)


def _shapes(image: Memory, found: Found, word: int) -> Iterator[tuple[int, list[int], int]]:
    """(address, words, in which word the ring of text begins) of what looks like a ring."""
    least = found.candidate.kernel_start
    for address, data, size, fresh in chunks(image, 0, None, RING_WORDS * word):
        words = np.frombuffer(data, f"<u{word}", size // word)
        count = len(words) - RING_WORDS
        if count <= 0:
            continue
        good = _between(words[:count], COUNT_BITS)
        good &= (words[1 : count + 1] >= least) & (words[2 : count + 2] >= least)
        for row in np.flatnonzero(good)[: 1 << 14].tolist():
            values: list[int] = words[row : row + RING_WORDS].tolist()
            bits = values[0] & 0xFFFF_FFFF
            distance = (values[3] - values[4]) % (1 << 8 * word - 2)
            if distance >= 1 << bits or row * word >= fresh:
                continue
            for gap in (5, 6):
                if SIZE_BITS[0] <= values[gap] & 0xFFFF_FFFF <= SIZE_BITS[1] and values[gap + 1] >= least:
                    yield found.image.start + address + row * word, values, gap


def _between(words: npt.NDArray[Any], bounds: tuple[int, int]) -> npt.NDArray[np.bool_]:
    low = words & words.dtype.type(0xFFFF_FFFF)
    found: npt.NDArray[np.bool_] = (low >= bounds[0]) & (low <= bounds[1])
    return found


def _checked(memory: Memory, words: list[int], word: int, gap: int) -> tuple[int, dict[str, str]] | None:
    """The number of the last record, and the lines that tell of the ring; None where it is none."""
    bits, descriptors, infos, head = words[0] & 0xFFFF_FFFF, words[1], words[2], words[3]
    mask, id_mask = (1 << bits) - 1, (1 << 8 * word - 2) - 1
    try:
        state = int.from_bytes(memory.read(descriptors + (head & mask) * 3 * word, word), "little")
        if state & id_mask != head & id_mask:
            return None
        for size in INFO_SIZES:
            numbers = [memory.u64(infos + (head - back & mask) * size) for back in range(1, CONSECUTIVE)]
            if numbers == list(range(numbers[0], numbers[0] - len(numbers), -1)) and numbers[-1] >= 0 < numbers[0]:
                return numbers[0], _lines(word, gap, size)
    except EngineError:
        return None
    return None


def _lines(word: int, gap: int, info_size: int) -> dict[str, str]:
    offsets = {
        "printk_ringbuffer": (0, gap * word), "prb_desc_ring": tuple(range(0, 5 * word, word)),
        "prb_desc": (0, word), "prb_data_blk_lpos": (0, word), "prb_data_ring": (0, word),
        "printk_info": (0, 8, 16, 20),
    }  # fmt: skip
    lines = {
        f"OFFSET({name}.{member})": str(offset)
        for name, members in MEMBERS.items()
        for member, offset in zip(members, offsets[name], strict=True)
    }
    return lines | {"SIZE(prb_desc)": str(3 * word), "SIZE(printk_info)": str(info_size)}


def _pointers(image: Memory, targets: list[int], word: int) -> dict[int, int]:
    """Where in the image a word holds one of the targets, of each the first."""
    found: dict[int, int] = {}
    if not targets:
        return found
    wanted = np.array(targets, f"<u{word}")
    for address, data, size, _ in chunks(image, 0, None, word):
        words = np.frombuffer(data, f"<u{word}", size // word)
        for row in np.flatnonzero(np.isin(words, wanted)).tolist():
            found.setdefault(int(words[row]), address + row * word)
    return found
