"""The usual read in one call of C (`native/processes.c`): the pages are there, the bytes are copied, all is as it was.

Without a compiler, or where the environment variable of the accelerator says so, the same is done by single system
calls, and so is all that is not usual.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from engine.accelerator import Packed, opened, place
from engine.compiled import NotCompiledError
from engine.memory import Addresses
from engine.oslayers.native.descriptors import Descriptors
from engine.oslayers.native.pagemap import PAGE_SHIFT
from engine.types import ADDRESS_SPACE

log = logging.getLogger(__name__)

LEAST = 16 << 10
"""Bytes from which on it is faster than two system calls of Python (measured)."""
LEAST_BY_PID = 16 << 10
"""From more bytes on process_vm_readv is faster than mem, with the looks that it needs (measured)."""
_packed = Packed()
_pack = struct.Struct("@QQQ6i").pack_into
_SCANS, _SWAPPED_TOO, _BY_PID = 1, 2, 4
_place_of: Callable[..., ctypes.Array[ctypes.c_char]] = (ctypes.c_char * 1).from_buffer
_NUMBER, _POINTER = ctypes.c_uint64, ctypes.c_void_p


class Library:
    """The loaded library."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        self.read_held = library.cloudfs_read_held
        """(a packed request) → whether it did."""
        self.read_held.argtypes = [_POINTER]
        self.held_pages = library.cloudfs_held_pages
        """(pagemap, ascending addresses, count, width, page shift, how, held pages of each)."""
        self.held_pages.argtypes = [ctypes.c_int, _POINTER, *[_NUMBER] * 2, ctypes.c_uint, ctypes.c_int, _POINTER]
        self.held_pages.restype = None


@functools.cache
def library() -> Library | None:
    """The library; None where it cannot be had. Compiles it the first time."""
    try:
        return opened("processes.c", Library)
    except (NotCompiledError, OSError, AttributeError) as error:
        log.info("processes are read by single system calls: %s", error)
        return None


def read(found: Library, files: Descriptors, address: int, buffer: memoryview, *, swapped: bool) -> bool:
    """Fill `buffer`; False, and anything in it, where that is not the usual case. There must be a pagemap."""
    size = len(buffer)
    if not 0 <= address < ADDRESS_SPACE:
        return False
    how = _SCANS * (files.scanner is not None) | _SWAPPED_TOO * swapped
    if size > LEAST_BY_PID and files.vectors:
        how |= _BY_PID
    target = ctypes.addressof(_place_of(buffer))
    packed = _packed
    numbers = files.mem, files.pagemap, files.pidfd, files.pid, PAGE_SHIFT, how
    _pack(packed.buffer, 0, address, size, target, *numbers)
    return bool(found.read_held(packed.address))


def held_pages(found: Library, files: Descriptors, addresses: Addresses, width: int) -> npt.NDArray[np.intp]:
    """For each row of `width` bytes how many of its pages are in memory, or in swap."""
    held = np.empty(len(addresses), np.intp)
    order = np.argsort(addresses, kind="stable")  # so that pages which lie near one another are asked for together
    ascending, counts = addresses[order], np.empty(len(addresses), np.uint64)
    how = _SCANS * (files.scanner is not None)
    found.held_pages(files.pagemap, place(ascending), len(ascending), width, PAGE_SHIFT, how, place(counts))
    held[order] = counts.view(np.intp)
    return held
