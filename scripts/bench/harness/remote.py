"""process_vm_readv(2) from Python at its best: by ctypes, into buffers that are kept."""

from __future__ import annotations

import ctypes
import os

import numpy as np
import numpy.typing as npt

Addresses = npt.NDArray[np.uint64]
Words = npt.NDArray[np.uint64]

IOV_MAX = 1024
"""limits.h of Linux: pieces of one call."""


class _Piece(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class RemoteReader:
    """Reads of one process, of blocks of one size."""

    def __init__(self, pid: int, size: int) -> None:
        self._call = ctypes.CDLL(None, use_errno=True).process_vm_readv
        self._call.argtypes = [ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong]
        self._call.restype = ctypes.c_ssize_t
        self._pid = pid
        self.buffer = bytearray(size)
        self._kept = (ctypes.c_char * size).from_buffer(self.buffer)
        self._here = _Piece(ctypes.addressof(self._kept), size)
        self._there = _Piece(0, size)
        self._here_address = ctypes.addressof(self._here)
        self._there_address = ctypes.addressof(self._there)

    def block(self, address: int) -> None:
        """Fill the buffer."""
        self._there.base = address
        if self._call(self._pid, self._here_address, 1, self._there_address, 1, 0) != len(self.buffer):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def rows(self, addresses: Addresses, out: npt.NDArray[np.uint8]) -> None:
        """Rows at many places, at most `IOV_MAX` of them, in one call."""
        pieces = np.full((len(addresses), 2), out.shape[1], np.uint64)
        pieces[:, 0] = addresses
        here = _Piece(out.ctypes.data, out.nbytes)
        if self._call(self._pid, ctypes.addressof(here), 1, pieces.ctypes.data, len(addresses), 0) != here.size:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def words(self, addresses: Addresses) -> Words:
        """Many words: the table of pieces is an array, IOV_MAX of them a call."""
        values = np.empty(len(addresses), np.uint64)
        pieces = np.full((IOV_MAX, 2), 8, np.uint64)
        for first in range(0, len(addresses), IOV_MAX):
            part = addresses[first : first + IOV_MAX]
            pieces[: len(part), 0] = part
            here = _Piece(values.ctypes.data + 8 * first, 8 * len(part))
            if self._call(self._pid, ctypes.addressof(here), 1, pieces.ctypes.data, len(part), 0) != here.size:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return values
