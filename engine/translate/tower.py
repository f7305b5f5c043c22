"""Reads through memories that stand on one another (`engine.floors`), all floors in one call of C.

A word of a process in a guest in a guest takes 25 reads of what lies at the bottom: in Python each of them passes a
dozen objects. `native/towers.c` does the usual case alone, with the same looks afterwards at whether each process in
between is the same still. Whatever is not usual it leaves to the memories' own methods, which say what is wrong.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import struct
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from engine import accelerator
from engine.accelerator import Packed, place
from engine.compiled import NotCompiledError
from engine.errors import EngineError, UnsupportedError
from engine.floors import Answer, Floor, Ground, HasFloor, Ranges, Space, Through, always
from engine.memory import Addresses, Rows
from engine.translate.accelerated import mode_of
from engine.translate.mmu import Root
from engine.translate.rows import rows_of
from engine.types import ADDRESS_SPACE

log = logging.getLogger(__name__)

FLOORS_MOST = 12
"""The most that the C has room for."""
RANGES_MOST = 4096
FLOOR_WORDS = 6
_GROUND, _RANGES, _SPACE = range(3)
_PAGE_SHIFT = mmap.PAGESIZE.bit_length() - 1
_place_of: Callable[..., ctypes.Array[ctypes.c_char]] = (ctypes.c_char * 1).from_buffer
_Words = npt.NDArray[np.uint64]
_Read = Callable[[int], int]
_packed = Packed()
_pack = struct.Struct("@5Q").pack_into
_pack_rows = struct.Struct("@6Q").pack_into
_WORD_AT = 40
"""Where in the packed request a word is put: behind it."""
_words = {1: struct.Struct("=B"), 2: struct.Struct("=H"), 4: struct.Struct("=I"), 8: struct.Struct("=Q")}


@functools.cache
def _library() -> tuple[_Read, _Read] | None:
    """What reads and what gathers: (a packed request) → whether it could; None where there is no compiler."""
    try:
        library = accelerator.opened("towers.c", ctypes.CDLL)
    except (NotCompiledError, OSError) as error:
        log.info("nested memory is read floor by floor: %s", error)
        return None
    library.cloudfs_tower_floor_size.restype = ctypes.c_uint64
    if library.cloudfs_tower_floor_size() != 8 * FLOOR_WORDS:
        raise AssertionError("towers.c and this module disagree about struct floor")
    functions = library.cloudfs_tower_read, library.cloudfs_tower_gather
    for function in functions:
        function.argtypes = [ctypes.c_void_p]
    return functions


def space_on(
    below: object, root: Root, words: Sequence[tuple[int, int, int]] = (), holds: Answer = always
) -> Space | None:
    """A floor of page tables; None where C cannot walk this mode."""
    found = accelerator.library()
    if found is None:
        return None
    try:
        rows = rows_of(root[0])
    except UnsupportedError:
        return None
    mode = mode_of(found, rows)
    return None if mode is None or rows.entry_size > 8 else Space(mode, rows, root[1], below, words, holds)


class Tower:
    """Floors down to the ground. Safe for concurrent readers."""

    __slots__ = ("_at", "_behind", "_count", "_gather", "_keepers", "_read", "deep", "lacks_pieces", "stands")

    def __init__(self, functions: tuple[_Read, _Read], floors: Sequence[Floor], ground: Ground) -> None:
        self._read, self._gather = functions
        self.stands = ground.stands
        """Whether it can be used now."""
        told = (floor.holds for floor in floors if isinstance(floor, (Space, Through)))
        self._behind = [holds for holds in told if holds is not always]
        self.deep = sum(isinstance(floor, Space) for floor in floors) > 1
        """Whether a read goes through more than one tree of page tables."""
        self.lacks_pieces = self.deep or ground.pagemap >= 0
        """Whether this is the only way to it in C: nothing of it is mapped here."""
        self._keepers: list[object] = list(floors)
        rows = [row for floor in floors if not isinstance(floor, Through) for row in self._row(floor)]
        column = np.array(rows, np.uint64)
        self._keepers.append(column)
        self._at, self._count = place(column), len(rows) // FLOOR_WORDS

    def _kept(self, rows: Sequence[tuple[int, int, int]]) -> int:
        """Where a column of rows lies for as long as this lives."""
        column = np.array(rows, np.uint64).reshape(-1)
        self._keepers.append(column)
        return place(column) if len(column) else 0

    def _row(self, floor: Ground | Ranges | Space) -> tuple[int, ...]:
        if isinstance(floor, Ground):
            numbers = floor.descriptor, floor.pagemap % ADDRESS_SPACE, _PAGE_SHIFT, floor.pidfd % ADDRESS_SPACE
            return _GROUND, *numbers, floor.pid
        if isinstance(floor, Ranges):
            return _RANGES, self._kept(floor.rows), len(floor.rows), 0, 0, 0
        return _SPACE, floor.mode, floor.dtb, 0, self._kept(floor.words), len(floor.words)

    def _holds(self) -> bool:
        try:
            for holds in self._behind:
                if not holds():
                    return False
        except EngineError:
            return False
        return True

    def readinto(self, address: int, buffer: memoryview) -> bool:
        """Fill `buffer`; False, and anything in it, where the memory's own method has to be asked."""
        size = len(buffer)
        if not size or not 0 <= address < ADDRESS_SPACE:
            return False
        packed, target = _packed, ctypes.addressof(_place_of(buffer))
        _pack(packed.buffer, 0, self._at, self._count, address, size, target)
        return bool(self._read(packed.address)) and self._holds()

    def gather(self, addresses: Addresses, out: Rows) -> bool:
        """Fill all rows of `out`; False, and anything in it, where the memory's own method has to be asked."""
        count, width = out.shape
        if not count or not width or not out.flags.c_contiguous:
            return False
        addresses, packed = np.ascontiguousarray(addresses), _packed
        _pack_rows(packed.buffer, 0, self._at, self._count, place(addresses), count, width, place(out))
        return bool(self._gather(packed.address)) and self._holds()

    def word(self, address: int, size: int) -> int | None:
        """The word of 1, 2, 4 or 8 bytes; None where the memory's own method has to be asked."""
        if not 0 <= address < ADDRESS_SPACE:
            return None
        packed = _packed
        room, at = packed.buffer, packed.address
        _pack(room, 0, self._at, self._count, address, size, at + _WORD_AT)
        if not self._read(at):
            return None
        word: int = _words[size].unpack_from(room, _WORD_AT)[0]
        return word if self._holds() else None


def tower_of(memory: object) -> Tower | None:
    """The tower whose uppermost floor a memory is; None where there is none now."""
    functions = _library()
    if functions is None:
        return None
    floors: list[Floor] = []
    while len(floors) <= 4 * FLOORS_MOST:
        floor = memory.floor() if isinstance(memory, HasFloor) else None
        if floor is None or (isinstance(floor, Ranges) and len(floor.rows) > RANGES_MOST):
            return None
        floors.append(floor)
        if isinstance(floor, Ground):
            solid = sum(not isinstance(each, Through) for each in floors)
            return _built(functions, floors, floor) if solid <= FLOORS_MOST else None
        memory = floor.below
    return None


def _built(functions: tuple[_Read, _Read], floors: Sequence[Floor], ground: Ground) -> Tower | None:
    try:
        return Tower(functions, floors, ground)
    except OverflowError:  # a DTB that no machine has
        return None
